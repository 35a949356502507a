"""The plugin's main job without a model and without a server: upstream's real classes, plugin off and on."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Callable

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_nsa_fused import backends, kernels, plugin
from sglang_nsa_fused.settings import Settings
from sglang_nsa_fused.tools import bare, torch_forms

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


@dataclass
class Setting:
    """What all three refreshes share."""

    release: object
    module: object
    classes: dict[str, tuple[type, type]]  # side -> step backend, multi-step backend
    device: str
    pool: torch.Tensor
    draft_steps: int
    capture_bs: list[int]
    flashmla: bool

    @property
    def draft_tokens(self) -> int:
        return self.draft_steps + 1


# Of one side: (slots, lengths, bs) -> (a refresh to run, then each metadata to compare, the live tokens of its rows, and
# the fields that upstream leaves stale).
Refresh = Callable[[list[int], list[int], int], tuple[Callable[[], None], Callable[[], Iterator]]]


def draft(setting: Setting, side: str) -> Refresh:
    args = (setting.release, setting.device, setting.pool, setting.draft_steps, setting.capture_bs, setting.flashmla)
    multi = bare.multi_step_backend(setting.classes[side], *args)

    def prepare(slots, lengths, bs):
        batch = bare.forward_batch(multi, slots, lengths, bs)
        live = lengths + [1] * (bs - len(lengths))

        def stale(number: int) -> tuple[str, ...]:
            """Above three draft steps upstream forgets the plans of step backends 0-2, in some releases all schedules."""
            if setting.draft_steps > 3 and number < 3:
                return "paged_mqa_schedule_metadata", "topk_v2_plan"
            return () if setting.release.draft_schedule else ("paged_mqa_schedule_metadata",)

        return lambda: bare.replay(multi, batch), lambda: (
            (backend.decode_cuda_graph_metadata[bs], live, stale(number)) for number, backend in enumerate(multi.attn_backends)
        )

    return prepare


def verify(setting: Setting, side: str) -> Refresh:
    backend = bare.graph_backend(
        setting.classes[side][0],
        setting.module,
        setting.release,
        setting.device,
        setting.pool,
        setting.draft_tokens,
        "TARGET_VERIFY",
        setting.capture_bs,
        setting.flashmla,
    )

    def prepare(slots, lengths, bs):
        batch = bare.graph_batch(backend, setting.module, "TARGET_VERIFY", slots, lengths, bs)
        padded = lengths + [1] * (bs - len(lengths))
        live = [length + 1 + row for length in padded for row in range(setting.draft_tokens)]
        return lambda: bare.replay_graph(backend, batch), lambda: (
            (metadata, live, ()) for metadata in [backend.forward_metadata]
        )

    return prepare


def extend(setting: Setting, side: str) -> Refresh:
    backend = bare.step_backend(
        setting.classes[side][0], setting.release, setting.device, setting.pool, setting.draft_tokens, setting.flashmla
    )

    def prepare(slots, lengths, bs):
        grown = [length + setting.draft_tokens for length in lengths]
        batch = bare.draft_extend_batch(backend, setting.module, "DRAFT_EXTEND_V2", slots, grown)
        live = [length + 1 + row for length in lengths for row in range(setting.draft_tokens)]
        return lambda: backend.init_forward_metadata(batch), lambda: (
            (metadata, live, ()) for metadata in [backend.forward_metadata]
        )

    return prepare


REFRESHES = {"draft steps": draft, "target verify": verify, "draft extend": extend}


@dataclass
class Side:
    prepare: Refresh
    host_us: list[float] = field(default_factory=list)
    operations: int = 0

    def run(self, refresh: Callable, device: str) -> None:
        start, spent = time.perf_counter_ns(), torch_forms.Kernels.spent
        refresh()
        # Without what stands in for a GPU's kernels on a CPU.
        self.host_us.append((time.perf_counter_ns() - start - (torch_forms.Kernels.spent - spent)) / 1e3)
        if device == "cuda":
            torch.cuda.synchronize()


def run(steps: int, draft_steps: int, most: int, longest: int, flashmla: bool, console: Console) -> int:
    """Runs `steps` speculative steps on both sides and prints one table. Returns the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    release, version = plugin.find_release()
    module = bare.import_upstream(release, device)
    upstream = getattr(module, release.backend), getattr(module, release.multi_step)
    fused = backends.subclasses(release, plugin.import_backend(release), version, Settings(True, False, None))
    capture_bs = [bs for bs in (1, 2, 4, 8, 16, 32, 64, 128) if bs < most] + [most]
    width = longest + 2 * draft_steps + 2
    pool = torch.randperm((2 * most + 1) * width).to(torch.int32).view(-1, width).to(device)
    classes = {"upstream": upstream, "plugin": fused}
    setting = Setting(release, module, classes, device, pool, draft_steps, capture_bs, flashmla)

    table = _table(device, version, draft_steps)
    with bare.gpu(module, device):
        finding = _run_all(setting, steps, most, longest, table, console)
    console.print(finding or table)
    return 1 if finding else 0


def _run_all(setting: Setting, steps: int, most: int, longest: int, table: Table, console: Console) -> str:
    """Adds a row for each refresh. Returns what differs, "" for nothing."""
    device = setting.device
    for name, refresh in REFRESHES.items():
        sides = {side: Side(refresh(setting, side)) for side in setting.classes}
        compared = 0
        for slots, lengths in track(list(bare.requests(steps, most, longest)), description=name, console=console, transient=True):
            bs = next(size for size in setting.capture_bs if size >= len(slots))
            results = []
            for side in sides.values():
                once, result = side.prepare(slots, lengths, bs)
                side.run(once, device)
                results.append(result)
            found, differing = _compare(*results, device)
            compared += found
            if differing:
                return f"[red]{name}, batch {bs}, lengths {lengths}: {', '.join(differing)} differ"
        for side in sides.values():
            side.operations = _operations(side.prepare(slots, lengths, bs)[0], device, side is sides["plugin"])
        hosts = (f"{statistics.median(side.host_us):.0f}" for side in sides.values())
        table.add_row(name, *hosts, *(str(side.operations) for side in sides.values()), str(compared))
    return ""


def _compare(off: Callable, on: Callable, device: str) -> tuple[int, list[str]]:
    """(how many fields were compared, which differ)."""
    differing, count = [], 0
    for number, ((left, live, stale), (right, *_)) in enumerate(zip(off(), on())):
        live = torch.tensor(live, device=device)
        expected, found = bare.both_fields(left, right, live)
        for name in stale:
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
