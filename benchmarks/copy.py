"""The copy alone: ours against individual copies and against upstream's fused kernel, interleaved in one run.

python -m benchmarks.copy
"""

import statistics
from pathlib import Path
from typing import Annotated, Callable, Optional

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.record import commit as project_commit
from benchmarks.record import default_path
from sglang_nsa_fused import ReplayPlan, backends, plugin, reference
from sglang_nsa_fused.settings import Settings
from sglang_nsa_fused.tools import bare
from sglang_nsa_fused.tools.bench import record
from sglang_nsa_fused.tools.bench.servers import NO_GPU
from sglang_nsa_fused.tools.bench.timing import copy_rate, gpu_us, host_us, launches

WIDTH = 163_845  # upstream's captured row pitch for a context of 163,840 and five draft tokens


class Workload:
    """One source set as upstream precomputes it, and the captured destinations of num_dst step backends."""

    def __init__(self, num_dst: int, bs: int, columns: int, flashmla: bool):
        self.num_dst, self.bs, self.columns = num_dst, bs, columns
        pages = (columns + 63) // 64

        def numbers(*shape):
            return torch.randint(1, 1 << 30, shape, dtype=torch.int32, device="cuda")

        def captured():
            return (
                numbers(bs),
                numbers(bs + 1),
                numbers(bs, WIDTH),
                numbers(bs),
                None,
                numbers(bs + 1),
                numbers(bs, (WIDTH + 63) // 64),
                *((numbers(bs + 1), numbers(132, 8)) if flashmla else (None, None)),
            )

        self.sources = (
            numbers(bs),
            numbers(bs + 1),
            numbers(bs, columns),
            numbers(bs),
            None,
            numbers(bs + 1),
            numbers(bs, pages),
            *((numbers(bs + 1), numbers(132, 8)) if flashmla else (None, None)),
        )
        self.destinations = [captured() for _ in range(num_dst)]
        self.sizes = (bs, columns, columns, bs)
        # Read once, written once for each destination; element 0 of cumulative lengths does not move.
        elements = sum(t.numel() for t in self.sources if t is not None) - 2
        self.bytes = 4 * elements * (1 + num_dst)

    def ours(self) -> Callable[[], None]:
        plan = ReplayPlan(reference.DECODE, [(*destination, None) for destination in self.destinations])
        sources = (*self.sources, None)
        return lambda: plan.copy(*sources, *self.sizes)

    def copies(self) -> Callable[[], None]:
        sources = (*self.sources, None)
        destinations = [(*destination, None) for destination in self.destinations]
        return lambda: reference.copy(reference.DECODE, sources, destinations, *self.sizes)

    def jit(self) -> Callable[[], None]:
        """As upstream calls it: three at a time where there are three, the rest one by one."""
        from sglang.jit_kernel.fused_metadata_copy import fused_metadata_copy_cuda, fused_metadata_copy_multi_cuda

        bs, columns, _, size = self.sizes

        def without_expanded(tensors):
            return (*tensors[:4], *tensors[5:])

        multi = without_expanded(self.sources)
        for destination in self.destinations[:3]:
            multi += without_expanded(destination)
        rest = self.destinations[3 if self.num_dst >= 3 else 0 :]

        def run():
            if self.num_dst >= 3:
                fused_metadata_copy_multi_cuda(*multi, bs, columns, size)
            for destination in rest:
                fused_metadata_copy_cuda(*self.sources, *destination, reference.DECODE, *self.sizes)

        return run


def measure(workload: Workload, repeats: int) -> dict[str, dict[str, list[float]]]:
    """metric -> side -> samples; the sides in turn, in a new order each time."""
    sides = {"ours": workload.ours(), "copies": workload.copies(), "jit": workload.jit()}
    for run in sides.values():
        run()
    calls = 4 if workload.bytes > 100_000_000 else 20
    found = {metric: {side: [] for side in sides} for metric in ("host_us", "gpu_us")}
    order = list(sides)
    for _ in range(repeats):
        order.append(order.pop(0))
        for side in order:
            host = host_us(sides[side])
            found["host_us"][side].append(host)
            found["gpu_us"][side].append(gpu_us(sides[side], calls, host))
    found["launches"] = {side: [launches(run)] for side, run in sides.items()}
    return found


def copy_part(draft_steps: int, bs: int, columns: int, flashmla: bool, schedule: bool) -> dict[str, Callable]:
    """The draft replay of upstream's multi-step class and of ours, after a precomputation that both are handed ready.

    schedule: off leaves out what upstream's three-way path forgets, so that both do the same work.
    """
    release, version = plugin.find_release()
    module = bare.import_upstream(release, "cuda")
    upstream = getattr(module, release.backend), getattr(module, release.multi_step)
    fused = backends.subclasses(release, plugin.import_backend(release), version, Settings(True, True, None))
    table = torch.randint(1, 1 << 20, (bs + 1, 32768), dtype=torch.int32, device="cuda")
    sides = {}
    for name, classes in (("upstream", upstream), ("ours", fused)):
        is_cuda, module.is_cuda = module.is_cuda, lambda: schedule
        multi = bare.multi_step_backend(classes, release, "cuda", table, draft_steps, [bs], flashmla)
        module.is_cuda = is_cuda
        batch = bare.forward_batch(multi, list(range(1, bs + 1)), [columns] * bs, bs)
        first = multi.attn_backends[0]
        ready = first._precompute_replay_metadata(
            bs, batch.req_pool_indices, batch.seq_lens, batch.seq_lens_cpu, module.ForwardMode.DECODE, None
        )
        first._precompute_replay_metadata = lambda ready=ready, **_: ready
        sides[name] = lambda multi=multi, batch=batch: bare.replay(multi, batch)
    return sides


def copy_part_cases(repeats: int) -> list[dict]:
    cases = []
    for draft_steps, bs, flashmla, schedule in (
        *((steps, bs, False, True) for steps in (3, 4, 5) for bs in (1, 4, 64)),
        *((4, bs, flashmla, False) for bs in (1, 4, 64) for flashmla in (False, True)),
    ):
        sides = copy_part(draft_steps, bs, 512, flashmla, schedule)
        for run in sides.values():
            run()
        times = {side: [] for side in sides}
        for _ in range(repeats):
            for side, run in sides.items():
                times[side].append(host_us(run))
        name = f"copy-part-n{draft_steps}-bs{bs}-len512" + "-flashmla" * flashmla + "-no-schedule" * (not schedule)
        upstream, ours = (statistics.median(times[side]) for side in ("upstream", "ours"))
        cases.append(record.case(name, "host_us", upstream, ours, repeats))
        cases.append(record.case(name, "launches", *(launches(sides[side]) for side in ("upstream", "ours")), 1))
    return cases


def main(
    num_dst: Annotated[list[int], typer.Option(help="Numbers of destinations.")] = [1, 2, 3, 4, 7],
    bs: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 4, 16, 64, 256],
    columns: Annotated[list[int], typer.Option(help="Columns of the page table that move.")] = [512, 4096, 32768, 163840],
    repeats: Annotated[int, typer.Option(help="Rounds; medians are taken over them.")] = 15,
    out: Annotated[Optional[Path], typer.Option(help="Result file.")] = None,
    commit: Annotated[Optional[str], typer.Option(help="Project commit measured; from git unless given.")] = None,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    cases, console = [], Console(width=120)
    rate = copy_rate()
    grid = [(n, b, c, f) for f in (False, True) for n in num_dst for b in bs for c in columns]
    table = Table("case", "host us: copies, jit, ours", "GPU us: copies, jit, ours", "% of copy rate")
    for n, b, c, flashmla in track(grid, console=console, transient=True):
        workload = Workload(n, b, c, flashmla)
        found = measure(workload, repeats)
        name = f"d{n}-bs{b}-len{c}" + ("-flashmla" if flashmla else "")
        share = workload.bytes / statistics.median(found["gpu_us"]["ours"]) / rate
        for opponent in ("copies", "jit"):
            for metric, sides in found.items():
                upstream, ours = statistics.median(sides[opponent]), statistics.median(sides["ours"])
                more = {"share_of_copy_rate": round(share, 3)} if metric == "gpu_us" else {}
                cases.append(record.case(f"vs-{opponent}-{name}", metric, upstream, ours, len(sides["ours"]), **more))
        row = [
            ", ".join(f"{statistics.median(found[m][s]):.1f}" for s in ("copies", "jit", "ours")) for m in ("host_us", "gpu_us")
        ]
        table.add_row(name, *row, f"{share:.0%}")
        del workload
    console.print(table)
    cases += copy_part_cases(2 * repeats)
    for one in cases:
        if one["name"].startswith("copy-part"):
            console.print(f"{one['name']:45} {one['metric']:9} {one['upstream']:8.1f} {one['ours']:8.1f}")
    path = out or default_path("copy", torch.cuda.get_device_name())
    record.write(path, record.head("copy", commit or project_commit(), copy_rate_gb_per_s=round(rate / 1e3)), cases=cases)
    console.print(f"device-to-device copy {rate / 1e3:.0f} GB/s; wrote {path}")


if __name__ == "__main__":
    typer.run(main)
