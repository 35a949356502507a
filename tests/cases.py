"""Copies with their oracle: every destination lies in a poisoned buffer, and the whole buffer is compared."""

import math
from dataclasses import dataclass, field

import torch

from sglang_nsa_fused import ReplayPlan, reference
from sglang_nsa_fused.verify import NAMES

POISON = -7
GUARD = 5  # elements before each destination: odd, so that nothing is aligned by chance


def poisoned(shape: tuple, device: str, pitch: int = 0, guard: int = GUARD) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, a view of this shape in it), rows `pitch` elements apart."""
    pitch = pitch or shape[-1]
    rows = shape[0] if len(shape) == 2 else 1
    buffer = torch.full((2 * guard + rows * pitch,), POISON, dtype=torch.int32, device=device)
    stride = (pitch, 1) if len(shape) == 2 else (1,)
    return buffer, buffer.as_strided(shape, stride, guard)


@dataclass
class Case:
    mode: int
    sources: list
    destinations: list
    sizes: tuple  # bs, max_len, max_seqlen_k, seqlens_expanded_size
    buffers: list = field(default_factory=list)

    def upstream_args(self) -> tuple:
        """The 23 positional arguments of sglang's function, for the first destination."""
        return (*self.sources[:9], *self.destinations[0][:9], self.mode, *self.sizes)

    def multi_args(self) -> tuple:
        """The 35 positional arguments of sglang's function for three destinations."""
        sets = [self.sources, *self.destinations]
        bs, max_len, _, size = self.sizes
        return (*(t for one in sets for i, t in enumerate(one[:9]) if i != 4), bs, max_len, size)

    def expected(self) -> list[torch.Tensor]:
        """The buffers as the reference leaves them."""
        clones = [[buffer.clone() for buffer in one] for one in self.buffers]
        views = [
            [None if t is None else c.as_strided(t.shape, t.stride(), t.storage_offset()) for t, c in zip(dst, one)]
            for dst, one in zip(self.destinations, clones)
        ]
        reference.copy(self.mode, self.sources, views, *self.sizes)
        return clones

    def check(self, expected: list) -> None:
        for number, (one, right) in enumerate(zip(self.buffers, expected)):
            for name, buffer, oracle in zip(NAMES, one, right):
                assert torch.equal(buffer, oracle), f"{name} of destination {number}"

    def run(self) -> None:
        expected = self.expected()
        ReplayPlan(self.mode, self.destinations).copy(*self.sources, *self.sizes)
        self.check(expected)

    def check_untouched(self) -> None:
        assert all(bool((buffer == POISON).all()) for one in self.buffers for buffer in one)


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """These three rows, with the last beyond 2^31 elements. Only they are touched: on the CPU the gaps never become memory."""
    pitch = 2**30 + 6
    assert len(rows) == 3 and 2 * pitch > 2**31 - 1
    buffer = torch.empty(2 * pitch + rows.shape[1], dtype=torch.int32, device=rows.device)
    return buffer.as_strided(rows.shape, (pitch, 1)).copy_(rows)


def make(
    device: str,
    mode: int = reference.DECODE,
    bs: int = 3,
    columns: int = 65,
    width: int = 0,
    num_dst: int = 1,
    pages: bool = True,
    flashmla: bool = False,
    schedule: bool = False,
    draft_tokens: int = 3,
    source_pitch: int = 0,
    guard: int = GUARD,
    source_guard: int = 0,
    seed: int = 0,
) -> Case:
    """width: the destinations' row pitch in tokens, `columns` + 16 unless given. guards: elements before each tensor."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        size = source_guard + math.prod(shape)
        drawn = torch.randint(1, 1 << 30, (size,), dtype=torch.int32, generator=generator).to(device)
        return drawn[source_guard:].view(shape)

    n = bs if mode == reference.DECODE else bs * draft_tokens
    rows = n if mode != reference.DRAFT_EXTEND else max(n - 1, 0)  # accepted tokens: fewer rows than the captured ones
    size = rows if mode == reference.DRAFT_EXTEND else n
    width = width or columns + 16
    page_columns = (columns + 63) // 64
    table = numbers(rows, max(source_pitch, columns))[:, :columns]
    sources = [
        numbers(bs),
        numbers(bs + 1),
        table,
        numbers(size),
        numbers(size),
        numbers(size + 1),
        numbers(rows, page_columns) if pages else None,
        numbers(size + 1) if flashmla else None,
        numbers(132, 8) if flashmla else None,
        numbers(133, 2) if schedule else None,
    ]
    shapes = [(bs,), (bs + 1,), (n, columns), (n,), (n,), (n + 1,), (n, page_columns), (n + 1,), (132, 8), (133, 2)]
    pitches = {2: width, 6: (width + 63) // 64 + 1}
    destinations, buffers = [], []
    for number in range(num_dst):
        pairs = [
            None if source is None else poisoned(shape, device, pitches.get(at, 0), guard + number if at in pitches else guard)
            for at, (source, shape) in enumerate(zip(sources, shapes))
        ]
        destinations.append([None if pair is None else pair[1] for pair in pairs])
        buffers.append([torch.empty(0, device=device) if pair is None else pair[0] for pair in pairs])
    return Case(mode, sources, destinations, (bs, columns, columns, size), buffers)
