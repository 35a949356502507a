"""The metadata path alone, on upstream's real classes without a model: draft, verify and draft extend, off and on."""

import gc
import statistics
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import torch
from rich import box
from rich.progress import track
from rich.table import Table

from sglang_nsa_fused.tools import table_memory
from sglang_nsa_fused.tools.bench import record
from sglang_nsa_fused.tools.bench.record import SIDES
from sglang_nsa_fused.tools.bench.timing import allocated, copy_rate, gpu_busy, host_us_each, syncs
from sglang_nsa_fused.tools.refresh import VERIFY, Classes

LARGE = 50_000_000  # bytes moved, more than the L2 cache holds, from which on a share of the copy rate means something
ROUND = 10  # calls of one side before the other's
CAPTION = (
    "sglang → plugin, medians; MiB held: of GPU memory, by the captured metadata; MB: what must move at least; % of copy: of the "
    "speed at which as many bytes are copied"
)


class Case(NamedTuple):
    kind: str
    draft_steps: int
    bs: int
    length: int
    width: int  # --context-length of a server
    cache: str  # an fp8 one has FlashMLA's tile metadata
    in_graph: bool = False  # the plugin's launch is a node of the graph

    @property
    def name(self) -> str:
        name = f"{self.kind}-n{self.draft_steps}-bs{self.bs}-len{self.length}-width{self.width}"
        return name + "-flashmla" * (self.cache == "fp8") + "-graph" * self.in_graph

    @property
    def columns(self) -> int:
        """Of the table of slots, as a server makes it."""
        return table_memory.columns(self.width, self.draft_steps + 1)

    def moved_bytes(self, wide: bool) -> int:
        """What must move at least. wide: each request's live columns read once, and written to each of its rows, as are pages;
        else a sector of 32 bytes of each page read, and the pages written."""
        rows = 1 if self.kind == "draft" else self.draft_steps + 1
        columns = self.length + (0 if self.kind == "draft" else self.draft_steps + 1)
        pages = -(-columns // 64)
        return self.bs * (4 * (columns + rows * (columns + pages)) if wide else 32 * pages + 4 * rows * pages)


def backend_of(classes: Classes, side: str, pool, case: Case):
    """The backend, captured where it has a graph. pool: int32 [case.bs + 1, case.columns]."""
    graph = classes.has_graph(case.kind)
    if not graph:
        backend_of(classes, side, pool, case._replace(kind=VERIFY))  # as in a server, where its capture compares the planners
    return classes.backend(side, case.kind, graph, pool, case.draft_steps, [case.bs], case.cache == "fp8")


def refresh_of(classes: Classes, backend, case: Case) -> Callable:
    """What refreshes the metadata of such a batch."""
    slots, lengths = list(range(1, case.bs + 1)), [case.length] * case.bs
    return classes.refresh(backend, case.kind, classes.has_graph(case.kind), slots, lengths, case.bs)


def held(classes: Classes, side: str, pool, case: Case) -> tuple[object, int]:
    """(the captured backend, the GPU memory that it came to)."""
    small = case._replace(bs=1)
    backend_of(classes, side, pool[:2], small)  # what a process makes once is there from then on
    before = allocated()
    backend = backend_of(classes, side, pool, case)
    return backend, allocated() - before


def measure(classes: Classes, case: Case, samples: int) -> dict[str, dict[str, list[float]]]:
    """metric -> side -> samples; the sides in turn. A node of the graph counts as GPU time, not as a launch."""
    pool = torch.randint(0, 1 << 24, (case.bs + 1, case.columns), dtype=torch.int32, device="cuda")
    made = {side: held(classes, side, pool, case) for side in SIDES}
    runs = {side: refresh_of(classes, backend, case) for side, (backend, _) in made.items()}
    whole = dict(runs)  # on the GPU
    if case.in_graph:
        graph, outside = classes.enter_graph(made["ours"][0], case.kind, case.bs), runs["ours"]
        whole["ours"] = lambda: (outside(), graph())
    for run in runs.values():
        for _ in range(5):
            run()
    found = {metric: {side: [] for side in SIDES} for metric in ("host_us", "gpu_us", "launches", "syncs")}
    for number in range(max(samples // ROUND, 1)):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            found["host_us"][side] += host_us_each(runs[side], ROUND)
    for _ in range(3):
        for side, run in runs.items():
            found["launches"][side].append(gpu_busy(run, 10)[1])
            found["gpu_us"][side].append(gpu_busy(whole[side], 10)[0])
    for side, run in runs.items():
        found["syncs"][side].append(syncs(run))
    return found | {"table_bytes": {side: [table_bytes] for side, (_, table_bytes) in made.items()}}


class Results:
    """Cases as they come: for the table, and for a result file that holds them all so far."""

    def __init__(self, path: Path | None, head: dict, wide: bool = True):
        """wide: whether the plugin's side has the wide page table, too."""
        self.path, self.head, self.wide, self.cases = path, head, wide, []
        self.table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption=CAPTION, caption_justify="left")
        self.table.add_column("refresh", no_wrap=True)
        for column in ("host us", "times", "GPU us", "GPU operations", "syncs", "MiB held", "MB", "% of copy"):
            self.table.add_column(column, justify="right", no_wrap=True)

    def add(self, case: Case, found: dict, copy_rate: Callable[[int], float]) -> None:
        """copy_rate: of so many bytes moved -> bytes per microsecond."""
        moved = case.moved_bytes(self.wide)
        share = moved / statistics.median(found["gpu_us"]["ours"]) / copy_rate(moved) if moved > LARGE else None
        row = [case.name]
        for metric, sides in found.items():
            upstream, ours = (statistics.median(sides[side]) for side in SIDES)
            more = {"spread": {side: record.spread(sides[side]) for side in SIDES}} if metric.endswith("_us") else {}
            more |= {"bytes": moved} if metric == "gpu_us" else {}
            more |= {"share_of_copy_rate": round(share, 3)} if share and metric == "gpu_us" else {}
            self.cases.append(record.case(case.name, metric, upstream, ours, len(sides["ours"]), **more))
            row.append(" → ".join(shown(metric, value) for value in (upstream, ours)))
            if metric == "host_us":
                row.append(f"{upstream / ours:.1f}")
        self.table.add_row(*row, f"{moved / 1e6:.2f}", f"{share:.0%}" if share else "")
        if self.path:
            record.write(self.path, self.head, cases=self.cases)


def shown(metric: str, value: float) -> str:
    if metric == "table_bytes":
        return f"{value / 2**20:.1f}"
    return f"{value:.1f}" if metric.endswith("_us") else f"{value:.0f}"


def run(cases: Iterable[Case], samples: int, results: Results, classes: Classes, console) -> None:
    for case in track(list(cases), console=console, transient=True):
        found = measure(classes, case, samples)
        gc.collect()  # the backends, of which the largest take gigabytes
        torch.cuda.empty_cache()
        results.add(case, found, copy_rate)
