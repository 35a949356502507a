"""Opt-in: compares what each replay writes with the reference, for a user who wants to see it on their own server.

Every replay then waits for the GPU, so this is for a test, not for production.
"""

from collections.abc import Callable, Sequence

import torch

from sglang_nsa_fused import reference
from sglang_nsa_fused.kernels import Engine, workspace_sizes
from sglang_nsa_fused.plan import Destination, Values

NAMES = Destination._fields


def verified(engine: Engine) -> Engine:
    """The same engine, whose every copy and generation raises RuntimeError where it differs from the reference."""

    def copy_plan(mode: int, destinations: Sequence) -> Callable:
        assert engine.copy_plan is not None
        return _compared(engine.copy_plan(mode, destinations), _copy, mode, destinations)

    def generate_plan(mode: int, values: Values, destinations: Sequence) -> Callable:
        assert engine.generate_plan is not None
        return _compared(engine.generate_plan(mode, values, destinations), _generation(values), mode, destinations)

    def generate_draft_extend(seq_lens, req_pool_indices, extend_lens, bs, req_to_token, workspace, rows, cols, *sizes):
        draft_tokens, topk, page_size, segment_len, extra_last, num_sms, row_floor = sizes
        pages = (cols + page_size - 1) // page_size
        parts = workspace_sizes(bs, rows, cols, pages, 2 * (num_sms + 1) if segment_len else 0)
        planned, table, real_table, lens, cu_lens, expanded, nsa_lens, nsa_cu_lens = torch.split_with_sizes(workspace, parts)
        schedule = planned.view(-1, 2) if segment_len else None
        table, real_table = table.view(rows, cols), real_table.view(rows, pages)
        destination = Destination(lens, cu_lens, table, nsa_lens, expanded, nsa_cu_lens, real_table, paged_mqa_schedule=schedule)
        values = Values(req_to_token, bs, rows, draft_tokens, topk, page_size, segment_len, extra_last, row_floor=row_floor)

        def generate(*batch) -> None:
            assert engine.generate_draft_extend is not None
            engine.generate_draft_extend(*batch, req_to_token, workspace, rows, cols, *sizes)

        compared = _compared(generate, _generation(values), reference.DRAFT_EXTEND, [destination])
        compared(seq_lens, req_pool_indices, extend_lens, bs)

    return engine._replace(
        copy_plan=copy_plan if engine.copy_plan else None,
        generate_plan=generate_plan if engine.generate_plan else None,
        generate_draft_extend=generate_draft_extend if engine.generate_draft_extend else None,
    )


def _copy(mode: int, destinations: Sequence) -> Callable:
    return lambda *args: reference.copy(mode, args[:10], destinations, *args[10:])


def _generation(values: Values) -> Callable:
    return lambda mode, destinations: lambda *batch: reference.generate(mode, values, destinations, *batch)


def _compared(run: Callable, expect: Callable, mode: int, destinations: Sequence) -> Callable:
    """run, then what expect(mode, copies of the destinations) makes of the same arguments, and both compared."""

    def refresh(*args) -> None:
        # A source may be its own destination.
        before = [_clone(argument) for argument in args]
        copies = [tuple(map(_clone, destination)) for destination in destinations]
        run(*args)
        expect(mode, copies)(*before)
        for number, (found, expected) in enumerate(zip(destinations, copies)):
            for name, mine, right in zip(NAMES, found, expected):
                if mine is not None and not torch.equal(mine, right):
                    raise RuntimeError(_difference(name, number, mine, right))

    return refresh


def _clone(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _difference(name: str, number: int, found: torch.Tensor, expected: torch.Tensor) -> str:
    places = (found != expected).nonzero().tolist()
    first = tuple(places[0])
    return (
        f"sglang-nsa-fused: {name} of step backend {number} differs from the reference in {len(places)} of "
        f"{found.numel()} places, first at {list(first)}: expected {int(expected[first])}, got {int(found[first])}"
    )
