"""Random cases of each operation: sizes, pitches, offsets, modes, destinations and dtypes."""

from collections.abc import Callable

import cases
import generated
import torch
from generated import MODES, NAMES
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from sglang_nsa_fused.reference import DRAFT_EXTEND, TARGET_VERIFY

INTEGERS = st.sampled_from([torch.int32, torch.int64])
BUCKETS = st.dictionaries(st.integers(0, 5000), st.integers(0, 40), min_size=1, max_size=8)


@st.composite
def copies(draw: Callable) -> dict:
    """Arguments of cases.make."""
    columns = draw(st.integers(0, 5000))
    return dict(
        mode=draw(st.sampled_from(MODES)),
        bs=draw(st.integers(1, 40)),
        columns=columns,
        width=columns + draw(st.integers(0, 40)),
        num_dst=draw(st.integers(1, 16)),
        pages=draw(st.booleans()),
        flashmla=draw(st.booleans()),
        schedule=draw(st.booleans()),
        draft_tokens=draw(st.integers(1, 5)),
        source_pitch=columns + draw(st.integers(0, 9)),
        guard=draw(st.integers(0, 33)),
        source_guard=draw(st.integers(0, 33)),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def generations(draw: Callable) -> dict:
    """Arguments of generated.make."""
    mode, longest, bs = draw(st.sampled_from(MODES)), draw(st.integers(0, 5000)), draw(st.integers(1, 40))
    num_dst = draw(st.integers(1, 16) if bs < 8 else st.integers(1, 5))
    aliased = mode != TARGET_VERIFY and draw(st.booleans())
    dtypes = dict(length_dtype=torch.int32 if aliased else draw(INTEGERS), slot_dtype=draw(INTEGERS))
    leave_out = draw(st.sets(st.sampled_from(NAMES[1:] if aliased else NAMES), max_size=9))
    more = draw(st.integers(0, 3))  # captured requests than there are; FlashMLA's constants are of all
    return dict(
        mode=mode,
        bs=bs,
        captured_bs=bs + more,
        longest=longest,
        width=longest + draw(st.integers(1, 40)),
        pool_width=longest + draw(st.integers(1, 40)),
        pitch=draw(st.integers(0, 9)),
        guard=draw(st.integers(0, 33)),
        page_size=draw(st.sampled_from([64, 64, 1, 2, 16, 128, 4096])),
        num_dst=num_dst,
        draft_tokens=draw(st.integers(1, 8)),
        accepted=draw(st.booleans()),
        leave_out=tuple(leave_out),
        topk=draw(st.sampled_from([64, 2048])),
        segment_len=draw(st.sampled_from([64, 256, 512])),
        extra_last=draw(st.booleans()),
        row_floor=draw(st.sampled_from([-(1 << 31), 0, 3])),
        topk_buckets=tuple(sorted(draw(BUCKETS).items())),
        num_sms=draw(st.integers(1, 148)),
        aliased=aliased,
        seed=draw(st.integers(0, 1000)),
        **dtypes,
    )


@st.composite
def draft_extends(draw: Callable) -> tuple[dict, dict]:
    """Arguments of generated.make, and of its case's run_without_a_graph."""
    of_case = dict(draw(generations()), mode=DRAFT_EXTEND, num_dst=1, leave_out=(), aliased=False)
    if not draw(st.booleans()):
        of_case["segment_len"] = 0
        of_case["leave_out"] = ("paged_mqa_schedule",)
    return of_case, dict(cols=draw(st.integers(1, 5000)), num_sms=draw(st.integers(1, 148)))


def run_copy(device: str, arguments: dict) -> None:
    cases.make(device, **arguments).run()


def run_generation(device: str, arguments: dict) -> None:
    generated.make(device, **arguments).run()


def run_draft_extend(device: str, arguments: tuple[dict, dict]) -> None:
    of_case, of_run = arguments
    case = generated.make(device, **of_case)
    if case.batch[2] is None or case.batch[2].any():  # a draft extend of no rows is refused
        case.run_without_a_graph(**of_run)


OPERATIONS = {
    "copy": (copies(), run_copy),
    "generation": (generations(), run_generation),
    "draft extend": (draft_extends(), run_draft_extend),
}


def search(operation: str, device: str, count: int, first: int) -> None:
    """Runs this many cases; one that fails is made small, and its arguments are printed. first: the seed of them all."""
    strategy, run = OPERATIONS[operation]

    @seed(first)
    @settings(deadline=None, max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(arguments=strategy)
    def holds(arguments):
        run(device, arguments)

    holds()
