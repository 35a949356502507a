"""`sglang-nsa-fused bench replay`: its options, and the way from them to a table."""

import importlib.util
import itertools
from pathlib import Path
from typing import Annotated, Callable, Iterable

import typer

from sglang_nsa_fused.tools.bench.servers import CACHES, NO_GPU

KINDS = ("draft", "verify", "extend")
INTERRUPTED = 130  # exit status


def numbers(text: str) -> list[int]:
    """ "1,4,16", "1-64" (1, 2, 4, ..., 64), or both."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or int(first) < 1 or (last and (not last.isdigit() or int(last) < int(first))):
            raise typer.BadParameter(f"expected numbers as in 1,4,16 or 1-64 (doubling), got {text!r}")
        value = int(first)
        while value <= int(last or first):
            found.append(value)
            value *= 2
    return found


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        if wrong := [name for name in found if name not in known]:
            raise typer.BadParameter(f"expected some of {','.join(known)}, got {wrong[0]!r}")
        return found

    return parse


Option = typer.Option


def replay(
    kind: Annotated[list, Option(parser=names(KINDS), help="Refreshes: draft, verify, extend.")] = "draft,verify,extend",
    draft_steps: Annotated[list, Option(parser=numbers, help="--speculative-num-steps of a server.")] = "4",
    bs: Annotated[list, Option(parser=numbers, help="Batch sizes, as 1,4,16 or 1-64 (doubling).")] = "1-64",
    length: Annotated[list, Option(parser=numbers, help="Tokens of each request.")] = "512,131072",
    cache: Annotated[list, Option(parser=names(CACHES), help="KV caches: bf16, fp8 (with FlashMLA's metadata).")] = "bf16",
    width: Annotated[list, Option(parser=numbers, help="--context-length of a server.")] = "163840",
    in_graph: Annotated[bool, Option("--in-graph", help="Also with the launch as a node of the graph.")] = False,
    samples: Annotated[int, Option(min=10, help="Host times of each case and side.")] = 100,
    json: Annotated[Path | None, Option(help="Result file, written after each case.")] = None,
    plot: Annotated[Path | None, Option(help="PNG or SVG: host time by batch.")] = None,
    commit: Annotated[str | None, Option(hidden=True)] = None,
) -> None:
    """Time each refresh of metadata on this GPU and this sglang, plugin off and on, without a model; and the memory it holds.

    Exit status 1 where something failed, 130 after Ctrl-C; what was measured is kept.
    """
    if max(length) + max(draft_steps) + 1 > min(width):
        raise typer.BadParameter(f"--length {max(length)} and its draft tokens do not fit --width {min(width)}")
    if min(draft_steps) < 2:
        raise typer.BadParameter("--draft-steps: with one draft step there is no metadata to replay")
    if max(draft_steps) > 17:
        raise typer.BadParameter(
            f"--draft-steps: expected at most 17, one launch serves 16 step backends, got {max(draft_steps)}"
        )
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("matplotlib is missing: pip install matplotlib")
    import torch
    from rich.console import Console

    from sglang_nsa_fused.plugin import Unsupported
    from sglang_nsa_fused.tools.bench import record
    from sglang_nsa_fused.tools.bench.refreshes import Case, Classes, Results, run

    console = Console(width=150, highlight=False)

    def fail(finding: object, status: int = 1) -> None:
        console.print(f"FAILED {finding}", markup=False)
        raise typer.Exit(status)

    if not torch.cuda.is_available():
        fail(NO_GPU)
    try:
        classes = Classes()
    except Unsupported as error:
        fail(error)
    results = Results(json, record.head("replay", commit), classes.release.drop_wide_table is None)
    grid = [Case(*one) for one in itertools.product(kind, draft_steps, bs, length, width, cache)]
    if in_graph:
        grid += [case._replace(in_graph=True) for case in grid if classes.may_enter_graph(case.kind)]
    try:
        run(grid, samples, results, classes, console)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory: lower --bs, --length or --width ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        fail("interrupted; what was measured is kept", INTERRUPTED)
    finally:
        if results.cases:
            console.print(results.table)
            if json:
                console.print(f"wrote {json}")
            if plot:
                from sglang_nsa_fused.tools.bench.plots import host_by_batch

                host_by_batch(results.head, results.cases, plot)
