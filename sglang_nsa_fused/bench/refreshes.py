"""The metadata path alone, on upstream's real classes without a model: draft, verify and draft extend, off and on."""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterable, NamedTuple

import torch
from rich import box
from rich.progress import track
from rich.table import Table

from sglang_nsa_fused import backends, bare, plugin
from sglang_nsa_fused.bench import record
from sglang_nsa_fused.bench.record import SIDES
from sglang_nsa_fused.bench.replay import KINDS
from sglang_nsa_fused.bench.timing import copy_rate, gpu_busy_us, host_us_each, launches, syncs
from sglang_nsa_fused.settings import Settings

LARGE = 50_000_000  # bytes moved, more than the L2 cache holds, from which on a share of the copy rate means something
ROUND = 10  # calls of one side before the other's
CAPTION = "sglang → plugin, medians; MB: what must move at least; % of copy: of the speed at which as many bytes are copied"


class Case(NamedTuple):
    kind: str
    draft_steps: int
    bs: int
    length: int
    cache: str  # an fp8 one has FlashMLA's tile metadata

    @property
    def name(self) -> str:
        return f"{self.kind}-n{self.draft_steps}-bs{self.bs}-len{self.length}" + "-flashmla" * (self.cache == "fp8")

    @property
    def moved_bytes(self) -> int:
        """What must move at least: each request's live columns read once, and written to each of its rows, as are pages."""
        rows = 1 if self.kind == "draft" else self.draft_steps + 1
        columns = self.length + (0 if self.kind == "draft" else self.draft_steps + 1)
        return 4 * self.bs * (columns + rows * (columns + columns // 64))


class Classes:
    """Both sides' classes of the installed sglang. Raises plugin.Unsupported."""

    def __init__(self, device: str = "cuda"):
        self.device, (self.release, version) = device, plugin.find_release()
        self.module = bare.import_upstream(self.release, device)
        upstream = getattr(self.module, self.release.backend), getattr(self.module, self.release.multi_step)
        fused = backends.subclasses(self.release, plugin.import_backend(self.release), version, Settings(True, True, None))
        self.of = dict(zip(SIDES, (upstream, fused)))


def draft(classes: Classes, side: str, pool, case: Case) -> Callable:
    multi = bare.multi_step_backend(
        classes.of[side], classes.release, classes.device, pool, case.draft_steps, [case.bs], case.cache == "fp8"
    )
    batch = bare.forward_batch(multi, list(range(1, case.bs + 1)), [case.length] * case.bs, case.bs)
    if classes.release.out_graph:
        return lambda: multi.init_forward_metadata_out_graph(batch)
    return lambda: multi.init_forward_metadata_replay_cuda_graph(batch, case.bs)


def graph(classes: Classes, side: str, pool, case: Case, mode: str) -> Callable:
    more = case.draft_steps + 1, mode, [case.bs], case.cache == "fp8"
    backend = bare.graph_backend(classes.of[side][0], classes.module, classes.release, classes.device, pool, *more)
    lengths = [case.length + (case.draft_steps + 1) * (mode != "TARGET_VERIFY")] * case.bs
    batch = bare.graph_batch(backend, classes.module, mode, list(range(1, case.bs + 1)), lengths, case.bs)
    if classes.release.out_graph:
        batch = SimpleNamespace(**batch, batch_size=case.bs)
        return lambda: backend.init_forward_metadata_out_graph(batch)
    return lambda: backend.init_forward_metadata_replay_cuda_graph(**batch)


def verify(classes: Classes, side: str, pool, case: Case) -> Callable:
    return graph(classes, side, pool, case, "TARGET_VERIFY")


def extend(classes: Classes, side: str, pool, case: Case) -> Callable:
    """With a graph where the release's server captures one, else without."""
    if classes.release.out_graph and classes.release.draft_extend:
        return graph(classes, side, pool, case, "DRAFT_EXTEND_V2")
    verify(classes, side, pool, case)  # as in a server, where its capture compares the planners
    flashmla, tokens = case.cache == "fp8", case.draft_steps + 1
    backend = bare.step_backend(classes.of[side][0], classes.release, classes.device, pool, tokens, flashmla)
    slots, lengths = list(range(1, case.bs + 1)), [case.length + tokens] * case.bs
    batch = bare.draft_extend_batch(backend, classes.module, "DRAFT_EXTEND_V2", slots, lengths)
    return lambda: backend.init_forward_metadata(batch)


REFRESHES = dict(zip(KINDS, (draft, verify, extend), strict=True))


def measure(classes: Classes, pool, case: Case, samples: int) -> dict[str, dict[str, list[float]]]:
    """metric -> side -> samples; the sides in turn."""
    runs = {side: REFRESHES[case.kind](classes, side, pool, case) for side in SIDES}
    for run in runs.values():
        for _ in range(5):
            run()
    found = {metric: {side: [] for side in SIDES} for metric in ("host_us", "gpu_us", "launches", "syncs")}
    for number in range(max(samples // ROUND, 1)):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            found["host_us"][side] += host_us_each(runs[side], ROUND)
    for _ in range(3):
        for side, run in runs.items():
            found["gpu_us"][side].append(gpu_busy_us(run, 10))
    for side, run in runs.items():
        found["launches"][side].append(launches(run))
        found["syncs"][side].append(syncs(run))
    return found


class Results:
    """Cases as they come: for the table, and for a result file that holds them all so far."""

    def __init__(self, path: Path | None, head: dict):
        self.path, self.head, self.cases = path, head, []
        self.table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption=CAPTION, caption_justify="left")
        self.table.add_column("refresh", no_wrap=True)
        for column in ("host us", "times", "GPU us", "GPU operations", "syncs", "MB", "% of copy"):
            self.table.add_column(column, justify="right", no_wrap=True)

    def add(self, case: Case, found: dict, copy_rate: Callable[[int], float]) -> None:
        """copy_rate: of so many bytes moved -> bytes per microsecond."""
        large = case.moved_bytes > LARGE
        share = case.moved_bytes / statistics.median(found["gpu_us"]["ours"]) / copy_rate(case.moved_bytes) if large else None
        row = [case.name]
        for metric, sides in found.items():
            upstream, ours = (statistics.median(sides[side]) for side in SIDES)
            more = {"spread": {side: record.spread(sides[side]) for side in SIDES}} if metric.endswith("_us") else {}
            more |= {"bytes": case.moved_bytes} if metric == "gpu_us" else {}
            more |= {"share_of_copy_rate": round(share, 3)} if share and metric == "gpu_us" else {}
            self.cases.append(record.case(case.name, metric, upstream, ours, len(sides["ours"]), **more))
            row.append(" → ".join(f"{value:.1f}" if metric.endswith("_us") else f"{value:.0f}" for value in (upstream, ours)))
            if metric == "host_us":
                row.append(f"{upstream / ours:.1f}")
        self.table.add_row(*row, f"{case.moved_bytes / 1e6:.2f}", f"{share:.0%}" if share else "")
        if self.path:
            record.write(self.path, self.head, cases=self.cases)


def run(cases: Iterable[Case], width: int, samples: int, results: Results, classes: Classes, console) -> None:
    """width: columns of the table of slots, and with it of upstream's page tables."""
    cases = list(cases)
    rows, columns = max(case.bs for case in cases) + 1, width + 4 + max(case.draft_steps for case in cases) + 1
    pool = torch.randint(0, 1 << 24, (rows, columns), dtype=torch.int32, device="cuda")
    for case in track(cases, console=console, transient=True):
        results.add(case, measure(classes, pool, case, samples), copy_rate)
