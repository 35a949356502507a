"""Bad input is refused at the boundary, with the parameter's name, and nothing is written."""

import re

import pytest
import torch
from cases import make

from sglang_nsa_fused import ReplayPlan, fused_metadata_copy_cuda, fused_metadata_copy_multi_cuda
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY

SRC, DST = 0, 9  # where sources and destinations start among the 23 arguments
LENGTHS, CU, TABLE, NSA, EXPANDED, NSA_CU, PAGES, SPLITS, TILES = range(9)
MODE, BS, MAX_LEN, MAX_SEQLEN_K, SIZE = range(18, 23)


def change(at, new):
    """new: a value, or a function of the argument and all arguments."""

    def apply(args):
        args[at] = new(args[at], args) if callable(new) else new

    return apply


BAD = [
    (DECODE, change(SRC + LENGTHS, lambda t, _: t.long()), TypeError, "cache_seqlens_src: expected dtype int32, got int64"),
    (DECODE, change(DST + TABLE, lambda t, _: t.float()), TypeError, "page_table_1_dst: expected dtype int32, got float32"),
    (DECODE, change(SRC + CU, [1, 2]), TypeError, "cu_seqlens_k_src: expected an int32 tensor, got ffi.Array"),
    (DECODE, change(SRC + CU, None), ValueError, "cu_seqlens_k_src: expected an int32 tensor.*got None"),
    (DECODE, change(DST + NSA, None), ValueError, "nsa_cache_seqlens_dst: expected an int32 tensor, got None"),
    (DECODE, change(DST + PAGES, None), ValueError, "real_page_table_dst: .* its source is given, got None"),
    (DECODE, change(SRC + PAGES, None), ValueError, "real_page_table_src: .* its destination is given, got None"),
    (DECODE, change(SRC + SPLITS, None), ValueError, "flashmla_num_splits_src: .*got None"),
    (DECODE, change(DST + TILES, None), ValueError, "flashmla_metadata_dst: .*got None"),
    (DECODE, change(SRC + LENGTHS, lambda t, _: t[:-1]), ValueError, r"cache_seqlens_src: .* at least \[3\], got \[2\]"),
    (DECODE, change(SRC + CU, lambda t, _: t[:-1]), ValueError, r"cu_seqlens_k_src: .* at least \[4\], got \[3\]"),
    (DECODE, change(SRC + TABLE, lambda t, _: t[:-1]), ValueError, r"page_indices_src: .* at least \[3, 65\], got \[2, 65\]"),
    (DECODE, change(SRC + TABLE, lambda t, _: t[:, :64]), ValueError, r"page_indices_src: .*\[3, 65\], got \[3, 64\]"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:, :64]), ValueError, r"page_table_1_dst: .*\[3, 65\], got \[3, 64\]"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:2]), ValueError, r"page_table_1_dst: .*\[3, 65\], got \[2, 65\]"),
    (DECODE, change(DST + PAGES, lambda t, _: t[:, :1]), ValueError, r"real_page_table_dst: .*\[3, 2\], got \[3, 1\]"),
    (DECODE, change(DST + NSA_CU, lambda t, _: t[1:]), ValueError, r"nsa_cu_seqlens_k_dst: .*\[4\], got \[3\]"),
    (DECODE, change(SRC + SPLITS, lambda t, _: t[1:]), ValueError, r"flashmla_num_splits_src: .*\[4\], got \[3\]"),
    (DECODE, change(DST + TILES, lambda t, _: t[1:]), ValueError, r"flashmla_metadata_dst: .*\[1056\], got \[1048\]"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:, ::2]), ValueError, "page_table_1_dst: expected last stride 1, got 2"),
    (DECODE, change(SRC + NSA, lambda t, _: t.repeat(2)[::2]), ValueError, "nsa_cache_seqlens_src: expected last stride 1"),
    (DECODE, change(SRC + TILES, lambda t, _: t.t()), ValueError, "flashmla_metadata_src: expected a contiguous tensor"),
    (DECODE, change(SRC + TABLE, lambda t, _: t.flatten()), ValueError, r"page_indices_src: expected 2 dimensions, got shape \[195\]"),
    (DECODE, change(DST + CU, lambda t, _: t.view(2, 2)), ValueError, "cu_seqlens_k_dst: expected 1 dimension"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:1].expand(3, -1)), ValueError, "page_table_1_dst: expected rows apart"),
    (DECODE, change(DST + NSA, lambda _, a: a[DST + LENGTHS]), ValueError, "nsa_cache_seqlens_dst: .*overlaps cache_seqlens_dst"),
    (DECODE, change(DST + LENGTHS, lambda _, a: a[DST + TABLE][1, 2:5]), ValueError, "overlaps"),
    (DECODE, change(SRC + NSA, lambda _, a: a[DST + LENGTHS]), ValueError, "nsa_cache_seqlens_src: .*overlaps cache_seqlens_dst"),
    (DECODE, change(MODE, 3), ValueError, "forward_mode: expected 0 .decode., 1 .target verify. or 2 .draft extend., got 3"),
    (DECODE, change(MODE, "decode"), TypeError, "forward_mode: expected an integer"),
    (DECODE, change(BS, -1), ValueError, "bs: expected 0 or more, got -1"),
    (DECODE, change(BS, 4), ValueError, "seqlens_expanded_size: expected bs = 4 in decode, got 3"),
    (DECODE, change(MAX_LEN, -1), ValueError, "max_len: expected 0 or more, got -1"),
    (DECODE, change(MAX_LEN, 66), ValueError, r"page_indices_src: .*\[3, 66\], got \[3, 65\]"),
    (DECODE, change(MAX_LEN, 2**40), ValueError, "page_indices_src"),
    (DECODE, change(SIZE, 2), ValueError, "seqlens_expanded_size: expected bs = 3 in decode, got 2"),
    (TARGET_VERIFY, change(SIZE, 8), ValueError, "seqlens_expanded_size: expected a multiple of bs = 3 in target verify, got 8"),
    (TARGET_VERIFY, change(SIZE, -3), ValueError, "seqlens_expanded_size: expected 0 or more, got -3"),
    (TARGET_VERIFY, change(SIZE, 12), ValueError, r"page_indices_src: .*\[12, 65\], got \[9, 65\]"),
    (TARGET_VERIFY, change(MAX_SEQLEN_K, -1), ValueError, "max_seqlen_k: expected 0 or more, got -1"),
    (TARGET_VERIFY, change(SRC + EXPANDED, None), ValueError, "seqlens_expanded_src: expected an int32 tensor"),
    (TARGET_VERIFY, change(DST + EXPANDED, lambda _, a: a[DST + NSA]), ValueError, "seqlens_expanded_dst: .*overlaps|nsa_cache_seqlens_dst: .*overlaps"),
    (DRAFT_EXTEND, change(DST + EXPANDED, lambda t, _: t[:7]), ValueError, r"seqlens_expanded_dst: .*\[8\], got \[7\]"),
]  # fmt: skip


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
