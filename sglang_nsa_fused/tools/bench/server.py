"""`sglang-nsa-fused bench server`: its options, and the way from them to a table."""

import shlex
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Iterator, Optional

import typer

from sglang_nsa_fused.tools.bench import compare, measure, record, report, servers, small_model
from sglang_nsa_fused.tools.bench.process import COMMAND, Failed
from sglang_nsa_fused.tools.bench.replay import INTERRUPTED, numbers
from sglang_nsa_fused.tools.bench.signals import interrupt_on_signals

SMALL = {"context_length": 32_768, "cache": "bf16"}  # of the small model, unless given
OF_SERVERS = ("draft_steps", "cache", "layers", "model_path", "context_length", "server_flags")
OF_RUNS = ("starts", "warmup", "repeats", "output_tokens")
SPECULATING = 48  # requests that sglang runs at a time with speculation, unless told otherwise

Option = typer.Option


def server(
    concurrency: Annotated[list, Option(parser=numbers, help="Requests at a time, as 1,8 or 1-64 (doubling).")] = "1,8",
    length: Annotated[list, Option(parser=numbers, help="Input tokens of a request.")] = "64,4096",
    output_tokens: Annotated[int, Option(min=2, help="Output tokens of a request.")] = 64,
    starts: Annotated[int, Option(min=1, help="Of each side: two servers of one side differ, too.")] = 2,
    warmup: Annotated[int, Option(min=1, help="Runs of each case after a start, before those that count.")] = 2,
    repeats: Annotated[int, Option(min=1, help="Runs of each case after a start.")] = 6,
    layers: Annotated[int, Option(min=1, help="Of the small model with random weights.")] = small_model.LAYERS,
    model_path: Annotated[Optional[str], Option(help="A real model, for sglang's --model-path.")] = None,
    draft_steps: Annotated[int, Option(min=2, max=17, help="--speculative-num-steps of the servers.")] = 4,
    cache: Annotated[
        Optional[str], Option(help="KV cache: bf16, fp8. Unless given bf16, for a real model sglang's choice.")
    ] = None,
    context_length: Annotated[Optional[int], Option(min=64, help="Of the servers.")] = None,
    server_flags: Annotated[str, Option(help="More flags for the servers of both sides, in one string.")] = "",
    port: Annotated[int, Option(min=1, max=65_000, help="Of the servers.")] = 30_000,
    ready_seconds: Annotated[float, Option(min=1, help="Until a server must be up.")] = 900,
    request_seconds: Annotated[float, Option(min=1, help="Until a call must be answered.")] = 900,
    log_dir: Annotated[Optional[Path], Option(help="For the servers' logs; a new folder unless given.")] = None,
    json: Annotated[Optional[Path], Option(help="Result file, written after each start; in --log-dir unless given.")] = None,
    server_command: Annotated[str, Option(hidden=True)] = COMMAND,
) -> None:
    """Compare sglang servers with the plugin off and on: step time, refreshes, memory of the graphs, and the tokens.

    One server at a time, alone on its GPUs, the sides in turn. Exit status 1 where something failed or tokens differ, 130 after
    Ctrl-C; what was measured is kept.
    """
    options = SimpleNamespace(**locals())
    if not model_path:
        vars(options).update({name: getattr(options, name) or value for name, value in SMALL.items()})
    check(options)
    folder = (log_dir or Path(tempfile.mkdtemp(prefix="nsa-bench-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path, failure, status = json or folder / "results.json", None, 0
    found, wrong, unseen = [], [], []
    try:
        for head, *now in measured(folder, options):
            found, wrong, unseen = now
            record.write(path, head, cases=found)
    except Failed as error:
        failure, status = error, 1
    except KeyboardInterrupt:
        failure, status = Failed("interrupted; what was measured is kept"), INTERRUPTED
    if found:
        report.show(found)
    report.console.print(f"results in {path}" if found else "nothing was measured")
    for text in unseen:
        report.console.print(text)
    for text in wrong:
        report.console.print(f"FAILED {text}", style="red")
    if failure:
        report.say_failed(failure)
    raise typer.Exit(status or bool(wrong))


def check(options: SimpleNamespace) -> None:
    """Raises typer.BadParameter."""
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
    for name, path in (("--json", options.json), ("--log-dir", options.log_dir and options.log_dir / "server.log")):
        if path:
            check_writable(name, path)
    if options.cache not in (None, *servers.CACHES):
        raise typer.BadParameter(f"--cache: expected one of {', '.join(servers.CACHES)}, got {options.cache!r}")
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


def measured(folder: Path, options: SimpleNamespace) -> Iterator[tuple[dict, list[dict], list[str], list[str]]]:
    """After each start the head of the result file, and as `compare.cases` of all cases. Raises Failed."""
    interrupt_on_signals()
    machine, release, loader = servers.machine()
    servers.write_probe(folder / "probe")
    if not loader:
        without = f"ours comes by {servers.EXTERNAL}, and refreshes are not measured"
        report.console.print(f"sglang {machine['sglang']} loads no plugins: {without}")
    report.console.print(f"{machine['gpu']}, sglang {machine['sglang']}, torch {machine['torch']}; logs in {folder}")
    cases = [measure.Case(batch, length) for length in options.length for batch in options.concurrency]
    flags = real_flags(release, options) if options.model_path else small_flags(release, folder, options)
    flags += shlex.split(options.server_flags)
    setup = measure.Setup(
        folder, flags, options.port, loader=loader, real=bool(options.model_path), command=options.server_command
    )
    plan = measure.Plan(cases, **{name: getattr(options, name) for name in (*OF_RUNS, "ready_seconds", "request_seconds")})
    head = record.head("server", None, machine, settings={name: getattr(options, name) for name in (*OF_SERVERS, *OF_RUNS)})
    up = []
    with report.progress(2 * options.starts * len(cases)) as step:
        for start in measure.starts(setup, plan, step):
            up.append(start)
            found, wrong, unseen = (sum(of, []) for of in zip(*(compare.cases(case.name, case, up) for case in cases)))
            if len(tables := compare.table_bytes(up)) == len(record.SIDES):
                found.append(record.case("server", "table_bytes", *tables.values(), options.starts))
            if found:
                yield head, found, wrong, unseen


def real_flags(release, options: SimpleNamespace) -> list:
    """What is not given stays sglang's choice."""
    flags = ["--model-path", options.model_path, "--trust-remote-code", *servers.speculation_flags(options.draft_steps)]
    flags += servers.cache_flags(release, options.cache) if options.cache else []
    flags += ["--context-length", options.context_length] if options.context_length else []
    most = max(options.concurrency)
    return flags + (["--max-running-requests", most] if most > SPECULATING else [])


def small_flags(release, folder: Path, options: SimpleNamespace) -> list:
    model, most = small_model.write(folder / "model", options.layers), max(options.concurrency)
    requests = [(most, max(options.length))]
    flags = servers.flags(release, options.draft_steps, options.cache, most)
    flags += servers.size_flags(model, options.context_length, max(16, most))
    return flags + ["--max-total-tokens", servers.total_tokens(requests, options.output_tokens)]
