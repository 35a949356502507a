"""`sglang-nsa-fused bench server`: its options, and the way from them to a table."""

import importlib.util
import shlex
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Optional

import typer

from sglang_nsa_fused.tools.bench import servers, small_model
from sglang_nsa_fused.tools.bench.replay import INTERRUPTED, numbers
from sglang_nsa_fused.tools.bench.servers import CACHES, Failed

SMALL = {"context_length": 32_768, "mem_fraction": 0.9, "cache": "bf16"}  # of the small model, unless given
OF_SERVERS = (
    "draft_steps",
    "cache",
    "layers",
    "experts",
    "model_path",
    "context_length",
    "mem_fraction",
    "simulate_acceptance",
    "server_flags",
)

SMALL_MODELS = ("layers", "experts")
OUTPUTS = ("json", "plot", "log_dir", "commit")

Option = typer.Option


def server(
    context: typer.Context,
    concurrency: Annotated[list, Option(parser=numbers, help="Requests at a time, as 1,8 or 1-64 (doubling).")] = "1,8",
    length: Annotated[list, Option(parser=numbers, help="Input tokens of a request.")] = "64,4096",
    output_tokens: Annotated[int, Option(min=2, help="Output tokens of a request.")] = 64,
    rounds: Annotated[int, Option(min=1, help="Pairs of measurements, for each case; 6 at least to show a difference.")] = 9,
    warmup: Annotated[int, Option(min=0, help="Runs before them, of each case and server.")] = 2,
    repeats: Annotated[int, Option(min=1, help="With --one-at-a-time: runs after each start.")] = 3,
    layers: Annotated[int, Option(min=1, help="Of the small model with random weights.")] = small_model.LAYERS,
    experts: Annotated[int, Option(help="Of the small model.")] = small_model.EXPERTS,
    model_path: Annotated[Optional[str], Option(help="A real model, for sglang's --model-path.")] = None,
    draft_steps: Annotated[int, Option(min=2, max=17, help="--speculative-num-steps of the servers.")] = 4,
    cache: Annotated[
        Optional[str], Option(help="KV cache: bf16, fp8. Unless given bf16, for a real model sglang's choice.")
    ] = None,
    context_length: Annotated[Optional[int], Option(min=64, help="Of the servers.")] = None,
    mem_fraction: Annotated[Optional[float], Option(min=0.01, max=1, help="--mem-fraction-static of the servers.")] = None,
    simulate_acceptance: Annotated[Optional[float], Option(min=1, help="Accepted length, by SGLANG_SIMULATE_ACC_LEN.")] = None,
    server_flags: Annotated[str, Option(help="More flags for both servers, in one string.")] = "",
    one_at_a_time: Annotated[
        bool, Option("--one-at-a-time", help="Start a server for each round and side, not two at once.")
    ] = False,
    attach: Annotated[
        Optional[tuple[str, str]], Option(metavar="OFF_URL ON_URL", help="Running servers, plugin off and on.")
    ] = None,
    read_off: Annotated[
        Optional[list[Path]], Option(help="Results of sglang's bench_serving, plugin off; measure nothing.")
    ] = None,
    read_on: Annotated[Optional[list[Path]], Option(help="The same, plugin on.")] = None,
    port: Annotated[
        int, Option(min=1, max=60_000, help="Of the server without the plugin; the other's is 1000 higher.")
    ] = 30_000,
    ready_seconds: Annotated[float, Option(min=1, help="Until a server must be up.")] = 900,
    request_seconds: Annotated[float, Option(min=1, help="Until a request must be answered.")] = 900,
    log_dir: Annotated[Optional[Path], Option(help="For the servers' logs; a new folder unless given.")] = None,
    json: Annotated[Optional[Path], Option(help="Result file, written after each case; in --log-dir unless given.")] = None,
    plot: Annotated[
        Optional[Path], Option(help="PNG or SVG, both without a suffix: latencies by length, host time by batch.")
    ] = None,
    server_command: Annotated[str, Option(hidden=True)] = servers.COMMAND,
    commit: Annotated[Optional[str], Option(hidden=True)] = None,
) -> None:
    """Compare sglang servers with the plugin off and on: latencies, throughput, step time, memory, and the tokens.

    Latencies are defined as in sglang's bench_serving; the step time is the decode time of a request by its verify steps.
    Exit status 1 where something failed or tokens differ, 130 after Ctrl-C; what was measured is kept.
    """
    options = SimpleNamespace(**locals())
    sources = {name: context.get_parameter_source(name) for name in context.params}
    check_used(options, {name for name, source in sources.items() if source and source.name == "COMMANDLINE"})
    if not (model_path or attach):
        vars(options).update({name: getattr(options, name) or value for name, value in SMALL.items()})
    check(options)
    for package in ("aiohttp", "scipy", *(["matplotlib"] if plot else [])):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"{package} is missing: pip install aiohttp matplotlib 'scipy>=1.9'")
    from sglang_nsa_fused.tools.bench import report

    folder = (log_dir or Path(tempfile.mkdtemp(prefix="nsa-bench-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result, failure, status = report.Result(json or folder / "results.json"), None, 0
    try:
        read(result, options) if read_off else measure(result, folder, options)
    except Failed as error:
        failure, status = error, 1
    except KeyboardInterrupt:
        failure, status = Failed("interrupted; what was measured is kept"), INTERRUPTED
    differ = result.show(plot)
    if failure:
        report.say_failed(failure)
    raise typer.Exit(status or differ)


def check_used(options: SimpleNamespace, given: set[str]) -> None:
    """given: names of options. Raises typer.BadParameter for one that would change nothing."""
    unused = {
        "--read-off": given - {"read_off", "read_on", *OUTPUTS} if options.read_off else (),
        "--attach": given & {*OF_SERVERS, "port", "ready_seconds"} - {"simulate_acceptance"} if options.attach else (),
        "--model-path": given & {*SMALL_MODELS} if options.model_path else (),
        "two servers at once; it is for --one-at-a-time": given & {"repeats"} if not options.one_at_a_time else (),
    }
    for mode, names in unused.items():
        if names:
            raise typer.BadParameter(f"--{min(names).replace('_', '-')} is not for {mode}: leave it out")


def check(options: SimpleNamespace) -> None:
    """Raises typer.BadParameter."""
    if bool(options.read_off) != bool(options.read_on):
        raise typer.BadParameter("--read-off and --read-on: expected both, got one; give results of the other side too")
    if sum(map(bool, (options.read_off, options.attach, options.one_at_a_time))) > 1:
        raise typer.BadParameter("expected one of --attach, --one-at-a-time, and --read-off with --read-on, got several")
    if options.attach:
        if wrong := [url for url in options.attach if not url.startswith(("http://", "https://"))]:
            raise typer.BadParameter(f"--attach: expected two URLs as in http://127.0.0.1:30000, got {wrong[0]!r}")
        if options.simulate_acceptance:
            raise typer.BadParameter("--simulate-acceptance is not for --attach: start your servers with SGLANG_SIMULATE_ACC_LEN")
        if options.attach[0] == options.attach[1]:
            raise typer.BadParameter(f"--attach: expected two servers, got {options.attach[0]} twice")
    for name in ("model_path", "cache"):
        if getattr(options, name) == "":
            raise typer.BadParameter(f"--{name.replace('_', '-')}: expected a value, got an empty one; is a variable unset?")
    if (model := options.model_path or "").startswith(("/", "./", "../", "~")) and not (
        Path(model).expanduser() / "config.json"
    ).is_file():
        raise typer.BadParameter(f"--model-path: expected a folder with a config.json, got {model}")
    try:
        shlex.split(options.server_flags)
    except ValueError as error:
        raise typer.BadParameter(f"--server-flags: {error}, got {options.server_flags!r}") from error
    for name in ("json", "plot"):
        if getattr(options, name):
            check_writable(f"--{name}", getattr(options, name))
    if options.log_dir:
        check_writable("--log-dir", options.log_dir / "server.log")
    if options.cache not in (None, *CACHES):
        raise typer.BadParameter(f"--cache: expected one of {', '.join(CACHES)}, got {options.cache!r}")
    try:
        small_model.config(options.layers, options.experts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    longest, context = max(options.length), options.context_length
    if context and longest + options.output_tokens + options.draft_steps >= context:
        raise typer.BadParameter(
            f"--length {longest} and --output-tokens do not fit --context-length {context}; give a larger one"
        )


def check_writable(option: str, path: Path) -> None:
    """Raises typer.BadParameter, before anything is measured for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise typer.BadParameter(f"{option}: {path} cannot be written: {error.strerror}") from error


def read(result, options: SimpleNamespace) -> None:
    """Raises Failed."""
    from sglang_nsa_fused.tools.bench import record, serving

    off, on = serving.read(options.read_off), serving.read(options.read_on)
    versions = {(one.get("server_info") or {}).get("version") for one in off + on}
    machine = {"gpu": None, "sglang": versions.pop() if len(versions) == 1 else None, "torch": None}
    result.head = record.head("server", options.commit, machine, mode="bench_serving")
    result.cases = serving.rows(off, on)
    result.write()


def measure(result, folder: Path, options: SimpleNamespace) -> None:
    """Raises Failed, and KeyboardInterrupt; `result` then has what was measured until there."""
    from sglang_nsa_fused.tools.bench import launch, record, report, rounds
    from sglang_nsa_fused.tools.bench.drive import Case

    servers.interrupt_on_signals()
    names = ("rounds", "warmup", "repeats", "output_tokens", "request_seconds", "ready_seconds")
    cases = [Case(at_once, length) for length in options.length for at_once in options.concurrency]
    given = {name: getattr(options, name) for name in names}
    chosen, book = rounds.Options(cases=cases, compared=not options.simulate_acceptance, **given), rounds.Book()
    if not chosen.compared:
        report.say("acceptance is simulated: the tokens of both sides are not compared")
    if options.attach:
        targets, machine = launch.attached(options.attach)
    else:
        machine = launch.launchable()
    settings = {name: given[name] for name in ("warmup", "output_tokens")}
    settings |= {} if options.attach else {name: getattr(options, name) for name in OF_SERVERS}
    settings |= {"repeats": options.repeats} if options.one_at_a_time else {}
    mode = "attached" if options.attach else "one-at-a-time" if options.one_at_a_time else "interleaved"
    shown = {name: machine[name] for name in ("gpu", "sglang", "torch")}
    result.head = record.head("server", options.commit, shown, mode=mode, settings=settings)

    def save() -> None:
        result.cases, result.same_tokens = book.rows(), book.same_tokens() if chosen.compared else {}
        if result.cases:
            result.write()

    try:
        with report.progress(2 * len(cases) * (chosen.rounds + (0 if options.one_at_a_time else chosen.warmup))) as step:
            if options.attach:
                return rounds.interleaved(targets, chosen, book, step, save)
            setup = launch.prepare(folder, machine, cases, options)
            if options.one_at_a_time:
                rounds.one_at_a_time(setup.server, chosen, book, step, save)
            else:
                launch.both(setup, chosen, book, step, save)
    finally:
        save()
