"""What does not fit is refused with the parameter's name, and nothing is written."""

import pytest
import torch
from generated import NAMES, make

from sglang_nsa_fused.kernels import select, workspace_sizes
from sglang_nsa_fused.plan import ReplayPlan
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY

AT = {name: at for at, name in enumerate(NAMES)}


def destination(name, new):
    def spoil(case):
        case.destinations[0][AT[name]] = new(case.destinations[0][AT[name]], case)

    return spoil


def value(name, new):
    def spoil(case):
        case.values = case.values._replace(**{name: new(case.values) if callable(new) else new})

    return spoil


AT_CAPTURE = [
    (
        DECODE,
        destination("cache_seqlens", lambda t, _: t.long()),
        TypeError,
        "cache_seqlens_dst: expected dtype int32, got int64",
    ),
    (
        DECODE,
        destination("page_table_1", lambda t, _: [1]),
        TypeError,
        "page_table_1_dst: expected an int32 tensor, got ffi.Array",
    ),
    (
        DECODE,
        destination("cu_seqlens_k", lambda t, _: t[:-1]),
        ValueError,
        r"cu_seqlens_k_dst: expected a shape of at least \[4\], got \[3\]",
    ),
    (
        TARGET_VERIFY,
        destination("nsa_cache_seqlens", lambda t, _: t[:-1]),
        ValueError,
        r"nsa_cache_seqlens_dst: .* at least \[12\], got \[11\]",
    ),
    (
        TARGET_VERIFY,
        destination("page_table_1", lambda t, _: t[:3]),
        ValueError,
        r"page_table_1_dst: expected a shape of at least \[12, 0\], got \[3, ",
    ),
    (DECODE, destination("page_table_1", lambda t, _: t[:, ::2]), ValueError, "page_table_1_dst: expected last stride 1, got 2"),
    (DECODE, destination("real_page_table", lambda t, _: t[0]), ValueError, "real_page_table_dst: expected 2 dimensions, got 1"),
    (
        DECODE,
        destination("paged_mqa_schedule", lambda t, _: t[:1]),
        ValueError,
        r"paged_mqa_schedule_dst: expected \[num_sms \+ 1, 2\], got 2 elements",
    ),
    (
        DECODE,
        destination("page_table_1", lambda t, _: t.as_strided(t.shape, (1, 1))),
        ValueError,
        "page_table_1_dst: expected rows apart",
    ),
    (
        DECODE,
        destination("nsa_cache_seqlens", lambda t, c: c.destinations[0][AT["cache_seqlens"]]),
        ValueError,
        "expected memory of its own, but it overlaps",
    ),
    (
        TARGET_VERIFY,
        destination("seqlens_expanded", lambda t, c: c.destinations[0][AT["nsa_cache_seqlens"]]),
        ValueError,
        "expected memory of its own",
    ),
    (
        DECODE,
        destination("page_table_1", lambda t, c: c.values.req_to_token[:3]),
        ValueError,
        "req_to_token: expected memory that is not written, but it overlaps page_table_1_dst",
    ),
    (DECODE, value("num_splits", None), ValueError, "flashmla_num_splits_dst: expected None as its source is None"),
    (DECODE, value("segment_len", 0), ValueError, "segment_len: expected the tokens of a schedule's segment"),
    (DECODE, value("segment_len", -1), ValueError, "segment_len: expected 0 to 2147483647, got -1"),
    (DECODE, value("topk_buckets", ()), ValueError, "topk_buckets: expected thresholds as topk_v2_plan_dst is given, got none"),
    (DECODE, value("topk_buckets", ((9, 1), (9, 2))), ValueError, "topk_buckets: expected rising thresholds .* got 9 and 2"),
    (DECODE, value("topk_buckets", ((9, -1),)), ValueError, "topk_buckets: expected rising thresholds .* got 9 and -1"),
    (DECODE, value("topk_buckets", tuple((n, 1) for n in range(9))), ValueError, "topk_buckets: .* at most 8, got 18"),
    (DECODE, destination("topk_v2_plan", lambda t, _: t[:-1]), ValueError, r"topk_v2_plan_dst: .* at least \[8\], got \[6\]"),
    (DECODE, value("page_size", 48), ValueError, "page_size: expected a power of two up to 1048576, got 48"),
    (DECODE, value("page_size", 1 << 30), ValueError, "page_size: expected a power of two up to 1048576, got 1073741824"),
    (DECODE, value("nsa_index_topk", 0), ValueError, "nsa_index_topk: expected 1 to"),
    (DECODE, value("rows", 4), ValueError, r"rows: expected bs \* rows per request = 3, got 4"),
    (TARGET_VERIFY, value("num_draft_tokens", 0), ValueError, "num_draft_tokens: expected 1 to"),
    (DECODE, value("req_to_token", None), TypeError, "req_to_token: expected an int32 tensor, got NoneType"),
    (DECODE, value("req_to_token", lambda v: v.req_to_token.long()), TypeError, "req_to_token: expected dtype int32, got int64"),
]


@pytest.mark.parametrize("mode, spoil, error, text", AT_CAPTURE, ids=[text[:40] for *_, text in AT_CAPTURE])
def test_at_capture(device, mode, spoil, error, text):
    case = make(device, mode)
    spoil(case)
    with pytest.raises(error, match=text):
        ReplayPlan(mode, case.destinations, values=case.values)


def batch(at, new):
    def spoil(args):
        args[at] = new(args[at]) if callable(new) else new

    return spoil


LENS, SLOTS, EXTEND, BS = range(4)
AT_REPLAY = [
    (DECODE, batch(BS, 4), ValueError, "bs: expected 0 to the captured 3, got 4"),
    (DECODE, batch(BS, -1), ValueError, "bs: expected 0 to the captured 3, got -1"),
    (DECODE, batch(BS, "3"), TypeError, "bs: expected an integer"),
    (DECODE, batch(LENS, lambda t: t[:2]), ValueError, "seq_lens: expected at least bs = 3 elements, got 2"),
    (DECODE, batch(LENS, lambda t: t.float()), TypeError, "seq_lens: expected dtype int32 or int64, got float32"),
    (DECODE, batch(LENS, None), TypeError, "seq_lens: expected an int32 or int64 tensor, got None"),
    (DECODE, batch(SLOTS, lambda t: t.to(torch.int16)), TypeError, "req_pool_indices: expected dtype int32 or int64, got int16"),
    (DECODE, batch(SLOTS, lambda t: t.repeat(2)[::2]), ValueError, "req_pool_indices: expected last stride 1, got 2"),
    (
        DECODE,
        batch(EXTEND, lambda _: torch.ones(3, dtype=torch.int32)),
        ValueError,
        "extend_lens: expected None but in draft extend",
    ),
    (DRAFT_EXTEND, batch(EXTEND, lambda t: t.long()), TypeError, "extend_lens: expected dtype int32, got int64"),
    (DRAFT_EXTEND, batch(EXTEND, lambda t: t[:2]), ValueError, "extend_lens: expected at least bs = 3 elements, got 2"),
]


@pytest.mark.parametrize("mode, spoil, error, text", AT_REPLAY, ids=[text[:40] for *_, text in AT_REPLAY])
def test_at_replay_nothing_is_written(mode, spoil, error, text):
    case = make("cpu", mode)
    plan, args = case.plan(), list(case.batch)
    spoil(args)
    with pytest.raises(error, match=text):
        plan.generate(*args)
    case.check_untouched()


def test_schedules_of_different_sizes(device):
    case = make(device, num_dst=2)
    case.destinations[1][AT["paged_mqa_schedule"]] = torch.full((9, 2), -7, dtype=torch.int32, device=device)
    with pytest.raises(
        ValueError, match=r"paged_mqa_schedule_dst1: expected \[133, 2\] as of the destinations before it, got \[9, 2\]"
    ):
        case.plan()


def test_a_pool_of_too_many_columns(device):
    case = make(device)
    wide = torch.empty((1, (1 << 30) + 1), dtype=torch.int32, device=device)  # on the CPU never touched
    case.values = case.values._replace(req_to_token=wide)
    with pytest.raises(
        ValueError, match="req_to_token: expected at most 1073741824 columns, and 34359738368 for all .* got 1073741825"
    ):
        case.plan()


@pytest.mark.parametrize("at, name", [(SLOTS, "req_pool_indices"), (EXTEND, "extend_lens")])
def test_only_lengths_may_be_the_captured_ones(device, at, name):
    case = make(device, DRAFT_EXTEND, slot_dtype=torch.int32)
    batch = list(case.batch)
    batch[at] = case.destinations[0][AT["cache_seqlens"]]
    with pytest.raises(ValueError, match=f"{name}: expected memory that is not written, but it overlaps cache_seqlens_dst"):
        case.plan().generate(*batch)
    case.check_untouched()


@pytest.mark.parametrize("first", [0, 4])
def test_int64_lengths_in_captured_memory(device, first):
    """Three take six words: at the captured lengths' own address, and with those only in their second half."""
    case = make(device, DECODE)
    buffer = torch.zeros(4, dtype=torch.int64, device=device)
    case.destinations[0][AT["cache_seqlens"]] = buffer.view(torch.int32)[first : first + 3]
    with pytest.raises(ValueError, match="seq_lens: .* overlaps cache_seqlens_dst"):
        case.plan().generate(buffer[:3], *case.batch[1:])
    assert not buffer.any()


def draft_extend(device, num_sms=1, rows=12, cols=300, accepted=True, workspace=lambda t: t, **values):
    """A draft extend of 12 rows and 300 columns, spoilt, which must leave its workspace alone."""
    case = make(device, DRAFT_EXTEND, accepted=accepted)
    space = torch.full((sum(workspace_sizes(3, 12, 300, 5, 0)),), -7, dtype=torch.int32, device=device)
    try:
        plan = select(device).draft_extend_plan(case.values._replace(**{"segment_len": 0} | values), num_sms)
        plan(*case.batch, workspace(space), rows, cols)
    finally:
        assert bool((space == -7).all())


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"rows": 0}, ValueError, "rows: expected 1 to 1073741824, got 0"),
        ({"cols": 2**62}, ValueError, "cols: expected 1 to 1073741824, got 4611686018427387904"),
        ({"num_sms": 2**62}, ValueError, "num_sms: expected 1 to 1073741824, got"),
        ({"page_size": 0}, ValueError, "page_size: expected a power of two up to 1048576, got 0"),
        ({"req_to_token": None}, ValueError, "req_to_token: expected an int32 tensor, got None"),
        ({"cols": 299}, ValueError, "workspace: expected 3692 elements for these sizes, got 3704"),
        ({"segment_len": 256}, ValueError, "workspace: expected 3708 elements for these sizes, got 3704"),
        ({"workspace": lambda t: None}, ValueError, "workspace: expected an int32 tensor, got None"),
        ({"workspace": lambda t: t.long()}, TypeError, "workspace: expected dtype int32, got int64"),
        # Nobody would write the thirteenth.
        (
            {"rows": 13, "accepted": False, "workspace": lambda t: t.new_full((13 * 308 + 8,), -7)},
            ValueError,
            r"rows: expected bs \* num_draft_tokens = 12 without extend_lens, got 13",
        ),
    ],
)
def test_a_draft_extend_without_a_graph(device, change, error, text):
    with pytest.raises(error, match=text):
        draft_extend(device, **change)


def test_too_few_rows_for_equal_shares(device):
    case = make(device, DRAFT_EXTEND, accepted=False)
    case.values = case.values._replace(rows=11)
    with pytest.raises(
        ValueError, match="extend_lens: expected an int32 tensor, as 3 requests of 4 rows are more than the captured 11"
    ):
        ReplayPlan(DRAFT_EXTEND, case.destinations, values=case.values).generate(*case.batch)
    case.check_untouched()


def test_a_length_vector_that_is_written_otherwise(device):
    case = make(device, TARGET_VERIFY, length_dtype=torch.int32)
    captured = case.destinations[0][AT["cache_seqlens"]]
    with pytest.raises(ValueError, match="seq_lens: expected memory that is not written, but it overlaps cache_seqlens_dst"):
        case.plan().generate(captured, *case.batch[1:])
    case.check_untouched()


def test_an_engine_that_only_copies():
    from sglang_nsa_fused.kernels import Engine

    case = make("cpu")
    with pytest.raises(ValueError, match="engine: expected one that generates"):
        ReplayPlan(DECODE, case.destinations, Engine("sgl_kernel", lambda *_: None), case.values)


def test_a_length_vector_that_is_written_beside_itself(device):
    """The captured cache_seqlens may be the source, but not another part of it."""
    case = make(device, DECODE, length_dtype=torch.int32)
    buffer = torch.full((8,), -7, dtype=torch.int32, device=device)
    case.destinations[0][AT["cache_seqlens"]] = buffer[:3]
    with pytest.raises(ValueError, match="seq_lens: expected memory that is not written, but it overlaps cache_seqlens_dst"):
        case.plan().generate(buffer[1:4], *case.batch[1:])
    assert bool((buffer == -7).all())
