"""patches/sgl-kernel: its .cu, built alone as a torch extension, does the same and refuses the same."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from bad_input import BAD
from cases import make

from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY

PATCH = Path(__file__).parents[2] / "patches/sgl-kernel"


@pytest.fixture(scope="module")
def extension():
    spec = importlib.util.spec_from_file_location("load", PATCH / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_extension()


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("mode", [DECODE, TARGET_VERIFY, DRAFT_EXTEND])
@pytest.mark.parametrize("bs, columns", [(1, 1), (3, 65), (7, 2049), (63, 129), (257, 64)])
def test_one_destination(extension, bs, columns, mode, pages, flashmla):
    case = make("cuda", mode, bs=bs, columns=columns, pages=pages, flashmla=flashmla)
    expected = case.expected()
    extension.fused_metadata_copy_cuda(*case.upstream_args())
    case.check(expected)


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("bs, columns", [(4, 200), (5, 4099)])
def test_three_destinations(extension, bs, columns, flashmla):
    case = make("cuda", bs=bs, columns=columns, num_dst=3, flashmla=flashmla)
    expected = case.expected()
    extension.fused_metadata_copy_multi_cuda(*case.multi_args())
    case.check(expected)


@pytest.mark.parametrize("mode, spoil, error, text", BAD, ids=[f"{i}-{row[3][:40]}" for i, row in enumerate(BAD)])
def test_refused_with_nothing_written(extension, mode, spoil, error, text):
    case = make("cuda", mode, bs=3, columns=65, flashmla=True)
    args = list(case.upstream_args())
    spoil(args)
    # torch checks what is no tensor or no integer itself, in its own words.
    required = [args[at] for at in (0, 1, 2, 3, 5, 9, 10, 11, 12, 14)]
    own_words = not all(isinstance(arg, torch.Tensor) for arg in required) or isinstance(args[18], str)
    with pytest.raises(RuntimeError if own_words else error) as raised:
        extension.fused_metadata_copy_cuda(*args)
    assert own_words or re.search(text, str(raised.value)), str(raised.value)
    case.check_untouched()


def test_capture(extension):
    case = make("cuda", bs=4, columns=300)
    extension.fused_metadata_copy_cuda(*case.upstream_args())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        extension.fused_metadata_copy_cuda(*case.upstream_args())
    for one in case.buffers:
        for buffer in one:
            buffer.fill_(-7)
    expected = case.expected()
    graph.replay()
    case.check(expected)
