"""The metadata path alone, on upstream's real classes without a model: draft, verify and draft extend, off and on.

    python -m benchmarks.replay
"""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Callable, Optional

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import record
from sglang_nsa_fused import backends, bare, plugin
from sglang_nsa_fused.bench.timing import copy_rate, gpu_busy_us, host_us_each, launches, syncs
from sglang_nsa_fused.settings import Settings

CONTEXT = 163_840
LARGE = 50_000_000  # bytes moved, more than the L2 cache holds, from which on a share of the copy rate means something
ROUND = 10  # calls of one side before the other's
SIDES = ("upstream", "ours")


class Classes:
    def __init__(self):
        self.release, version = plugin.find_release()
        self.module = bare.import_upstream(self.release, "cuda")
        upstream = getattr(self.module, self.release.backend), getattr(self.module, self.release.multi_step)
        fused = backends.subclasses(self.release, plugin.import_backend(self.release), version, Settings(True, True, None))
        self.of = {"upstream": upstream, "ours": fused}


def draft(classes: Classes, side: str, pool, draft_steps: int, bs: int, length: int, flashmla: bool) -> Callable:
    multi = bare.multi_step_backend(classes.of[side], classes.release, "cuda", pool, draft_steps, [bs], flashmla)
    batch = bare.forward_batch(multi, list(range(1, bs + 1)), [length] * bs, bs)
    if classes.release.out_graph:
        return lambda: multi.init_forward_metadata_out_graph(batch)
    return lambda: multi.init_forward_metadata_replay_cuda_graph(batch, bs)


def verify(classes: Classes, side: str, pool, draft_steps: int, bs: int, length: int, flashmla: bool) -> Callable:
    backend = bare.graph_backend(
        classes.of[side][0], classes.module, classes.release, "cuda", pool, draft_steps + 1, "TARGET_VERIFY", [bs], flashmla
    )
    batch = bare.graph_batch(backend, classes.module, "TARGET_VERIFY", list(range(1, bs + 1)), [length] * bs, bs)
    if classes.release.out_graph:
        batch = SimpleNamespace(**batch, batch_size=bs)
        return lambda: backend.init_forward_metadata_out_graph(batch)
    return lambda: backend.init_forward_metadata_replay_cuda_graph(**batch)


def extend(classes: Classes, side: str, pool, draft_steps: int, bs: int, length: int, flashmla: bool) -> Callable:
    backend = bare.step_backend(classes.of[side][0], classes.release, "cuda", pool, draft_steps + 1, flashmla)
    lengths = [length + draft_steps + 1] * bs
    batch = bare.draft_extend_batch(backend, classes.module, "DRAFT_EXTEND_V2", list(range(1, bs + 1)), lengths)
    return lambda: backend.init_forward_metadata(batch)


KINDS = {"draft": draft, "verify": verify, "extend": extend}


def moved_bytes(kind: str, draft_steps: int, bs: int, length: int) -> int:
    """What must move at least: each request's live columns read once, and written to each of its rows, as are pages."""
    rows = 1 if kind == "draft" else draft_steps + 1
    columns = length + (0 if kind == "draft" else draft_steps + 1)
    return 4 * bs * (columns + rows * (columns + columns // 64))


def measure(kind: str, classes: Classes, pool, steps: int, bs: int, length: int, flashmla: bool, samples: int) -> dict:
    """metric -> side -> samples; the sides in turn."""
    runs = {side: KINDS[kind](classes, side, pool, steps, bs, length, flashmla) for side in SIDES}
    for run in runs.values():
        for _ in range(5):
            run()
    found = {metric: {side: [] for side in SIDES} for metric in ("host_us", "gpu_us", "launches", "syncs")}
    for _ in range(samples // ROUND):
        for side, run in runs.items():
            found["host_us"][side] += host_us_each(run, ROUND)
    for _ in range(3):
        for side, run in runs.items():
            found["gpu_us"][side].append(gpu_busy_us(run, 10))
    for side, run in runs.items():
        found["launches"][side].append(launches(run))
        found["syncs"][side].append(syncs(run))
    return found


def main(
    kind: Annotated[list[str], typer.Option(help="Of draft, verify and extend.")] = list(KINDS),
    draft_steps: Annotated[list[int], typer.Option(help="Numbers of draft steps, N.")] = [3, 4, 6],
    bs: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 4, 16, 64],
    length: Annotated[list[int], typer.Option(help="Tokens of each request.")] = [512, 131072],
    samples: Annotated[int, typer.Option(help="Host times of each case and side.", min=10)] = 100,
    out: Annotated[Optional[Path], typer.Option(help="Result file.")] = None,
    commit: Annotated[Optional[str], typer.Option(help="Project commit measured; from git unless given.")] = None,
) -> None:
    classes, cases, console = Classes(), [], Console(width=140)
    pool = torch.randint(0, 1 << 24, (max(bs) + 1, CONTEXT + 4 + max(draft_steps) + 1), dtype=torch.int32, device="cuda")
    # Long contexts and FlashMLA's cache once, with four steps.
    grid = [
        (k, n, b, c, f)
        for k in kind
        for n in draft_steps
        for b in bs
        for c in length
        for f in (False, True)
        if n == 4 or (c == min(length) and not f)
        if n in draft_steps
    ]
    table = Table("case", "host us", "", "GPU us", "", "launches", "", "syncs", "", "% of a copy of as many bytes")
    for k, n, b, c, flashmla in track(grid, console=console, transient=True):
        found = measure(k, classes, pool, n, b, c, flashmla, samples)
        name = f"{k}-n{n}-bs{b}-len{c}" + "-flashmla" * flashmla
        moved = moved_bytes(k, n, b, c)
        rate = copy_rate(moved) if moved > LARGE else None
        share = moved / statistics.median(found["gpu_us"]["ours"]) / rate if rate else None
        row = [name]
        for metric, sides in found.items():
            upstream, ours = (statistics.median(sides[side]) for side in SIDES)
            more = {"share_of_copy_rate": round(share, 3)} if share and metric == "gpu_us" else {}
            cases.append(record.case(name, metric, upstream, ours, len(sides["ours"]), **more))
            row += [f"{upstream:.1f}", f"{ours:.1f}"]
        table.add_row(*row, f"{share:.0%}" if share else "")
    console.print(table)
    path = out or record.default_path("replay")
    record.write(path, "replay", cases, commit or record.commit())
    console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
