"""The plugin's main job without a model and without a server: upstream's real classes, plugin off and on."""

import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_nsa_fused import backends, bare, kernels, plugin, stand_ins
from sglang_nsa_fused.settings import Settings

# Views and allocations move no data; they cost host time, which is measured, and no operation.
_NO_DATA = ("aten::slice", "aten::select", "aten::view", "aten::empty", "aten::alias", "aten::t", "aten::unsqueeze",
            "aten::expand", "aten::as_strided", "aten::detach", "aten::lift_fresh", "aten::_local_scalar_dense")


class _Operations(TorchDispatchMode):
    """Counts the operations that torch carries out on the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name not in _NO_DATA
        return func(*args, **(kwargs or {}))


@dataclass
class Side:
    name: str
    multi: object
    host_us: list[float] = field(default_factory=list)
    operations: int = 0

    def replay(self, batch, device: str) -> None:
        start, spent = time.perf_counter_ns(), stand_ins.Kernels.spent
        bare.replay(self.multi, batch)
        # Without what stands in for a GPU's kernels on a CPU.
        self.host_us.append((time.perf_counter_ns() - start - (stand_ins.Kernels.spent - spent)) / 1e3)
        if device == "cuda":
            torch.cuda.synchronize()


def run(steps: int, draft_steps: int, most: int, longest: int, flashmla: bool, console: Console) -> int:
    """Replays `steps` speculative steps on both sides and prints one table. Returns the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    release, version = plugin.find_release()
    module = bare.import_upstream(release, device)
    classes = getattr(module, release.backend), getattr(module, release.multi_step)
    fused = backends.subclasses(release, plugin.import_backend(release), version, Settings(True, False, None))
    with bare.gpu(module, device):
        capture_bs = [bs for bs in (1, 2, 4, 8, 16, 32, 64, 128) if bs < most] + [most]
        width = longest + draft_steps + 1
        table = torch.randperm((2 * most + 1) * width).to(torch.int32).view(-1, width).to(device)
        sides = [
            Side(name, bare.multi_step_backend(cls, release, device, table, draft_steps, capture_bs, flashmla))
            for name, cls in (("upstream", classes), ("sglang-nsa-fused", fused))
        ]
        compared = 0
        for slots, lengths in track(
            list(bare.requests(steps, most, longest)), description=f"{steps} steps", console=console, transient=True
        ):
            bs = next(size for size in capture_bs if size >= len(slots))
            batches = [bare.forward_batch(side.multi, slots, lengths, bs) for side in sides]
            for side, batch in zip(sides, batches):
                side.replay(batch, device)
            live = torch.tensor(lengths + [1] * (bs - len(lengths)), device=device)
            found, differing = _compare(sides, bs, live, release, draft_steps)
            compared += found
            if differing:
                console.print(f"[red]batch {bs}, lengths {lengths}: {', '.join(differing)} differ")
                return 1
        for side in sides:
            side.operations = _operations(side, bare.forward_batch(side.multi, slots, lengths, bs), device)
        console.print(_table(sides, device, version, compared, steps, draft_steps))
        return 0


def _compare(sides: list[Side], bs: int, live: torch.Tensor, release, draft_steps: int) -> tuple[int, list[str]]:
    """(how many fields were compared, which differ).

    Upstream leaves schedule and top-k plan of backends 0-2 stale above three steps, and in some releases every schedule.
    """
    differing = []
    count = 0
    for number, pair in enumerate(zip(*(side.multi.attn_backends for side in sides))):
        left, right = (bare.fields(backend.decode_cuda_graph_metadata[bs], live) for backend in pair)
        forgotten = draft_steps > 3 and number < 3
        if forgotten or not release.draft_schedule:
            left.pop("paged_mqa_schedule_metadata", None)
        if forgotten:
            left.pop("topk_v2_plan", None)
        for name, tensor in left.items():
            count += 1
            if not torch.equal(tensor, right[name]):
                differing.append(f"{name} of backend {number}")
    return count, differing


def _operations(side: Side, batch, device: str) -> int:
    """Kernels and copies of one replay on a GPU; on a CPU torch's operations and each call of the native library."""
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            bare.replay(side.multi, batch)
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    with _Operations() as operations:
        bare.replay(side.multi, batch)
    return operations.count + (side.name != "upstream" and kernels.select(device).name == "native")


def _table(sides, device, version, compared, steps, draft_steps) -> Table:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    table = Table(title=f"draft replay, {draft_steps} draft steps, on {name}, sglang {version}")
    table.add_column("")
    for side in sides:
        table.add_column(side.name, justify="right")
    table.add_row("copy", "upstream's", kernels.select(device).name)
    table.add_row("launches per replay" if device == "cuda" else "CPU operations per replay",
                  *(str(side.operations) for side in sides))
    table.add_row("host time per replay, median", *(f"{statistics.median(side.host_us):.0f} us" for side in sides))
    table.add_row(f"fields compared over {steps} replays", "", f"{compared}, all equal")
    return table
