"""The native copy against the reference, bit for bit, in poisoned buffers."""

import weakref

import pytest
import torch
from cases import far_apart, make

from sglang_nsa_fused import ReplayPlan, fused_metadata_copy_cuda, fused_metadata_copy_multi_cuda
from sglang_nsa_fused.kernels import select
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY

MODES = (DECODE, TARGET_VERIFY, DRAFT_EXTEND)


@pytest.fixture(autouse=True)
def native(device):
    assert select(device).name == "native", select(device).reason  # nothing here may pass on the fallback


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bs", [1, 3, 7, 63, 257])
def test_one_destination(device, bs, mode, pages, flashmla):
    case = make(device, mode, bs, columns=129, pages=pages, flashmla=flashmla)
    expected = case.expected()
    assert fused_metadata_copy_cuda(*case.upstream_args()) is None
    case.check(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 4, 63, 64, 65, 2047, 2048, 2049, 8191])
@pytest.mark.parametrize("width", [8192, 8193, 8194])
def test_columns_and_pitches(device, columns, width, mode):
    make(device, mode, bs=7, columns=columns, width=width, num_dst=2).run()


@pytest.mark.parametrize("num_dst", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("mode", MODES)
def test_many_destinations(device, num_dst, mode):
    make(device, mode, bs=5, columns=300, num_dst=num_dst, flashmla=True, schedule=True).run()


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("pages", [False, True])
def test_three_destinations_as_upstream_passes_them(device, pages, flashmla):
    case = make(device, bs=4, columns=200, num_dst=3, pages=pages, flashmla=flashmla)
    expected = case.expected()
    assert fused_metadata_copy_multi_cuda(*case.multi_args()) is None
    case.check(expected)


def test_context_of_163840_at_upstreams_pitch(device):
    make(device, bs=3, columns=163_840, width=163_850, num_dst=2, source_pitch=163_850).run()


def test_source_rows_wider_than_the_copied_columns(device):
    make(device, bs=6, columns=1000, source_pitch=1003, num_dst=3).run()


def test_destination_offsets_beyond_32_bits(device):
    case = make(device, bs=3, columns=77)
    table = case.destinations[0][2] = far_apart(case.destinations[0][2])
    fused_metadata_copy_cuda(*case.upstream_args())
    assert torch.equal(table, case.sources[2])


def test_source_offsets_beyond_32_bits(device):
    case = make(device, bs=3, columns=77)
    expected = case.expected()
    case.sources[2] = far_apart(case.sources[2])
    fused_metadata_copy_cuda(*case.upstream_args())
    case.check(expected)


def test_a_row_of_more_than_a_million_columns(device):
    make(device, bs=1, columns=1_100_001).run()


def test_element_0_of_cumulative_lengths_stays(device):
    case = make(device, bs=4)
    fused_metadata_copy_cuda(*case.upstream_args())
    assert case.destinations[0][1][0] == -7 and case.destinations[0][5][0] == -7
    assert torch.equal(case.destinations[0][1][1:], case.sources[1][1:])


def test_draft_extend_leaves_rows_behind_the_source(device):
    case = make(device, DRAFT_EXTEND, bs=4)
    fused_metadata_copy_cuda(*case.upstream_args())
    assert bool((case.destinations[0][2][-1] == -7).all()) and bool((case.destinations[0][6][-1] == -7).all())


def test_empty_batch_writes_nothing(device):
    case = make(device, bs=3)
    fused_metadata_copy_cuda(*case.upstream_args()[:19], 0, 65, 65, 0)
    case.check_untouched()


def test_source_that_is_its_own_destination(device):
    """Upstream's cache_seqlens up to 0.5.13 in padded batches; in decode the expanded lengths are the same tensor."""
    case = make(device, bs=5)
    case.sources[0] = case.destinations[0][0].copy_(case.sources[0])
    case.sources[4] = case.sources[0]
    case.destinations[0][4] = case.destinations[0][0]
    before = case.sources[0].clone()
    fused_metadata_copy_cuda(*case.upstream_args())
    assert torch.equal(case.destinations[0][0], before)
    assert torch.equal(case.destinations[0][2], case.sources[2])


def test_tensor_shared_by_all_destinations(device):
    """Upstream's step backends share cache_seqlens up to 0.5.13."""
    case = make(device, bs=5, num_dst=3)
    for destination in case.destinations[1:]:
        destination[0] = case.destinations[0][0]
    ReplayPlan(DECODE, case.destinations).copy(*case.sources, *case.sizes)
    assert torch.equal(case.destinations[0][0], case.sources[0])


def test_tables_side_by_side_in_one_buffer(device):
    """Column slices of one buffer interleave without sharing an element."""
    case = make(device, bs=5, columns=33, num_dst=2)
    both = torch.full((5, 80), -7, dtype=torch.int32, device=device)
    case.destinations[0][2], case.destinations[1][2] = both[:, :33], both[:, 40:73]
    ReplayPlan(DECODE, case.destinations).copy(*case.sources, *case.sizes)
    for start in (0, 40):
        assert torch.equal(both[:, start : start + 33], case.sources[2])
    assert bool((both[:, 33:40] == -7).all()) and bool((both[:, 73:] == -7).all())


def test_a_plan_replays_other_lengths(device):
    large, small = make(device, bs=8, columns=500, num_dst=3, seed=1), make(device, bs=8, columns=20, seed=2)
    plan = ReplayPlan(DECODE, large.destinations)
    plan.copy(*large.sources, *large.sizes)
    small.destinations, small.buffers = large.destinations, large.buffers
    expected = small.expected()
    plan.copy(*small.sources, *small.sizes)
    small.check(expected)


def test_the_callable_keeps_alive_what_it_points_to(device):
    case = make(device, TARGET_VERIFY, num_dst=2, flashmla=True, schedule=True)
    alive = [weakref.ref(tensor) for tensor in sum(case.destinations, [])]
    copy = ReplayPlan(case.mode, case.destinations).copy
    del case
    assert all(tensor() is not None for tensor in alive)
    del copy
    assert not any(tensor() is not None for tensor in alive)
