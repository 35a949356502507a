"""Generated metadata with its oracle: every destination lies in a poisoned buffer, and the whole buffer is compared."""

from dataclasses import dataclass
from typing import Optional

import torch
from cases import GUARD, POISON, poisoned

from sglang_nsa_fused import reference
from sglang_nsa_fused.kernels import select, workspace_sizes
from sglang_nsa_fused.plan import ReplayPlan, Values
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY
from sglang_nsa_fused.verify import NAMES, verified

MODES = (DECODE, TARGET_VERIFY, DRAFT_EXTEND)
BOUNDARIES = (0, 1, 2, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049)


@dataclass
class Case:
    mode: int
    values: Values
    destinations: list
    buffers: list
    batch: tuple  # seq_lens, req_pool_indices, extend_lens, bs

    def expected(self) -> list[list[torch.Tensor]]:
        clones = [[buffer.clone() for buffer in one] for one in self.buffers]
        views = [
            [None if t is None else c.as_strided(t.shape, t.stride(), t.storage_offset()) for t, c in zip(dst, one)]
            for dst, one in zip(self.destinations, clones)
        ]
        reference.generate(self.mode, self.values, views, *self.batch)
        return clones

    def plan(self) -> ReplayPlan:
        return ReplayPlan(self.mode, self.destinations, values=self.values)

    def check(self, expected: list) -> None:
        for number, (one, right) in enumerate(zip(self.buffers, expected)):
            for name, buffer, oracle in zip(NAMES, one, right):
                assert torch.equal(buffer, oracle), f"{name} of destination {number}"

    def check_untouched(self) -> None:
        assert all(bool((buffer == -7).all()) for one in self.buffers for buffer in one)

    def run(self) -> None:
        expected = self.expected()
        self.plan().generate(*self.batch)
        self.check(expected)

    def workspace(self, cols: int, num_sms: int) -> tuple[torch.Tensor, tuple]:
        """(buffer, (workspace in it, rows, cols)) of this batch as a draft extend without a graph."""
        _, _, extend_lens, bs = self.batch
        rows = bs * self.values.num_draft_tokens if extend_lens is None else int(extend_lens[:bs].sum())
        pages = (cols + self.values.page_size - 1) // self.values.page_size
        schedule = 2 * (num_sms + 1) if self.values.segment_len else 0
        sizes = workspace_sizes(bs, rows, cols, pages, schedule)
        buffer, workspace = poisoned((sum(sizes),), self.values.req_to_token.device)
        return buffer, (workspace, rows, cols)

    def run_without_a_graph(self, cols: int, num_sms: int = 5) -> None:
        """As a draft extend: the verify mode compares."""
        buffer, of_call = self.workspace(cols, num_sms)
        verified(select(buffer.device.type)).draft_extend_plan(self.values, num_sms)(*self.batch, *of_call)
        assert bool((buffer[:GUARD] == POISON).all()) and bool((buffer[-GUARD:] == POISON).all())


def lengths_for(bs: int, longest: int, generator: torch.Generator) -> torch.Tensor:
    """Lengths of which about half lie at the boundaries of pages, tiles, segments and the index's top k."""
    boundaries = torch.tensor([n for n in BOUNDARIES if n <= longest])
    pick = torch.randint(0, len(boundaries), (bs,), generator=generator)
    anywhere = torch.randint(0, longest + 1, (bs,), generator=generator)
    return torch.where(torch.rand(bs, generator=generator) < 0.5, boundaries[pick], anywhere)


def make(
    device: str,
    mode: int = DECODE,
    bs: int = 3,
    longest: int = 300,
    width: int = 0,
    pool_width: int = 0,
    num_dst: int = 1,
    draft_tokens: int = 4,
    accepted: bool = True,
    leave_out: tuple[str, ...] = (),
    length_dtype: torch.dtype = torch.int64,
    slot_dtype: torch.dtype = torch.int64,
    topk: int = 2048,
    page_size: int = 64,
    pitch: int = 5,
    guard: int = 5,
    aliased: bool = False,
    segment_len: int = 256,
    extra_last: bool = False,
    num_sms: int = 132,
    captured_bs: int = 0,
    row_floor: int = -(1 << 31),
    topk_buckets: tuple[tuple[int, int], ...] = ((64, 2), (256, 4), (2048, 5)),
    lengths: Optional[list[int]] = None,
    seed: int = 0,
) -> Case:
    """width: the tables' columns, enough for `longest` unless given. accepted: draft extend with lengths of its own.
    pitch: elements from the end of a row of page_table_1 to the next. guard: elements before each destination. aliased: the
    lengths are the captured ones, as up to sglang 0.5.13."""
    generator = torch.Generator().manual_seed(seed)
    each = 1 if mode == DECODE else draft_tokens
    captured_bs = captured_bs or bs
    width = width or longest + each + 2
    pool_width = pool_width or width + 3
    seq_lens = lengths_for(bs, longest, generator) if lengths is None else torch.tensor(lengths)
    extend_lens = None
    if mode == DRAFT_EXTEND:
        seq_lens = seq_lens + each
        if accepted:
            extend_lens = torch.randint(0, each + 1, (bs,), generator=generator, dtype=torch.int32)
    rows, pages = captured_bs * each, (width + page_size - 1) // page_size
    # Values with all bits in use, so that a shift that is no floor division shows.
    pool = torch.randint(-(2**31), 2**31, (2 * bs + 1, pool_width), generator=generator).to(torch.int32)
    slots = torch.randperm(2 * bs + 1, generator=generator)[:bs]
    shapes = [
        (captured_bs,),
        (captured_bs + 1,),
        (rows, width),
        (rows,),
        (rows,),
        (rows + 1,),
        (rows, pages),
        (rows + 1,),
        (num_sms, 8),
        (num_sms + 1, 2),
        (rows, 1),
        (rows + 1, 2),
    ]
    pitches = {2: width + pitch, 6: pages + 1}
    destinations, buffers = [], []
    for number in range(num_dst):
        pairs = [
            None if name in leave_out else poisoned(shape, device, pitches.get(at, 0), guard + (1 if at == 9 else number))
            for at, (name, shape) in enumerate(zip(NAMES, shapes))
        ]
        destinations.append([None if pair is None else pair[1] for pair in pairs])
        buffers.append([torch.empty(0, device=device) if pair is None else pair[0] for pair in pairs])

    def plan_of(name, *shape):
        if name in leave_out:
            return None
        return torch.randint(1, 1 << 30, shape, dtype=torch.int32, generator=generator).to(device)

    values = Values(
        pool.to(device),
        captured_bs,
        rows,
        draft_tokens,
        topk,
        page_size,
        segment_len,
        extra_last,
        plan_of("flashmla_num_splits", rows + 1),
        plan_of("flashmla_metadata", num_sms, 8),
        row_floor,
        topk_buckets,
    )
    batch = (
        seq_lens.to(length_dtype).to(device),
        slots.to(slot_dtype).to(device),
        None if extend_lens is None else extend_lens.to(device),
        bs,
    )
    case = Case(mode, values, destinations, buffers, batch)
    if aliased:
        captured = destinations[0][0]
        captured[:bs] = batch[0]
        case.batch = (captured, *batch[1:])
    return case
