"""The plugin's main job without a model and without a server: upstream's real classes, plugin off and on."""

import contextlib
import io
import statistics
import time
from typing import Callable

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_nsa_fused import kernels
from sglang_nsa_fused.tools import bare, refresh, torch_forms
from sglang_nsa_fused.tools.bench.record import SIDES

# Views and allocations move no data; they cost host time, which is measured, and no operation.
_NO_DATA = (
    "aten::slice",
    "aten::select",
    "aten::view",
    "aten::empty",
    "aten::alias",
    "aten::t",
    "aten::unsqueeze",
    "aten::expand",
    "aten::as_strided",
    "aten::detach",
    "aten::lift_fresh",
    "aten::_local_scalar_dense",
    "aten::split_with_sizes",
)


class _Operations(TorchDispatchMode):
    """Counts the operations that torch carries out on the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name not in _NO_DATA
        return func(*args, **(kwargs or {}))


REFRESHES = {"draft steps": refresh.DRAFT, "target verify": refresh.VERIFY, "draft extend": refresh.EXTEND}


class Side:
    """One refresh of one side; a draft extend without a graph, as in every release it may be."""

    def __init__(self, classes: refresh.Classes, side: str, kind: str, pool, draft_steps: int, capture_bs: list[int], fp8: bool):
        self.classes, self.kind, self.draft_steps, self.graph = classes, kind, draft_steps, kind != refresh.EXTEND
        self.backend = classes.backend(side, kind, self.graph, pool, draft_steps, capture_bs, fp8)
        self.host_us: list[float] = []

    def prepare(self, slots: list[int], lengths: list[int], bs: int) -> Callable[[], None]:
        once = self.classes.refresh(self.backend, self.kind, self.graph, slots, lengths, bs)
        if self.classes.device == "cuda":
            return once

        def quietly():
            with contextlib.redirect_stdout(io.StringIO()):  # upstream prints on every fallback, which is each call here
                once()

        return quietly

    def run(self, once: Callable) -> None:
        start, spent = time.perf_counter_ns(), torch_forms.Kernels.spent
        once()
        # Without what stands in for a GPU's kernels on a CPU.
        self.host_us.append((time.perf_counter_ns() - start - (torch_forms.Kernels.spent - spent)) / 1e3)
        if self.classes.device == "cuda":
            torch.cuda.synchronize()

    def metadata(self, bs: int) -> list:
        """What was refreshed."""
        if self.kind == refresh.DRAFT:
            return [backend.decode_cuda_graph_metadata[bs] for backend in self.backend.attn_backends]
        return [self.backend.forward_metadata]

    def stale(self, number: int) -> tuple[str, ...]:
        """Above three draft steps upstream forgets the plans of step backends 0-2, in some releases all schedules."""
        if self.kind != refresh.DRAFT:
            return ()
        if self.draft_steps > 3 and number < 3:
            return "paged_mqa_schedule_metadata", "topk_v2_plan"
        return () if self.classes.release.draft_schedule else ("paged_mqa_schedule_metadata",)


def run(steps: int, draft_steps: int, most: int, longest: int, flashmla: bool, console: Console) -> int:
    """Runs `steps` speculative steps on both sides and prints one table. Returns the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = refresh.Classes(device, required=False)
    capture_bs = [bs for bs in (1, 2, 4, 8, 16, 32, 64, 128) if bs < most] + [most]
    width = longest + 2 * draft_steps + 2
    pool = torch.randperm((2 * most + 1) * width).to(torch.int32).view(-1, width).to(device)
    table, finding = _table(device, classes.version, draft_steps), ""
    with bare.gpu(classes.release, device):
        for name, kind in REFRESHES.items():
            sides = [Side(classes, side, kind, pool, draft_steps, capture_bs, flashmla) for side in SIDES]
            finding = finding or _run(name, sides, capture_bs, list(refresh.requests(steps, most, longest)), table, console)
    console.print(finding or table)
    return 1 if finding else 0


def _run(name: str, sides: list[Side], capture_bs: list[int], batches: list, table: Table, console: Console) -> str:
    """Adds the row of one refresh. Returns what differs, "" for nothing."""
    compared = 0
    for slots, lengths in track(batches, description=name, console=console, transient=True):
        bs = next(size for size in capture_bs if size >= len(slots))
        for side in sides:
            side.run(side.prepare(slots, lengths, bs))
        padded = lengths + [1] * (bs - len(lengths)) if sides[0].graph else lengths
        found, differing = _compare(*sides, bs, refresh.row_lengths(sides[0].kind, padded, sides[0].draft_steps))
        compared += found
        if differing:
            return f"[red]{name}, batch {bs}, lengths {lengths}: {', '.join(differing)} differ"
    hosts = (f"{statistics.median(side.host_us):.0f}" for side in sides)
    device = sides[0].classes.device
    operations = (_operations(side.prepare(slots, lengths, bs), device, side is sides[1]) for side in sides)
    table.add_row(name, *hosts, *map(str, operations), str(compared))
    return ""


def _compare(off: Side, on: Side, bs: int, live: list[int]) -> tuple[int, list[str]]:
    """(how many fields were compared, which differ)."""
    differing, count = [], 0
    rows = torch.tensor(live, device=off.classes.device)
    for number, (left, right) in enumerate(zip(off.metadata(bs), on.metadata(bs))):
        expected, found = bare.both_fields(left, right, rows)
        for name in off.stale(number):
            expected.pop(name, None)
        count += len(expected)
        differing += [f"{name} of backend {number}" for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    return count, differing


def _operations(refresh: Callable, device: str, ours: bool) -> int:
    """Kernels and copies of one refresh on a GPU; on a CPU torch's operations and each call of the native library."""
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            refresh()
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    with _Operations() as operations:
        refresh()
    return operations.count + (ours and kernels.select(device).name == "native")


def _table(device: str, version: str, draft_steps: int) -> Table:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    table = Table(
        box=box.SIMPLE,
        title=f"{draft_steps} draft steps, {name}, sglang {version}",
        caption=f"host time, median; operations on the {'GPU' if device == 'cuda' else 'CPU'}; "
        f"equal fields; kernel: {kernels.select(device).name}",
    )
    table.add_column("refresh", no_wrap=True)
    for column in ("sglang us", "plugin us", "sglang ops", "plugin ops", "equal"):
        table.add_column(column, justify="right", no_wrap=True)
    return table
