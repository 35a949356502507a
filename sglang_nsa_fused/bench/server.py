"""`sglang-nsa-fused bench server`: its options, and the way from them to a table."""

import shlex
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Optional

import typer
from rich.console import Console

from sglang_nsa_fused import releases
from sglang_nsa_fused.bench import servers, small_model
from sglang_nsa_fused.bench.record import OURS, SIDES, UPSTREAM
from sglang_nsa_fused.bench.replay import numbers
from sglang_nsa_fused.bench.servers import CACHES, Failed, OutOfMemory

WIDTH = 170
LOG_LINES = 5  # of a server's log, behind an error
SMALL_CONTEXT, SMALL_MEM_FRACTION, SMALL_CACHE = 32_768, 0.9, "bf16"  # of the small model, unless given
INTERRUPTED = 130

Option = typer.Option
console = Console(stderr=True, highlight=False, width=WIDTH)


def server(
    concurrency: Annotated[list, Option(parser=numbers, help="Requests at a time, as 1,8 or 1-64 (doubling).")] = "1,8",
    length: Annotated[list, Option(parser=numbers, help="Input tokens of a request.")] = "64,4096",
    output_tokens: Annotated[int, Option(min=2, help="Output tokens of a request.")] = 64,
    rounds: Annotated[int, Option(min=1, help="Pairs of measurements, for each case; 6 at least to show a difference.")] = 9,
    warmup: Annotated[int, Option(min=0, help="Runs before them, of each case and server.")] = 2,
    repeats: Annotated[int, Option(min=1, help="With --one-at-a-time: runs after each start.")] = 3,
    layers: Annotated[int, Option(min=1, help="Of the small model with random weights.")] = 3,
    experts: Annotated[int, Option(help="Of the small model.")] = small_model.EXPERTS,
    model_path: Annotated[Optional[str], Option(help="A real model, for sglang's --model-path.")] = None,
    draft_steps: Annotated[int, Option(min=2, max=16, help="--speculative-num-steps of the servers.")] = 4,
    cache: Annotated[Optional[str], Option(help="KV cache: bf16, fp8. Unless given bf16, for a real model sglang's choice.")] = None,
    context_length: Annotated[Optional[int], Option(help="Of the servers.")] = None,
    mem_fraction: Annotated[Optional[float], Option(help="--mem-fraction-static of the servers.")] = None,
    simulate_acceptance: Annotated[Optional[float], Option(min=1, help="Accepted length, by SGLANG_SIMULATE_ACC_LEN.")] = None,
    server_flags: Annotated[str, Option(help="More flags for both servers, in one string.")] = "",
    one_at_a_time: Annotated[bool, Option("--one-at-a-time", help="Start a server for each round and side, not two at once.")] = False,
    attach: Annotated[Optional[tuple[str, str]], Option(metavar="OFF_URL ON_URL", help="Running servers, plugin off and on.")] = None,
    read_off: Annotated[Optional[list[Path]], Option(help="Results of sglang's bench_serving, plugin off; measure nothing.")] = None,
    read_on: Annotated[Optional[list[Path]], Option(help="The same, plugin on.")] = None,
    port: Annotated[int, Option(min=1, max=65_532, help="The first of four.")] = 30_000,
    ready_seconds: Annotated[float, Option(help="Until a server must be up.")] = 900,
    request_seconds: Annotated[float, Option(help="Until a request must be answered.")] = 900,
    log_dir: Annotated[Optional[Path], Option(help="For the servers' logs; a new folder unless given.")] = None,
    json: Annotated[Optional[Path], Option(help="Result file, written after each case; in --log-dir unless given.")] = None,
    plot: Annotated[Optional[Path], Option(help="PNG or SVG, both without a suffix: latencies by length, host time by batch.")] = None,
    server_command: Annotated[str, Option(hidden=True)] = servers.COMMAND,
    commit: Annotated[Optional[str], Option(hidden=True)] = None,
) -> None:
    """Compare sglang servers with the plugin off and on: latencies, throughput, step time, memory, and the tokens.

    Latencies are defined as in sglang's bench_serving; the step time is the decode time of a request by its verify steps.
    Exit status 1 where something failed or tokens differ, 130 after Ctrl-C; what was measured is kept.
    """
    options = SimpleNamespace(**locals())
    check(options)
    try:
        from sglang_nsa_fused.bench import compare, drive  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install 'sglang-nsa-fused[bench]'") from error
    for one in (signal.SIGINT, signal.SIGTERM):  # explicitly: a shell's background job ignores the first
        signal.signal(one, servers.interrupt)
    folder = (log_dir or Path(tempfile.mkdtemp(prefix="nsa-bench-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result = Result(json or folder / "results.json")
    status = 0
    try:
        if read_off:
            read(result, options)
        else:
            measure(result, folder, options)
    except Failed as error:
        say_failed(error)
        status = 1
    except KeyboardInterrupt:
        console.print("[red]FAILED[/] interrupted; what was measured is kept")
        status = INTERRUPTED
    raise typer.Exit(result.show(plot) or status)


def check(options: SimpleNamespace) -> None:
    """Raises typer.BadParameter."""
    read, attach, longest = [bool(getattr(options, name)) for name in ("read_off", "read_on")], options.attach, max(options.length)
    if read[0] != read[1]:
        raise typer.BadParameter("--read-off and --read-on: expected both, got one; give a result of the other side too")
    if sum([read[0], bool(attach), options.one_at_a_time]) > 1:
        raise typer.BadParameter("expected one of --attach, --read-off with --read-on, and --one-at-a-time, got several")
    if attach and (wrong := [url for url in attach if not url.startswith(("http://", "https://"))]):
        raise typer.BadParameter(f"--attach: expected two URLs as in http://127.0.0.1:30000, got {wrong[0]!r}")
    if attach and options.simulate_acceptance:
        raise typer.BadParameter("--simulate-acceptance is an environment variable of the server: not with --attach; start yours with it")
    if options.cache not in (None, *CACHES):
        raise typer.BadParameter(f"--cache: expected one of {', '.join(CACHES)}, got {options['cache']!r}")
    try:
        small_model.config(options.layers, options.experts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    context = options.context_length or (None if options.model_path or attach else SMALL_CONTEXT)
    if context and longest + options.output_tokens + options.draft_steps >= context:
        raise typer.BadParameter(f"--length {longest} and --output-tokens do not fit --context-length {context}; give a larger one")


class Result:
    """What goes into the result file and the table."""

    def __init__(self, path: Path):
        self.path, self.head, self.cases, self.same_tokens = path, {}, [], {}

    def write(self) -> None:
        from sglang_nsa_fused.bench import record

        record.write(self.path, self.head | {"same_tokens": self.same_tokens}, self.cases)

    def show(self, plot: Path | None) -> int:
        """The exit status: 1 where tokens differ."""
        from sglang_nsa_fused.bench import plots, report

        if not self.cases:
            console.print("nothing was measured")
            return 0
        Console(highlight=False, width=WIDTH).print(report.table(self.cases))
        for note in report.notes(self.cases, self.same_tokens):
            console.print(note, markup=False)
        console.print(f"results in {self.path}", markup=False, soft_wrap=True)
        if plot:
            for path in plots.latency_and_host(self.head, self.cases, plot):
                console.print(f"picture in {path}", markup=False, soft_wrap=True)
        found = report.differences(self.same_tokens)
        for difference in found:
            console.print(f"FAILED {difference}", markup=False, style="red")
        return int(bool(found))


def say_failed(error: Failed) -> None:
    first, *rest = str(error).splitlines()
    if isinstance(error, OutOfMemory):
        first += ": lower --mem-fraction, --layers, --experts, --length or --concurrency, or give --one-at-a-time"
    if rest:  # the log's name, and its last lines
        first += f"; its log is {rest[0].removeprefix('--- ')}, which ends"
    console.print(f"FAILED {first}", markup=False, style="red", soft_wrap=True)
    for line in [line for line in rest[1:] if line.strip()][-LOG_LINES:]:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def read(result: Result, options: SimpleNamespace) -> None:
    """Raises Failed."""
    from sglang_nsa_fused.bench import record, serving

    off, on = (serving.read(options[name]) for name in ("read_off", "read_on"))
    versions = {(one.get("server_info") or {}).get("version") for one in off + on}
    machine = {"gpu": None, "sglang": versions.pop() if len(versions) == 1 else None, "torch": None}
    result.head = record.head("server", options.commit, machine, mode="bench_serving")
    result.cases = serving.rows(off, on)
    result.write()


def measure(result: Result, folder: Path, options: SimpleNamespace) -> None:
    """Raises Failed, and KeyboardInterrupt; then `result` has what was measured until then."""
    from sglang_nsa_fused.bench import record, rounds
    from sglang_nsa_fused.bench.drive import Case

    names = ("rounds", "warmup", "repeats", "output_tokens", "request_seconds", "ready_seconds")
    cases = [Case(at_once, length) for length in options.length for at_once in options.concurrency]
    chosen = rounds.Options(cases=cases, compared=not options.simulate_acceptance, **{name: getattr(options, name) for name in names})
    book = rounds.Book()

    def save() -> None:
        result.cases = book.rows()
        result.same_tokens = book.same_tokens() if chosen.compared else {}
        if result.cases:
            result.write()

    if options.attach:
        targets, machine = attached(options.attach)
    else:
        machine = launchable(options.server_command)
    mode = "attached" if options.attach else "one-at-a-time" if options.one_at_a_time else "interleaved"
    kept = ("warmup", "output_tokens", "draft_steps", "cache", "layers", "experts", "model_path", "simulate_acceptance", "server_flags")
    settings = {name: getattr(options, name) for name in kept if options.attach is None or name in ("warmup", "output_tokens")}
    settings |= {"repeats": options.repeats} if options.one_at_a_time else {}
    shown = {name: machine[name] for name in ("gpu", "sglang", "torch")}
    result.head = record.head("server", options.commit, shown, mode=mode, settings=settings)
    if not chosen.compared:
        console.print("acceptance is simulated: the tokens of both sides are not compared")
    per_case = chosen.rounds * 2 if options.one_at_a_time else (chosen.warmup + chosen.rounds) * 2
    try:
        with progress(len(cases) * per_case) as step:
            if options.attach:
                rounds.interleaved(targets, chosen, book, step, save)
                return
            setup = prepare(folder, machine, cases, options)
            if options.one_at_a_time:
                rounds.one_at_a_time(setup.server, chosen, book, step, save)
            else:
                both(setup, chosen, book, step, save)
    finally:
        save()


def attached(urls: tuple[str, str]) -> tuple[dict, dict]:
    """(side -> server, machine). Raises Failed."""
    from sglang_nsa_fused.bench.sides import Attached

    targets = {side: Attached(side, url.rstrip("/")) for side, url in zip(SIDES, urls)}
    versions = {side: target.version() for side, target in targets.items()}
    if versions[UPSTREAM] != versions[OURS]:
        raise Failed(f"--attach: expected two servers of one sglang, got {versions[UPSTREAM]} and {versions[OURS]}; start both with one")
    console.print(
        "attached: refreshes and peak memory are not measured, and whether the plugin is active is not checked: "
        "the log of ON_URL must have its line"
    )
    return targets, {"gpu": None, "sglang": versions[OURS], "torch": None}


def launchable(command: str) -> dict:
    """This machine, fit for servers. Raises Failed."""
    machine = servers.machine()
    if machine["gpu"] is None:
        raise Failed("no GPU: torch.cuda.is_available() is False; on a CPU there is `sglang-nsa-fused demo`")
    if releases.find(machine["sglang"]) is None and releases.newest(machine["sglang"]) is None:
        raise Failed(f"sglang {machine['sglang']} is not supported; supported are {releases.supported_versions()}")
    if not machine["loader"]:
        console.print(
            f"sglang {machine['sglang']} loads no plugins: ours comes by {servers.EXTERNAL}, refreshes and peak memory are not measured"
        )
    return machine


def prepare(folder: Path, machine: dict, cases: list, options: SimpleNamespace):
    """How the servers are started."""
    from sglang_nsa_fused.bench.sides import Setup

    release = releases.find(machine["sglang"]) or releases.newest(machine["sglang"])
    servers.write_probe(folder / "probe")
    real, at_once = options.model_path, max(options.concurrency)
    if real:
        flags = ["--model-path", real, "--trust-remote-code", *servers.speculation_flags(options.draft_steps)]
        flags += servers.cache_flags(release, options.cache) if options.cache else []
        for name, value in (("--context-length", options.context_length), ("--mem-fraction-static", options.mem_fraction)):
            flags += [name, value] if value else []
    else:
        small = small_model.write(folder / "model", options.layers, options.experts)
        tokens = servers.total_tokens(cases, options.output_tokens)
        context, fraction = options.context_length or SMALL_CONTEXT, options.mem_fraction or SMALL_MEM_FRACTION
        flags = servers.flags(release, options.draft_steps, options.cache or SMALL_CACHE, at_once)
        flags += servers.size_flags(small, context, fraction, tokens, at_once)
    flags += shlex.split(options.server_flags)
    console.print(f"{machine['gpu']}, sglang {machine['sglang']}, torch {machine['torch']}; logs in {folder}", soft_wrap=True)
    return Setup(
        folder=folder, flags=tuple(flags), port=options.port, loader=machine["loader"], dense_prefill=bool(real),
        accept_length=options.simulate_acceptance, command=options.server_command,
    )  # fmt: skip


def both(setup, chosen, book, step, save) -> None:
    """Both servers at once on the GPU. Raises Failed."""
    from sglang_nsa_fused.bench import rounds

    targets, memory_before = {side: setup.server(side) for side in SIDES}, servers.gpu_memory_mib()
    try:
        servers.start(list(targets.values()), chosen.ready_seconds)
        for target in targets.values():
            target.check()
        rounds.interleaved(targets, chosen, book, step, save)
    finally:
        servers.stop(list(targets.values()), memory_before)


@contextmanager
def progress(runs: int):
    """A bar of so many; yields what advances it by one run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("waiting for servers", total=runs)
        yield lambda name: bar.update(task, advance=1, description=name)
