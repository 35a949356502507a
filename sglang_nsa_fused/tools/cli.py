"""Command line: doctor, demo, bench, patch."""

import json
from typing import Annotated, Optional

import typer
from rich.console import Console

from sglang_nsa_fused import __doc__ as about
from sglang_nsa_fused import __version__
from sglang_nsa_fused.tools.bench.commands import app as bench_app

app = typer.Typer(add_completion=False, no_args_is_help=True)
main = app


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sglang-nsa-fused {__version__}")
        raise typer.Exit


@app.callback(help=about)
def _sglang_nsa_fused(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    context_length: Annotated[Optional[int], typer.Option(min=1, help="--context-length of a server.")] = None,
    max_bs: Annotated[Optional[int], typer.Option(min=1, help="Its largest captured batch size.")] = None,
    draft_tokens: Annotated[Optional[int], typer.Option(min=2, help="--speculative-num-draft-tokens of it.")] = None,
) -> None:
    """Check whether the plugin would be active here; exit status 0 only if it would.

    With --context-length, --max-bs and --draft-tokens also: what the page tables of such a server take, without and with it.
    """
    server = {"--context-length": context_length, "--max-bs": max_bs, "--draft-tokens": draft_tokens}
    missing = [option for option, value in server.items() if value is None]
    if 0 < len(missing) < len(server):
        raise typer.BadParameter(f"expected all of {', '.join(server)}, or none; {' and '.join(missing)} is missing")
    from sglang_nsa_fused.plugin import Unsupported
    from sglang_nsa_fused.tools.doctor import examine, page_tables

    findings = []
    console = Console(soft_wrap=True, highlight=False)
    for finding in examine():  # some of them import torch and sglang, which takes seconds
        findings.append(finding)
        if not as_json:
            state = "[green]ok    [/]" if finding.ok else "[red]FAILED[/]"
            console.print(f"{state} {finding.check:<14}", end=" ")
            console.print(finding.detail, markup=False)
    found = {finding.check: {"ok": finding.ok, "detail": finding.detail} for finding in findings}
    if not missing:
        try:
            held, why = page_tables(context_length, max_bs, draft_tokens), ""
        except (Unsupported, ValueError) as error:
            held, why = [], str(error)
        sizes = {one.runner: {"upstream_bytes": one.upstream, "ours_bytes": one.ours} for one in held}
        found["page tables"] = sizes or {"detail": why}
        if not as_json:
            detail = f": {why}" if why else ", GiB on each GPU without → with the plugin"
            console.print(f"page tables of the graphs{detail}", markup=False)
            for one in held:
                console.print(f"       {one.runner:<14} {one.upstream / 2**30:6.2f} → {one.ours / 2**30:.2f}")
    if as_json:
        print(json.dumps(found, indent=1))
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Speculative steps to replay.")] = 200,
    draft_steps: Annotated[int, typer.Option(min=2, max=17, help="--speculative-num-steps of the server.")] = 4,
    requests: Annotated[int, typer.Option(min=1, max=256, help="Most requests at a time.")] = 8,
    longest: Annotated[int, typer.Option(min=1, max=1 << 20, help="Longest request, in tokens.")] = 8192,
    flashmla: Annotated[bool, typer.Option(help="With FlashMLA's tile metadata, as for an fp8 cache.")] = False,
) -> None:
    """Refresh metadata on sglang's real classes, plugin off and on, without a model; compare and time both."""
    from sglang_nsa_fused.plugin import Unsupported
    from sglang_nsa_fused.tools.demo import run

    console = Console()
    try:
        raise typer.Exit(run(steps, draft_steps, requests, longest, flashmla, console))
    except Unsupported as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error


patch_app = typer.Typer(no_args_is_help=True, help="The plugin loader for sglang 0.5.7 to 0.5.10.post1, which have none.")
app.add_typer(patch_app, name="patch")
app.add_typer(bench_app, name="bench")


def _patch(action) -> None:
    from sglang_nsa_fused.tools.patch import Installed, Refused

    try:
        print(action(Installed()))
    except Refused as refused:
        typer.echo(str(refused), err=True)
        raise typer.Exit(1) from refused


@patch_app.command()
def apply() -> None:
    """Put the loader into the installed sglang's scheduler.py."""
    _patch(lambda sglang: sglang.change(apply=True))


@patch_app.command()
def revert() -> None:
    """Take it out again: the file is then sglang's, byte for byte."""
    _patch(lambda sglang: sglang.change(apply=False))


@patch_app.command()
def status() -> None:
    """Say which: loader (sglang's own), patched, unpatched or modified."""
    _patch(lambda sglang: f"sglang {sglang.version}: {sglang.state()}")
