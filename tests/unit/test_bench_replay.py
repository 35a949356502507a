"""Options of `bench replay`, and what it says without a GPU."""

import pytest
import torch
from typer.testing import CliRunner

from sglang_nsa_fused.tools.bench.replay import numbers
from sglang_nsa_fused.tools.cli import app


def run(*words):
    return CliRunner().invoke(app, ["bench", "replay", *map(str, words)], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    "text, expected", [("7", [7]), ("1,4,16", [1, 4, 16]), ("1-64", [1, 2, 4, 8, 16, 32, 64]), ("3-10,9", [3, 6, 9])]
)
def test_numbers(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    "words, text",
    [
        (("--bs", "0"), "expected numbers as in 1,4,16 or 1-64 (doubling), got '0'"),
        (("--bs", "8-4"), "got '8-4'"),
        (("--kind", "draft,decode"), "expected some of draft,verify,extend, got 'decode'"),
        (("--cache", "int4"), "expected some of bf16,fp8, got 'int4'"),
        (("--length", "163840"), "--length 163840 and its draft tokens do not fit --width 163840"),
        (
            ("--width", "1048576,1024,163840", "--length", "512,1020"),
            "--length 1020 and its draft tokens do not fit --width 1024",
        ),
        (("--width", "wide"), "expected numbers as in 1,4,16 or 1-64 (doubling), got 'wide'"),
        (("--draft-steps", "1"), "with one draft step there is no metadata to replay"),
    ],
)
def test_options_that_cannot_be(words, text):
    result = run(*words)
    assert result.exit_code == 2 and text in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    result = run()
    assert result.exit_code == 1 and result.output.startswith("FAILED no GPU")
