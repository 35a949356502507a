"""Bad input is refused at the boundary, with the parameter's name, and nothing is written."""

import re

import pytest
import torch
from bad_input import BAD, CU, DST, EXPANDED, MAX_LEN, MAX_SEQLEN_K, SRC
from cases import make

from sglang_nsa_fused import ReplayPlan, fused_metadata_copy_cuda, fused_metadata_copy_multi_cuda
from sglang_nsa_fused.reference import DECODE, TARGET_VERIFY


@pytest.mark.parametrize("mode, spoil, error, text", BAD, ids=[f"{i}-{row[3][:40]}" for i, row in enumerate(BAD)])
def test_refused_with_nothing_written(device, mode, spoil, error, text):
    case = make(device, mode, bs=3, columns=65, flashmla=True)
    args = list(case.upstream_args())
    spoil(args)
    with pytest.raises(error) as raised:
        fused_metadata_copy_cuda(*args)
    assert re.search(text, str(raised.value)), str(raised.value)
    case.check_untouched()


def test_decode_ignores_what_it_does_not_write(device):
    """max_len is -1 in upstream's verify, and decode reads neither expanded lengths nor max_seqlen_k."""
    case = make(device, DECODE)
    args = list(case.upstream_args())
    args[SRC + EXPANDED] = args[DST + EXPANDED] = None
    args[MAX_SEQLEN_K] = -1
    fused_metadata_copy_cuda(*args)
    verify = make(device, TARGET_VERIFY)
    args = list(verify.upstream_args())
    args[MAX_LEN] = -1
    fused_metadata_copy_cuda(*args)


def test_number_of_arguments(device):
    case = make(device, num_dst=3)
    with pytest.raises(TypeError, match="fused_metadata_copy_multi_cuda: expected 35 arguments, got 34"):
        fused_metadata_copy_multi_cuda(*case.multi_args()[:-1])
    with pytest.raises(TypeError, match="copy: expected 14 arguments, got 13"):
        ReplayPlan(DECODE, case.destinations).copy(*case.sources, *case.sizes[:-1])


def test_plan_names_the_destination(device):
    case = make(device, num_dst=3)
    case.destinations[2][2] = case.destinations[0][2]
    case.destinations[1][3] = case.destinations[1][3].long()
    with pytest.raises(TypeError, match="nsa_cache_seqlens_dst1: expected dtype int32"):
        ReplayPlan(DECODE, case.destinations)
    case.destinations[1][3] = case.destinations[2][3][:2]
    with pytest.raises(ValueError, match="nsa_cache_seqlens_dst[12]: .*overlaps nsa_cache_seqlens_dst[12]"):
        ReplayPlan(DECODE, case.destinations)


def test_plan_needs_the_same_fields_everywhere(device):
    case = make(device, num_dst=2)
    case.destinations[1][6] = None
    with pytest.raises(ValueError, match="real_page_table_dst1: expected a tensor as for real_page_table_dst0, got None"):
        ReplayPlan(DECODE, case.destinations)


@pytest.mark.parametrize("count", [0, 17])
def test_plan_takes_1_to_16_destinations(count):
    destination = make("cpu").destinations[0]
    with pytest.raises(ValueError, match=f"destinations: expected 1 to 16, got {count}"):
        ReplayPlan(DECODE, [destination] * count)


def test_a_plan_of_what_is_no_tensor_says_so():
    with pytest.raises(TypeError, match="cache_seqlens_dst of destination 0: expected an int32 tensor, got NoneType"):
        ReplayPlan(DECODE, [[None] * 10])
    with pytest.raises(TypeError, match="values: expected Values or None, got dict"):
        ReplayPlan(DECODE, [[None] * 12], values={})


def test_a_batch_larger_than_captured_is_refused(device):
    small, large = make(device, bs=3), make(device, bs=4)
    with pytest.raises(ValueError, match=r"cache_seqlens_dst: expected a shape of at least \[4\], got \[3\]"):
        ReplayPlan(DECODE, small.destinations).copy(*large.sources, *large.sizes)
    small.check_untouched()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixed_devices():
    case, other = make("cuda"), make("cpu")
    args = list(case.upstream_args())
    args[SRC + CU] = other.sources[1]
    with pytest.raises(ValueError, match="cu_seqlens_k_src: expected a tensor on cuda:0 .*got one on cpu"):
        fused_metadata_copy_cuda(*args)
    case.check_untouched()
