"""Memory of servers under load, and whether it drifts."""

import contextlib
import re
import statistics
from pathlib import Path

from serving import OFF, ON

from sglang_nsa_fused.tools.bench import process
from sglang_nsa_fused.tools.bench.report import console

DRIFT_MIB = 64  # over the second half of the load
HOST_MEMORY, GPU_MEMORY = "host memory", "GPU memory"


def host_mib(server) -> float:
    """Anonymous memory of the scheduler processes."""
    pids = process.session_members([server])
    titles = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            titles[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
    found = [pid for pid, title in titles.items() if b"sglang::scheduler" in title] or pids
    kib = 0
    for pid in found:
        with contextlib.suppress(OSError):
            kib += int(re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return kib / 1024


def drift(samples: list[tuple[float, float]]) -> float:
    """By how much the second half of (seconds, MiB) rises, along its least-squares line."""
    half = samples[len(samples) // 2 :]
    slope = statistics.linear_regression(*zip(*half)).slope
    return slope * (half[-1][0] - half[0][0])


def memory(pair) -> dict[tuple[str, str], float]:
    """(side, what) -> MiB; the whole GPU's of both sides where the driver does not tell it by process."""
    by_process = process.gpu_memory_by_process()
    members = {server.side: process.session_members([server]) for server in pair}
    on_gpu = {(side, GPU_MEMORY): sum(by_process.get(pid, 0) for pid in pids) for side, pids in members.items()}
    if not all(on_gpu.values()):
        on_gpu = {("both", GPU_MEMORY): process.gpu_memory_mib(pair.off.gpu)}
    return {(server.side, HOST_MEMORY): host_mib(server) for server in pair} | on_gpu


def check_drift(samples: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """Of `memory`, over time."""
    rises = {key: drift(found) for key, found in samples.items()}
    for (side, what), found in samples.items():
        low, high = (pick(mib for _, mib in found) for pick in (min, max))
        console.print(f"  {what}, {side}: {low:.0f} to {high:.0f} MiB, {rises[side, what]:+.1f} over the second half")
    on_gpu = sum(rise for (_, what), rise in rises.items() if what == GPU_MEMORY)
    assert on_gpu < DRIFT_MIB, f"GPU memory drifts: {on_gpu:+.1f} MiB over the second half of the load"
    ours = rises[ON, HOST_MEMORY] - max(0, rises[OFF, HOST_MEMORY])
    assert ours < DRIFT_MIB, f"host memory drifts: {ours:+.1f} MiB more than upstream's over the second half of the load"
