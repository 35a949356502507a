"""Replays of random batches, as many as of hours on a server; every thousandth is compared with the reference.

The GPU's memory is watched, so nothing else may run on it.

SGLANG_NSA_FUSED_TEST_COUNT=1000000 pytest -s tests/gpu/test_soak.py
"""

import random
from collections.abc import Callable

import generated
import pytest
import torch

from sglang_nsa_fused.kernels import select
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY

BS, LONGEST, DRAFT_TOKENS, EVERY = 16, 9000, 4, 1000


def refreshes(device: str) -> list[generated.Case]:
    """The three of a speculative step, without the wide page table and with it."""
    sizes = dict(bs=BS, longest=LONGEST, draft_tokens=DRAFT_TOKENS)
    return [
        generated.make(device, mode, num_dst=num_dst, leave_out=leave_out, **sizes)
        for leave_out in (("page_table_1",), ())
        for mode, num_dst in ((DECODE, 3), (TARGET_VERIFY, 1), (DRAFT_EXTEND, 1))
    ]


def new_batch(case: generated.Case) -> None:
    """Other lengths, slots and accepted tokens, drawn on the device."""
    lengths, slots, extend_lens, _ = case.batch
    lengths.random_(0, LONGEST + 1)
    slots.random_(0, len(case.values.req_to_token))
    if extend_lens is not None:
        lengths += DRAFT_TOKENS
        extend_lens.random_(0, DRAFT_TOKENS + 1)


def soak(replays: list[tuple[generated.Case, Callable]], times: int, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(times):
        case, replay = draw.choice(replays)
        new_batch(case)
        if number % EVERY:
            replay()
        else:  # over what the replays before it have left
            expected = case.expected()
            replay()
            case.check(expected)


def launched(case: generated.Case) -> Callable:
    generate = case.plan().generate
    return lambda: generate(*case.batch)


def captured(case: generated.Case) -> Callable:
    replay, graph = launched(case), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replay()
    return graph.replay


def gpu_memory() -> tuple[int, int]:
    """Bytes of torch's tensors, and of this GPU without what torch's allocator holds."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved()


@pytest.mark.parametrize("prepare", [launched, captured])
def test_replays(prepare, count, seed):
    assert select("cuda").name == "native", select("cuda").reason
    replays = [(case, prepare(case)) for case in refreshes("cuda")]
    soak(replays, 20 * EVERY, seed)  # now all kernels are loaded, torch's too
    before = gpu_memory()
    soak(replays, count(20_000), seed + 1)
    after = gpu_memory()
    print(f"bytes of tensors, and of the GPU outside torch: before {before}, after {after}")
    assert after[0] == before[0] and after[1] <= before[1] + (4 << 20)
