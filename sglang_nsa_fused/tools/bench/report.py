"""What a comparison of servers came to, in a table, and what one must know to read it."""

from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.table import Table

from sglang_nsa_fused.tools.bench.compare import METRICS, same_tokens
from sglang_nsa_fused.tools.bench.process import Failed, OutOfMemory
from sglang_nsa_fused.tools.bench.record import SIDES

WIDTH = 120
LOG_LINES = 5  # of a server's log, behind an error
UNITS = {"table_bytes": 2**20}  # that the table shows a metric in

console = Console(stderr=True, highlight=False, markup=False, width=WIDTH, soft_wrap=True)  # for all but the table


def show(cases: list[dict]) -> None:
    look = {"box": box.SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "collapse_padding": True}
    columns = "", "off (p10-p90)", "on (p10-p90)", "off/on", "medians of the starts, off", "on", "tokens the same"
    table = Table(*columns, **look)
    for one in cases:
        unit = UNITS.get(one["metric"], 1)
        spread = one.get("spread", {side: [] for side in SIDES})
        values = [number(one[side] / unit) + extent(spread[side]) for side in SIDES]
        starts = [", ".join(map(number, one["processes"][side])) if "processes" in one else "" for side in SIDES]
        same = same_tokens(one) if one["metric"] == "step_ms" else ""
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}"
        table.add_row(f"{one['name']} {METRICS[one['metric']]}", *values, ratio, *starts, same)
    Console(highlight=False, width=2 * WIDTH if not Console().is_terminal else None).print(table)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def extent(values: list[float]) -> str:
    return f" ({'-'.join(map(number, values))})" if values else ""


def say_failed(error: Failed) -> None:
    first, *rest = str(error).splitlines()
    if isinstance(error, OutOfMemory):
        first += ": lower --layers, --length or --concurrency, or --mem-fraction-static in --server-flags"
    if rest:  # where the log is, and how it ends
        first += f"; from {rest[0].removeprefix('--- ')}:"
    console.print(f"FAILED {first}", style="red")
    for line in [line for line in rest[1:] if line.strip()][-LOG_LINES:]:
        console.print(f"  {line}")


@contextmanager
def progress(steps: int):
    """A bar of so many; yields what advances it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("waiting for a server", total=steps)
        yield lambda name: bar.update(task, advance=1, description=name)
