"""How the benchmarks time what the host and the GPU do, and count the memory that is held."""

import gc
import statistics
import time
import warnings
from typing import Callable

import torch

CYCLES_PER_US = 1980  # of an H100 at its highest clock; at a lower one the backlog is longer


def host_us(run: Callable, calls: int = 40) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - start) / calls / 1e3


def gpu_us(run: Callable, calls: int, host_us: float) -> float:
    """Behind a backlog of twice the time that the host takes for these calls, so that the GPU never waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES_PER_US * (2 * calls * host_us + 500)))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls * 1e3


def launches(run: Callable) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def copy_rate(moved_bytes: int = 1 << 31) -> float:
    """Bytes per microsecond of a device-to-device copy that moves so many, counting bytes read and written."""
    source = torch.randint(0, 1 << 30, (moved_bytes // 8,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = [gpu_us(lambda: target.copy_(source), 4, host_us=20) for _ in range(10)]
    return moved_bytes / statistics.median(times)


def host_us_each(run: Callable, calls: int) -> list[float]:
    """Each call on an idle GPU, so that one that waits for the GPU waits for its own work alone."""
    found = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        run()
        found.append((time.perf_counter_ns() - start) / 1e3)
    return found


def gpu_busy(run: Callable, calls: int) -> tuple[float, float]:
    """(microseconds, count) of all kernels and copies of a call, whatever lies between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times = [e.device_time for e in profile.events() if e.device_type.name == "CUDA"]
    return sum(times) / calls, len(times) / calls


def syncs(run: Callable) -> int:
    """How often a call waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def allocated() -> int:
    """Bytes of GPU memory that torch's allocator has given out and that are still in use."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
