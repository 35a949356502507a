"""Small runs of an engine against the reference, once before it is chosen. Raise RuntimeError where they differ."""

import itertools
from types import SimpleNamespace
from typing import Callable

import torch

from sglang_nsa_fused import reference

BS, WIDTH = 3, 150


def copy(copy_plan: Callable, device: str) -> None:
    columns, draw = 131, torch.Generator().manual_seed(0)
    shapes = [(BS,), (BS + 1,), (BS, WIDTH), (BS,), (BS,), (BS + 1,), (BS, 4), (BS + 1,), (2, 8), (5, 2)]
    sources = [torch.randint(1, 1 << 30, shape, dtype=torch.int32, generator=draw).to(device) for shape in shapes]
    sizes = (BS, columns, columns, BS)
    # A kernel of its own for up to four. All are loaded here, since none may be in a capture.
    for num_dst in (2, 5):
        got, expected = ([_poisoned(shapes, device) for _ in range(num_dst)] for _ in range(2))
        copy_plan(reference.DECODE, got)(*sources, *sizes)
        reference.copy(reference.DECODE, sources, expected, *sizes)
        _compare("copy", sum(got, []), sum(expected, []))


def generate(generate_plan: Callable, device: str) -> None:
    draft_tokens = 2
    draw = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 1 << 20, (BS + 1, WIDTH), dtype=torch.int32, generator=draw).to(device)
    seq_lens = torch.tensor([0, 64, 129], device=device)
    slots = torch.tensor([2, 0, 3], device=device)
    for mode in (reference.DECODE, reference.TARGET_VERIFY, reference.DRAFT_EXTEND):
        rows = BS if mode == reference.DECODE else BS * draft_tokens
        shapes = [(BS,), (BS + 1,), (rows, WIDTH), (rows,), (rows,), (rows + 1,), (rows, 3), None, None, (5, 2), (rows, 1)]
        shapes += [(rows + 1, 2)]
        values = SimpleNamespace(
            req_to_token=pool,
            bs=BS,
            rows=rows,
            num_draft_tokens=draft_tokens,
            nsa_index_topk=100,
            page_size=64,
            segment_len=64,
            extra_last=False,
            num_splits=None,
            tile_metadata=None,
            row_floor=0,
            topk_buckets=((10, 1), (100, 2)),
        )
        # A kernel of its own for one destination, and for those without page_table_1.
        for num_dst, wide in itertools.product((1, 2), (True, False)):
            there = [shape if wide or field != 2 else None for field, shape in enumerate(shapes)]
            got, expected = ([_poisoned(there, device) for _ in range(num_dst)] for _ in range(2))
            generate_plan(mode, values, got)(seq_lens, slots, None, BS)
            reference.generate(mode, values, expected, seq_lens, slots, None, BS)
            _compare("generation", sum(got, []), sum(expected, []))


def _poisoned(shapes: list, device: str) -> list:
    return [None if shape is None else torch.full(shape, -7, dtype=torch.int32, device=device) for shape in shapes]


def _compare(what: str, got: list, expected: list) -> None:
    if not all(mine is None or torch.equal(mine, right) for mine, right in zip(got, expected)):
        raise RuntimeError(f"its self-check of the {what} does not match the reference")
