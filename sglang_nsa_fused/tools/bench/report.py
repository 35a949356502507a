"""What a comparison of servers came to: the result file, the table, and what one must know to read it."""

from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from sglang_nsa_fused.tools.bench import record
from sglang_nsa_fused.tools.bench.compare import BETTER_LARGER, GAIN, LEAST_ROUNDS, LEVEL, LOSS, METRICS
from sglang_nsa_fused.tools.bench.record import SIDES
from sglang_nsa_fused.tools.bench.servers import Failed, OutOfMemory

WIDTH = 120
LOG_LINES = 5  # of a server's log, behind an error
UNITS = {"table_bytes": 2**20}  # that the table shows a metric in
OF_SERVERS = ("peak_mib", "table_bytes")  # measured once for each server
STYLES = {GAIN: "green", LOSS: "red"}

console = Console(stderr=True, highlight=False, width=WIDTH, soft_wrap=True)  # for all but the table


class Result:
    def __init__(self, path: Path):
        self.path, self.head, self.cases, self.same_tokens = path, {}, [], {}

    def write(self) -> None:
        record.write(self.path, self.head | {"same_tokens": self.same_tokens}, cases=self.cases)

    def show(self, plot: Path | None) -> int:
        """Prints the table, and draws. The exit status: 1 where tokens differ."""
        if not self.cases:
            say("nothing was measured")
            return 0
        Console(highlight=False, width=WIDTH).print(table(self.cases))
        for note in notes(self.cases, self.same_tokens):
            say(note)
        say(f"results in {self.path}")
        if plot:
            from sglang_nsa_fused.tools.bench.plots import latency_and_host

            for path in latency_and_host(self.head, self.cases, plot):
                say(f"picture in {path}")
        differing = [name for name, one in self.same_tokens.items() if one["same"] is False]
        for name in differing:
            say(f"FAILED {name}: the tokens of off and on differ: {self.same_tokens[name]['why']}", style="red")
        return int(bool(differing))


def say(text: str, style: str = "") -> None:
    console.print(text, markup=False, style=style)


def say_failed(error: Failed) -> None:
    first, *rest = str(error).splitlines()
    if isinstance(error, OutOfMemory):
        first += ": lower --mem-fraction, --layers, --experts, --length or --concurrency, or give --one-at-a-time"
    if rest:  # where the log is, and how it ends
        first += f"; from {rest[0].removeprefix('--- ')}:"
    say(f"FAILED {first}", style="red")
    for line in [line for line in rest[1:] if line.strip()][-LOG_LINES:]:
        say(f"  {line}")


def table(cases: list[dict]) -> Table:
    """cases: as `compare.rows` gives them, those of a refresh behind their whole case."""
    look = {"box": box.SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "collapse_padding": True}
    found = Table("", "off (p10-p90)", "on (p10-p90)", "off/on (p10-p90)", "p", "", **look)
    group, case = None, ""
    for one in cases:
        if group != (group := (one.get("concurrency"), one.get("input_tokens"))):
            case = one["name"]
            found.add_row(f"[bold]{case}[/], {one['samples']} round{'s' * (one['samples'] != 1)}")
        part = one["name"].removeprefix(case).removeprefix("-")
        what = f"{part} {METRICS[one['metric']]}".lstrip() + " (+)" * (one["metric"] in BETTER_LARGER)
        unit = UNITS.get(one["metric"], 1)
        values = [f"{number(one[side] / unit)} ({extent([value / unit for value in one['spread'][side]])})" for side in SIDES]
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f} ({extent(one['ratio_spread'])})"
        p = f"{one['p']:.3f}" if one["p"] >= 0.001 else "<0.001"
        found.add_row(f"  {what}", *values, ratio, p, one["verdict"], style=STYLES.get(one["verdict"], ""))
    return found


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def extent(values: list[float] | None) -> str:
    return "" if values is None else "-".join(map(number, values))


def notes(cases: list[dict], same_tokens: dict[str, dict]) -> list[str]:
    timed = {one["name"].rpartition("-")[0] for one in cases if one["metric"] == "host_us"}
    probed = any(one["metric"] == "peak_mib" for one in cases)
    untimed = {one["name"] for one in cases if probed and one["metric"] == "tokens_per_s"} - timed
    found = ["(+): larger is better."] if any(one["metric"] in BETTER_LARGER for one in cases) else []
    found += [
        f"A gain or a loss is a difference with p below {LEVEL}, by Wilcoxon's signed-rank test over the rounds; of "
        f"{round(1 / LEVEL)} rows without any difference one shows such a p by chance."
    ]
    if any(one["samples"] < LEAST_ROUNDS and one["metric"] not in OF_SERVERS for one in cases):
        found.append(f"Fewer than {LEAST_ROUNDS} rounds cannot show a difference.")
    if same := [name for name, one in same_tokens.items() if one["same"]]:
        found.append(f"The same tokens on both sides: {', '.join(same)}.")
    found += [f"No host time of refreshes in {name}: no batch had all its requests." for name in sorted(untimed)]
    return found + [f"Tokens not compared in {name}: {one['why']}." for name, one in same_tokens.items() if one["same"] is None]


@contextmanager
def progress(runs: int):
    """A bar of so many; yields what advances it by one run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("waiting for servers", total=runs)
        yield lambda name: bar.update(task, advance=1, description=name)
