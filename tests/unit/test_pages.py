"""docs/performance.md is that of the committed results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("benchmarks")


def test_no_table_is_stale():
    check = subprocess.run([sys.executable, "-m", "benchmarks.pages", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_servers_that_differ_in_a_flag_alone_come_one_after_the_other():
    from benchmarks.cases import parse
    from benchmarks.server import Configuration

    of = [Configuration(4, cache, layers, one_core, False) for cache in ("bf16", "fp8") for layers in (3, 8) for one_core in (False, True)]
    names = [one.named(f"bs{bs}-len64-") for one in of for bs in (1, 16)]
    assert names[:4] == ["n4-bs1-len64-bf16", "n4-bs16-len64-bf16", "n4-bs1-len64-bf16-1core", "n4-bs16-len64-bf16-1core"]
    backwards = names[::-1]
    assert sorted(backwards, key=parse) == names


def test_a_name_that_no_benchmark_gives_is_refused():
    from benchmarks.cases import parse

    with pytest.raises(ValueError, match="n4-bs1-bf16: not a case"):
        parse("n4-bs1-bf16")


def step(name: str, ms: float) -> dict:
    return {"name": name, "metric": "step_ms", "upstream": ms, "ours": ms - 1, "spread": {"upstream": [ms, ms], "ours": [ms, ms]}}


def test_a_picture_follows_one_dimension():
    from benchmarks.plot import along, of_metric

    lengths = [step(f"n4-bs1-len{length}-{cache}", 9) for length in (64, 512, 4096) for cache in ("bf16", "fp8")]
    others = [step("n4-bs8-len64-bf16", 9), step("n3-bs1-len512-bf16", 9)]
    cases = of_metric({"cases": lengths + others}, "step_ms")
    shared, groups = along(cases, "length")
    assert shared == "batch 1, 4 draft steps, 3 layers"
    assert {cache: [tick for tick, _ in found] for cache, found in groups.items()} == {"bf16": [64, 512, 4096], "fp8": [64, 512, 4096]}
    shared, groups = along(cases, "batch")
    assert (shared, [tick for tick, _ in groups["bf16"]]) == ("64 tokens, 4 draft steps, 3 layers", [1, 8])
    assert along(cases, "layers")[1] == {}


def test_the_pictures_are_drawn_from_the_committed_results(tmp_path):
    from benchmarks.plot import main

    main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs").glob("*.png")}
