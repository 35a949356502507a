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

    def draft_extend_plan(values: Values, num_sms: int) -> Callable:
        assert engine.draft_extend_plan is not None
        generate = engine.draft_extend_plan(values, num_sms)

        def refresh(seq_lens, req_pool_indices, extend_lens, bs, workspace, rows, cols) -> None:
            pages = (cols + values.page_size - 1) // values.page_size
            parts = workspace_sizes(bs, rows, cols, pages, 2 * (num_sms + 1) if values.segment_len else 0)
            planned, table, real_table, lens, cu_lens, expanded, nsa_lens, nsa_cu_lens = workspace.split_with_sizes(parts)
            schedule = planned.view(-1, 2) if values.segment_len else None
            table, real_table = table.view(rows, cols), real_table.view(rows, pages)
            destination = Destination(lens, cu_lens, table, nsa_lens, expanded, nsa_cu_lens, real_table, None, None, schedule)

            def run(*batch) -> None:
                generate(*batch, workspace, rows, cols)

            of_batch = _generation(values._replace(bs=bs, rows=rows))
            _compared(run, of_batch, reference.DRAFT_EXTEND, [destination])(seq_lens, req_pool_indices, extend_lens, bs)

        return refresh

    return engine._replace(
        copy_plan=copy_plan if engine.copy_plan else None,
        generate_plan=generate_plan if engine.generate_plan else None,
        draft_extend_plan=draft_extend_plan if engine.draft_extend_plan else None,
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
