"""The native generator against the reference, bit for bit, in poisoned buffers."""

import weakref

import pytest
import torch
from cases import far_apart
from generated import BOUNDARIES, MODES, NAMES, make

from sglang_nsa_fused import planners
from sglang_nsa_fused.kernels import select
from sglang_nsa_fused.plan import ReplayPlan, Values
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY


@pytest.fixture(autouse=True)
def native(device):
    assert select(device).name == "native", select(device).reason


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bs", [1, 3, 7, 63, 257, 600])
def test_batch_sizes(device, bs, mode, accepted):
    make(device, mode, bs, accepted=accepted).run()


def test_more_requests_than_any_block_scans(device):
    for mode in MODES:
        make(device, mode, 4096, longest=70, draft_tokens=2).run()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", BOUNDARIES)
def test_lengths_at_boundaries(device, length, mode):
    make(device, mode, bs=5, longest=2100, lengths=[length] * 5).run()


@pytest.mark.parametrize("row_floor", [0, 3, -(1 << 31)])
@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("bs", [3, 300])
def test_rows_of_a_draft_extend_have_at_least_the_floor(device, bs, accepted, row_floor):
    """A padded request has one token and still extends by all draft tokens."""
    case = make(device, DRAFT_EXTEND, bs, accepted=accepted, row_floor=row_floor, lengths=[1 - 4, 300, 2 - 4] * (bs // 3))
    case.run()
    if not accepted:
        assert case.destinations[0][4][:4].tolist() == [max(n, row_floor) for n in (-2, -1, 0, 1)]


@pytest.mark.parametrize("mode", [DECODE, TARGET_VERIFY])
def test_the_floor_is_a_draft_extends_alone(device, mode):
    make(device, mode, 3, row_floor=100, lengths=[1, 2, 300]).run()


@pytest.mark.parametrize("length_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_dtypes(device, length_dtype, slot_dtype):
    for mode in MODES:
        make(device, mode, length_dtype=length_dtype, slot_dtype=slot_dtype).run()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [163_840, 163_850])
def test_long_rows(device, width, mode):
    make(device, mode, bs=3, longest=width - 8, width=width, pool_width=163_851).run()


@pytest.mark.parametrize("mode", MODES)
def test_lengths_beyond_the_tables_stay_inside(device, mode):
    """As upstream's slices, which end where the table and the pool do."""
    make(device, mode, bs=4, longest=5000, width=130, pool_width=5000).run()
    make(device, mode, bs=4, longest=5000, width=5000, pool_width=130).run()


NARROW = ("page_table_1",)


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bs, longest", [(1, 5000), (3, 300), (63, 3000), (257, 300), (600, 130)])
def test_pages_without_a_column_for_each_token(device, bs, longest, mode, accepted):
    make(device, mode, bs, longest, accepted=accepted, num_dst=2, leave_out=NARROW).run()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", BOUNDARIES)
def test_pages_at_boundaries(device, length, mode):
    make(device, mode, bs=5, longest=2100, lengths=[length] * 5, leave_out=NARROW).run()


@pytest.mark.parametrize("mode", MODES)
def test_pages_of_a_wide_pool(device, mode):
    """Short requests, and one as long as the table, of an odd number of pages."""
    make(device, mode, bs=3, lengths=[5, 163_841, 0], width=163_850, pool_width=163_853, leave_out=NARROW).run()
    make(device, mode, bs=4, longest=5000, width=130, pool_width=5000, leave_out=NARROW).run()
    make(device, mode, bs=4, longest=5000, width=5000, pool_width=130, leave_out=NARROW).run()


def test_pages_of_more_than_a_million_tokens(device):
    make(device, bs=2, lengths=[1_100_001, 7], width=1_100_100, leave_out=NARROW).run()


def test_pages_beside_a_destination_with_both_tables(device):
    case = make(device, TARGET_VERIFY, bs=6, num_dst=3, longest=3000)
    case.destinations[1][2] = None
    case.run()


@pytest.mark.parametrize("num_dst", [2, 3, 7, 16])
@pytest.mark.parametrize("mode", MODES)
def test_many_destinations(device, mode, num_dst):
    make(device, mode, bs=6, num_dst=num_dst).run()


@pytest.mark.parametrize("name", NAMES)
def test_any_field_may_be_absent(device, name):
    for mode in MODES:
        make(device, mode, num_dst=2, leave_out=(name,)).run()


def test_any_field_alone(device):
    for name in NAMES:
        make(device, TARGET_VERIFY, leave_out=tuple(other for other in NAMES if other != name)).run()


@pytest.mark.parametrize("extra_last", [False, True])
@pytest.mark.parametrize("segment_len", [64, 128, 256, 512])
@pytest.mark.parametrize("num_sms", [1, 78, 132, 148])
def test_schedules(device, segment_len, num_sms, extra_last):
    for mode in MODES:
        for bs, longest in ((37, 9000), (3, 700)):
            make(device, mode, bs=bs, longest=longest, segment_len=segment_len, num_sms=num_sms, extra_last=extra_last).run()


def test_a_schedule_of_nothing(device):
    case = make(device, bs=4, lengths=[0, 0, 0, 0])
    case.run()
    schedule = case.destinations[0][9]
    assert schedule[:, 0].tolist() == [4] * len(schedule) and not schedule[:, 1].any()


HOPPER = planners.TOPK_BUCKETS[1]


@pytest.mark.parametrize("buckets", [*planners.TOPK_BUCKETS, ((7, 0),), ((0, 5), (63, 5), (64, 0), (4000, 1))])
@pytest.mark.parametrize("bs", [1, 31, 257, 600])
def test_topk_plans(device, bs, buckets):
    others = tuple(name for name in NAMES if name != "topk_v2_plan")
    for mode in MODES:
        for longest in (100, 1 << 17, 1 << 19):
            seed = bs + longest
            make(device, mode, bs=bs, longest=longest, width=9, topk_buckets=buckets, leave_out=others, seed=seed).run()


@pytest.mark.parametrize(
    "lengths, plan",
    [
        ([65536, 65537, 1, 70000], [(65536, 2), (1, 65537), (3, 70000)]),  # the pool takes 30
        ([70000] * 31, [(98304, 0)]),
        ([70000] * 31 + [100_000] * 45, [(98304, 45), *((row, 100_000) for row in range(31, 76))]),
        ([70000] * 31 + [100_000] * 46, [(131072, 0)]),
        ([400_000] * 129, [(393216, 129), *((row, 400_000) for row in range(129))]),
        ([100_000] * 46 + [200_000] * 61, [(196608, 61), *((row, 200_000) for row in range(46, 107))]),
    ],
)
def test_the_topks_plan_is_as_its_source_says(device, lengths, plan):
    others = tuple(name for name in NAMES if name != "topk_v2_plan")
    case = make(device, bs=len(lengths), lengths=lengths, width=9, topk_buckets=HOPPER, leave_out=others)
    case.run()
    found = case.destinations[0][NAMES.index("topk_v2_plan")]
    assert found[: len(plan)].tolist() == [list(pair) for pair in plan]
    assert bool((found[len(plan) :] == -7).all())


def test_fewer_requests_than_captured(device):
    for mode in MODES:
        make(device, mode, bs=3, captured_bs=8, leave_out=("flashmla_num_splits", "flashmla_metadata")).run()


def test_an_empty_batch_writes_nothing(device):
    case = make(device, bs=3)
    case.plan().generate(*case.batch[:3], 0)
    case.check_untouched()


def test_what_step_backends_share_is_written_once(device):
    case = make(device, bs=5, num_dst=3)
    for number in (1, 2):
        case.destinations[number], case.buffers[number] = list(case.destinations[0]), case.buffers[0]
    expected = case.expected()
    ReplayPlan(DECODE, case.destinations, values=case.values).generate(*case.batch)
    case.check(expected)


@pytest.mark.parametrize("mode", [DECODE, DRAFT_EXTEND])
def test_captured_lengths_that_are_the_runners(device, mode):
    """seq_lens and the captured cache_seqlens are one tensor up to sglang 0.5.13."""
    case = make(device, mode, bs=5, length_dtype=torch.int32)
    captured = case.destinations[0][0]
    captured.copy_(case.batch[0])
    case.batch = (captured, *case.batch[1:])
    case.run()


def test_decode_has_one_tensor_under_three_names(device):
    case = make(device, bs=5)
    case.destinations[0][4] = case.destinations[0][0]
    case.destinations[0][10] = case.destinations[0][0].view(-1, 1)
    case.buffers[0][4] = case.buffers[0][10] = case.buffers[0][0]
    case.run()


@pytest.mark.parametrize("at", [2, 6])
def test_table_offsets_beyond_32_bits(device, at):
    case = make(device, bs=3, longest=70, lengths=[70, 65, 1])
    table = case.destinations[0][at]
    expected = case.expected()[0][at].as_strided(table.shape, table.stride(), table.storage_offset())
    case.destinations[0][at] = far_apart(table)
    for narrow in (False, True) if at == 6 else (False,):
        if narrow:
            case.destinations[0][2] = None
            case.destinations[0][at].fill_(-7)
        case.plan().generate(*case.batch)
        assert torch.equal(case.destinations[0][at], expected)


def test_pool_offsets_beyond_32_bits(device):
    case = make(device, bs=3, longest=70, lengths=[70, 65, 1])
    pool, slots = case.values.req_to_token[:3], torch.tensor([2, 0, 1], device=device)
    case.values, case.batch = case.values._replace(req_to_token=pool), (case.batch[0], slots, *case.batch[2:])
    expected = case.expected()
    case.values = case.values._replace(req_to_token=far_apart(pool))
    case.plan().generate(*case.batch)
    case.check(expected)
    case.destinations[0][2] = None
    case.destinations[0][6].fill_(-7)
    case.plan().generate(*case.batch)
    case.check(expected)


def test_a_request_of_more_than_a_million_tokens(device):
    make(device, bs=1, lengths=[1_100_001], width=1_100_100).run()


def test_negative_lengths_and_accepted_counts(device):
    """As upstream's slices and repeats: no columns, no rows."""
    make(device, bs=3, lengths=[-5000, 300, -1]).run()
    case = make(device, DRAFT_EXTEND, bs=3, lengths=[100, 200, 300])
    lens, slots, _, bs = case.batch
    few, none = ([2, bad, 1] for bad in (-3, 0))
    case.batch = (lens, slots, torch.tensor(none, dtype=torch.int32, device=device), bs)
    expected = case.expected()
    case.batch = (lens, slots, torch.tensor(few, dtype=torch.int32, device=device), bs)
    case.plan().generate(*case.batch)
    case.check(expected)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("slot", [-1, -(2**31), 9, 2**31 - 1])
@pytest.mark.parametrize("mode", MODES)
def test_padding_may_name_a_slot_outside_the_pool(device, mode, slot, slot_dtype):
    """It takes the first; of a pool of nine."""
    case = make(device, mode, bs=4)
    seq_lens = torch.tensor([300, 1, 0, 2], device=device)
    first, outside = (torch.tensor([6, at, at, 6], dtype=slot_dtype, device=device) for at in (0, slot))
    case.batch = (seq_lens, first, *case.batch[2:])
    expected = case.expected()
    case.batch = (seq_lens, outside, *case.batch[2:])
    for one, right in zip(case.expected(), expected):
        assert all(map(torch.equal, one, right))
    case.plan().generate(*case.batch)
    case.check(expected)


@pytest.mark.parametrize(
    "slots, extend, text",
    [
        ([0, 1, -1], [1, 1, 1], "req_pool_indices: expected 0 to 6, got -1"),
        ([0, 7, 1], [1, 1, 1], "req_pool_indices: expected 0 to 6, got 7 for request 1 of length 2"),
        ([0, 1, 2], [4, 4, 5], "extend_lens: expected at most the captured 12 rows, got 13"),
        ([0, 1, 2], [1, 2**31 - 1, 0], "extend_lens: expected at most the captured 12 rows, got 2147483648"),
    ],
)
def test_what_only_the_device_sees(request, slots, extend, text):
    """On the CPU an error before anything is written; on a GPU, and emulated, a trap."""
    case = make("cpu", DRAFT_EXTEND, lengths=[300 - 4, 2 - 4, 64])
    slots, extend = torch.tensor(slots), torch.tensor(extend, dtype=torch.int32)
    if request.config.pluginmanager.hasplugin("emulated"):
        with pytest.raises(RuntimeError, match="a thread trapped"):
            case.plan().generate(case.batch[0], slots, extend, 3)
    else:
        with pytest.raises(ValueError, match=text):
            case.plan().generate(case.batch[0], slots, extend, 3)
        case.check_untouched()


def test_the_callable_keeps_alive_what_it_points_to(device):
    case = make(device, TARGET_VERIFY, num_dst=2)
    values = case.values
    tensors = [*sum(case.destinations, []), values.req_to_token, values.num_splits, values.tile_metadata]
    alive = [weakref.ref(tensor) for tensor in tensors]
    generate = case.plan().generate
    del case, values, tensors
    assert all(tensor() is not None for tensor in alive)
    del generate
    assert not any(tensor() is not None for tensor in alive)


def test_the_plan_of_a_draft_extend_keeps_alive_what_it_points_to(device):
    pool = torch.zeros(4, 9, dtype=torch.int32, device=device)
    alive = weakref.ref(pool)
    generate = select(device).draft_extend_plan(Values(pool, 0, 0, 2, 64, 64), 1)
    del pool
    assert alive() is not None
    del generate
    assert alive() is None
