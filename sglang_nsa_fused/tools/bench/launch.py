"""From the options of `bench server` to the servers of both sides."""

import shlex
from pathlib import Path
from types import SimpleNamespace

from sglang_nsa_fused import releases
from sglang_nsa_fused.tools.bench import rounds, servers, small_model
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM
from sglang_nsa_fused.tools.bench.report import console
from sglang_nsa_fused.tools.bench.rounds import Book, Options
from sglang_nsa_fused.tools.bench.servers import Failed
from sglang_nsa_fused.tools.bench.sides import Attached, Setup, server_info

SPECULATING = 48  # requests that sglang runs at a time with speculation, unless told otherwise


def attached(urls: tuple[str, str]) -> tuple[dict[str, Attached], dict]:
    """(side -> server, what they run on). Raises Failed."""
    targets = {side: Attached(side, url.rstrip("/")) for side, url in zip(SIDES, urls)}
    versions = {side: server_info(target).get("version") for side, target in targets.items()}
    if versions[UPSTREAM] != versions[OURS]:
        raise Failed(
            f"--attach: expected servers of one sglang, got {versions[UPSTREAM]} and {versions[OURS]}; start both with one"
        )
    console.print(
        "attached: refreshes and peak memory are not measured, and whether the plugin is active is not checked: "
        "look for its line in the log of ON_URL"
    )
    return targets, {"gpu": None, "sglang": versions[OURS], "torch": None}


def launchable() -> dict:
    """This machine, as `servers.machine`, fit for servers. Raises Failed."""
    machine = servers.machine()
    if machine["gpu"] is None:
        raise Failed(servers.NO_GPU)
    if release_of(machine) is None:
        raise Failed(f"sglang {machine['sglang']} is not supported; supported are {releases.supported_versions()}")
    if not machine["loader"]:
        console.print(
            f"sglang {machine['sglang']} loads no plugins: ours comes by {servers.EXTERNAL}, "
            "and refreshes and peak memory are not measured"
        )
    return machine


def release_of(machine: dict) -> releases.Release | None:
    return releases.find(machine["sglang"]) or releases.newest(machine["sglang"])


def prepare(folder: Path, machine: dict, cases: list, options: SimpleNamespace) -> Setup:
    """folder: for logs, samples and the small model. options: of the command."""
    if machine["loader"]:
        servers.write_probe(folder / "probe")
    of_model = real_flags if options.model_path else small_flags
    console.print(f"{machine['gpu']}, sglang {machine['sglang']}, torch {machine['torch']}; logs in {folder}")
    return Setup(
        folder=folder,
        flags=(*of_model(folder, machine, cases, options), *shlex.split(options.server_flags)),
        port=options.port,
        loader=machine["loader"],
        dense_prefill=bool(options.model_path),
        accept_length=options.simulate_acceptance,
        command=options.server_command,
    )


def real_flags(folder: Path, machine: dict, cases: list, options: SimpleNamespace) -> list:
    """What is not given stays sglang's choice."""
    flags = ["--model-path", options.model_path, "--trust-remote-code", *servers.speculation_flags(options.draft_steps)]
    flags += servers.cache_flags(release_of(machine), options.cache) if options.cache else []
    flags += ["--context-length", options.context_length] if options.context_length else []
    if max(options.concurrency) > SPECULATING:
        flags += ["--max-running-requests", max(options.concurrency)]
    return flags + (["--mem-fraction-static", options.mem_fraction] if options.mem_fraction else [])


def small_flags(folder: Path, machine: dict, cases: list, options: SimpleNamespace) -> list:
    at_once, tokens = max(options.concurrency), servers.total_tokens(cases, options.output_tokens)
    model = small_model.write(folder / "model", options.layers, options.experts)
    flags = servers.flags(release_of(machine), options.draft_steps, options.cache, at_once)
    return flags + servers.size_flags(model, options.context_length, options.mem_fraction, tokens, at_once)


def both(setup: Setup, chosen: Options, book: Book, step, save) -> None:
    """`rounds.interleaved` with both servers at once on the GPU; they are gone when it returns. Raises Failed."""
    targets, memory_before = {side: setup.server(side) for side in SIDES}, servers.gpu_memory_mib()
    try:
        servers.start(list(targets.values()), chosen.ready_seconds)
        for target in targets.values():
            target.check()
        rounds.interleaved(targets, chosen, book, step, save)
    finally:
        servers.stop(list(targets.values()), memory_before)
