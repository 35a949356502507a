"""A real sglang server with MTP speculative decoding, with the plugin and without it, interleaved in one run on one GPU.

For each configuration the servers of both sides run at the same time on a small DeepSeek-V3.2 with random weights, or with
--starts one at a time, each alone on its GPU, the sides in turn. They get the same greedy requests. Records the time of a
speculative step (step_ms: of the whole request, by its verify steps; decode_step_ms: from one draft to the next), the host time
of each refresh of metadata (draft, verify, draft extend), the GPU time of the draft steps' graph, and hashes of the output ids
and of the draft tokens, which must be the same.

    python -m benchmarks.server
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.record import commit, default_path
from sglang_nsa_fused import releases
from sglang_nsa_fused.tools.bench import record, servers, sides, small_model
from sglang_nsa_fused.tools.bench.probed import Probed, observed
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM
from sglang_nsa_fused.tools.bench.servers import CACHES, Failed, console, gpu_memory_mib

OBSERVED = 2  # runs of each case and server, after those that count


@dataclass(frozen=True)
class Configuration:
    draft_steps: int
    cache: str
    layers: int
    one_core: bool
    within: bool  # both sides in one process
    width: int = 0  # of its servers' context; 0: it is not in the name

    def named(self, case: str) -> str:
        """The name of a case of it, or of its own for "": what is not as in most results stands at the end."""
        more = f"-layers{self.layers}" * (self.layers != small_model.LAYERS) + "-1core" * self.one_core + "-within" * self.within
        width = f"width{self.width}-" * (self.width > 0)
        return f"n{self.draft_steps}-{case}{width}{self.cache}{more}"

    @property
    def name(self) -> str:
        return self.named("")


@dataclass(frozen=True)
class Run:
    """One batch of requests, answered. Times are perf_counter_ns."""

    start: int
    end: int
    steps: int  # verify steps, the most of any request
    ids: str  # output ids as JSON

    @property
    def step_ms(self) -> float:
        return (self.end - self.start) / self.steps / 1e6


class Server(Probed):
    """number: of its pair, from 0; index: of all that are up at once."""

    def __init__(self, side: str, configuration: Configuration, number: int, index: int, args):
        name = f"{configuration.name}-{side}-{number + 1}"
        self.side = side
        env = servers.environment(side == OURS, args.site, args.log_dir / "probe")
        env |= {"SERVER_PROBE_TOGGLE": "1"} if configuration.within else {}
        flags = servers.flags(args.release, configuration.draft_steps, configuration.cache, max(args.batch))
        tokens = args.max_total_tokens or servers.total_tokens(args.case, args.output_tokens)
        model = small_model.write(args.log_dir / f"model-{configuration.layers}", configuration.layers, small_model.EXPERTS)
        flags += servers.size_flags(model, args.context_length, args.mem_fraction, tokens, max(args.batch))
        flags += shlex.split(args.server_flags)
        super().__init__(name, args.port + 2 * index, flags, env, args.log_dir, args.server_command)

    def generate(self, prompts: list, output_tokens: int) -> Run:
        params = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
        start = time.perf_counter_ns()
        answers = self.post("/generate", {"input_ids": prompts, "sampling_params": params})
        end = time.perf_counter_ns()
        steps = max(answer["meta_info"].get("spec_verify_ct", 0) for answer in answers)
        if not steps:
            raise Failed(f"{self.side}: no verify steps: the server does not decode speculatively")
        return Run(start, end, steps, json.dumps([answer["output_ids"] for answer in answers]))

    def check_log(self) -> str:
        """The plugin's line, "" without the plugin. Raises Failed."""
        lines, expected = self.plugin_lines(), int(self.side == OURS)  # there is one scheduler process
        if len(lines) != expected:
            raise Failed(f"{self.side}: expected {expected} line of an active plugin, got {lines}{self.tail()}")
        return "".join(lines)


class Side:
    """Of a server with the plugin that refreshes metadata as upstream does while it is asked for that side."""

    def __init__(self, side: str, server: Server):
        self.side, self.server = side, server

    def __getattr__(self, name: str):
        return getattr(self.server, name)

    def generate(self, prompts: list, output_tokens: int) -> Run:
        upstream_file = self.server.upstream_file
        upstream_file.touch() if self.side == UPSTREAM else upstream_file.unlink(missing_ok=True)
        return self.server.generate(prompts, output_tokens)


Runs = dict[Server | Side, list[Run]]


def pin(up: list[Server]) -> None:
    """All threads of each server to a core of its own, none of them the first; what they start later inherits that."""
    cores = sorted(os.sched_getaffinity(0))[1:]
    if len(cores) < len(up):
        raise Failed(f"--one-core: expected more than {len(up)} cores for so many servers, got {len(cores) + 1}")
    for core, server in zip(cores, up):
        for pid in servers.session_members([server.process]):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), {core})


def drive(up: list[Server | Side], batch: int, length: int, args) -> tuple[Runs, Runs]:
    """The same requests to each server in turn, forth and back: the runs that count, and those that were observed."""
    draw = random.Random(f"{batch} {length}")
    prompts = [[draw.randrange(10, 120_000) for _ in range(length)] for _ in range(batch)]

    def in_turn(times: int) -> Runs:
        runs = {server: [] for server in up}
        for repeat in range(times):
            for server in up if repeat % 2 == 0 else up[::-1]:
                runs[server].append(server.generate(prompts, args.output_tokens))
        return runs

    in_turn(args.warmup)
    runs = in_turn(args.repeats)
    with observed(*up):
        return runs, in_turn(OBSERVED)


def decode_steps(samples: list[dict], runs: list[Run], batch: int) -> list[float]:
    """Milliseconds from one refresh for the draft steps to the next, of full batches within a run."""
    found = []
    for run in runs:
        at = [one["at"] for one in sides.full_batches(samples, run, batch) if one["kind"] == "draft"]
        found += [(one - before) / 1e6 for before, one in itertools.pairwise(sorted(at))]
    return found


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def by_side(of: dict) -> dict[str, list]:
    """The values of each side's servers, in their order."""
    return {side: [value for server, value in of.items() if server.side == side] for side in SIDES}


def result(name: str, metric: str, samples: dict[Server | Side, list[float]], **more) -> dict:
    """Of all samples of a side; processes: the median of each of its servers, which tells how much they differ."""
    of = by_side(samples)
    pooled = {side: list(itertools.chain(*found)) for side, found in of.items()}
    upstream, ours = (statistics.median(pooled[side]) for side in SIDES)
    if len(of[UPSTREAM]) > 1:
        more |= {"processes": {side: [round(statistics.median(values), 3) for values in found] for side, found in of.items()}}
    spread = {side: record.spread(values) for side, values in pooled.items()}
    return record.case(name, metric, upstream, ours, min(map(len, pooled.values())), spread=spread, **more)


def tokens(name: str, runs: Runs, drafts: dict[Server | Side, list]) -> tuple[dict, list[str]]:
    """Hashes of the output ids and draft tokens of each side, and what is wrong with them."""
    outputs = {side: sorted({run.ids for found in of for run in found}) for side, of in by_side(runs).items()}
    rows = by_side(drafts)
    problems = []
    # Where upstream does not repeat itself (its top-k takes tokens in any order, which shows beyond index_topk tokens),
    # there is nothing to compare with.
    repeats_itself = len(outputs[UPSTREAM]) == 1
    if not all(rows[OURS]) or (repeats_itself and any(found != rows[UPSTREAM][0] for found in rows[OURS])):
        apart = max(sum(left != right for left, right in zip(rows[UPSTREAM][0], found)) for found in rows[OURS])
        counts = " and ".join(str(len(rows[side][0])) for side in SIDES)
        problems.append(f"{name}: the draft tokens differ in {apart} of {counts} rows")
    if repeats_itself and outputs[UPSTREAM] != outputs[OURS]:
        problems.append(f"{name}: the output ids differ ({len(outputs[OURS])} different outputs)")
    return {
        "output_sha": {side: sha("\n".join(found)) for side, found in outputs.items()},
        "draft_sha": {side: sha(json.dumps(found[0])) for side, found in rows.items()},
        "distinct_outputs": {side: len(found) for side, found in outputs.items()},
    }, problems


def case(name: str, runs: Runs, observed_runs: Runs, batch: int) -> tuple[list[dict], list[str]]:
    """The metrics of one case, and what is wrong with it. Raises Failed."""
    up = list(runs)
    for server in up:
        server.check_log()
    samples = {server: server.samples() for server in up}
    shas, problems = tokens(
        name, runs, {server: server.drafts(found[0].start, found[0].end) for server, found in observed_runs.items()}
    )
    steps = {side: statistics.median(run.steps for found in of for run in found) for side, of in by_side(runs).items()}
    step_ms = {server: [run.step_ms for run in found] for server, found in runs.items()}
    results = [result(name, "step_ms", step_ms, verify_steps=steps, **shas)]
    decode_step_ms = {server: decode_steps(samples[server], runs[server], batch) for server in up}
    if all(decode_step_ms.values()):
        results.append(result(name, "decode_step_ms", decode_step_ms, **shas))
    timed, observed_alone = (
        {server: sides.refreshes(samples[server], found[server], batch) for server in up} for found in (runs, observed_runs)
    )
    for kind, (part, metric) in sides.KINDS.items():
        us = {server: (observed_alone if kind == sides.GRAPH else timed)[server][kind] for server in up}
        if all(us.values()):
            results.append(result(f"{name}-{part}" if part else name, metric, us, **shas))
        else:
            problems.append(f"{name}: the probe saw no {kind} of a full batch")
    return results, problems


class Results:
    """The result file. Keeps what other runs of the same commit on the same machine measured."""

    def __init__(self, path: Path, head: dict):
        self.path, self.head, self.configurations, self.cases = path, head, {}, {}
        self.read()

    def read(self) -> None:
        """What others have measured."""
        if not self.path.exists():
            return
        before = json.loads(self.path.read_text())
        if other := {key: before.get(key) for key in self.head if before.get(key) != self.head[key]}:
            here = {key: self.head[key] for key in other}
            raise SystemExit(f"{self.path} holds results of {other}, this run is of {here}; give another --out")
        own = self.cases, self.configurations
        self.cases, self.configurations = {}, {}
        self.add(before["cases"], *before["configurations"])
        self.cases |= own[0]
        self.configurations |= own[1]

    def add(self, cases: list[dict], *configurations: dict) -> None:
        self.cases |= {(one["name"], one["metric"]): one for one in cases}
        self.configurations |= {one["name"]: one for one in configurations}

    def write(self) -> None:
        """Beside other processes that write the same file."""
        folder = os.open(self.path.absolute().parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.read()
            self._write()
        finally:
            os.close(folder)

    def _write(self) -> None:
        record.write(self.path, self.head, configurations=self.configurations.values(), cases=self.cases.values())

    def print(self) -> None:
        spreads = (f"p10-p90 {side}" for side in SIDES)
        table = Table("case", "metric", *SIDES, "ratio", "samples", *spreads, "same tokens")
        for one in self.cases.values():
            spread = ("-".join(f"{value:.2f}" for value in one["spread"][side]) for side in SIDES)
            numbers = (f"{one['upstream']:.2f}", f"{one['ours']:.2f}", str(one["ratio"]), str(one["samples"]))
            same = all(len(set(one[sha].values())) == 1 for sha in ("output_sha", "draft_sha"))
            undecided = one["distinct_outputs"][UPSTREAM] > 1
            same = "upstream's own differ" if undecided else "yes" if same else "NO"
            table.add_row(one["name"], one["metric"], *numbers, *spread, same)
        console.print(table)


def measure(configurations: list[Configuration], results: Results, args, deadline: float) -> list[str]:
    """Measures these configurations, whose servers are all up at once; what went wrong. They are gone when it returns."""
    problems, memory_before = [], gpu_memory_mib()
    up, pairs = [], {configuration: [] for configuration in configurations}
    for configuration, number in itertools.product(configurations, range(args.pairs)):
        # The order of the start shows in the GPU's time: who is first is so once with the plugin, once without it.
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        for side in order[:1] if configuration.within else order:
            up.append(Server(OURS if configuration.within else side, configuration, number, len(up), args))
            pairs[configuration] += [Side(one, up[-1]) for one in order] if configuration.within else up[-1:]
    try:
        servers.start(up, min(deadline - time.monotonic(), args.ready_seconds), args.start == "together")
        if args.one_core:
            pin(up)
        for configuration, pair in pairs.items():
            problems += measure_one(configuration, pair, results, args, deadline)
    except Failed as error:
        problems.append(f"{', '.join(one.name for one in configurations)}: {error}")
        console.print(problems[-1])
    finally:
        servers.stop(up, memory_before)
    return problems


def described(configuration: Configuration, up: list[Server | Side], args) -> dict:
    """The configuration as the result file has it. up: its servers."""
    found = {"name": configuration.name, "start": "alone" if args.starts else args.start, "at_once": args.at_once}
    settings = ("pairs", "starts", "output_tokens", "repeats", "warmup", "context_length", "server_flags")
    found |= {name: getattr(args, name) for name in settings}
    found |= {
        "seconds_to_ready": {side: max(of) for side, of in by_side({server: server.ready_seconds for server in up}).items()}
    }
    if not configuration.within:
        tables = by_side({server: sides.table_bytes(server.samples()) for server in up})
        found |= {"table_bytes": {side: max(of) for side, of in tables.items() if None not in of}}
    found |= {"plugin": max([server.check_log() for server in up])}
    console.print(f"{configuration.name}: ready after {found['seconds_to_ready']} s, {found['plugin']}")
    return found


def keep(results: Results, cases: list[dict], wrong: list[str], configuration: dict) -> None:
    results.add(cases, configuration)
    results.write()
    for one in cases:
        console.print(f"{one['name']}: {one['metric']} upstream {one['upstream']}, ours {one['ours']}")
    for problem in wrong:
        console.print(problem)


def measure_alone(configuration: Configuration, results: Results, args, deadline: float) -> list[str]:
    """One server at a time, alone on its GPU: off, on, on, off, ...; what went wrong."""
    memory_before, longest, up = gpu_memory_mib(), 0.0, []
    found: dict[tuple[int, int], tuple[Runs, Runs]] = {one: ({}, {}) for one in args.case}
    for number in range(args.starts):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            began, server = time.monotonic(), Server(side, configuration, number, 0, args)
            if deadline - began < longest:
                break
            try:
                servers.start([server], min(deadline - began, args.ready_seconds))
                for batch, length in args.case:
                    for kept, runs in zip(found[batch, length], drive([server], batch, length, args)):
                        kept |= runs
                up.append(server)
            except Failed as error:
                return [f"{configuration.name}: {error}"]
            finally:
                servers.stop([server], memory_before)
            longest = max(longest, time.monotonic() - began)
    if len({server.side for server in up}) < 2:
        return [f"{configuration.name}: too little time for a start of each side"]
    configuration_found, problems = described(configuration, up, args), []
    for (batch, length), (runs, observed_runs) in found.items():
        cases, wrong = case(configuration.named(f"bs{batch}-len{length}-"), runs, observed_runs, batch)
        keep(results, cases, wrong, configuration_found)
        problems += wrong
    return problems


def measure_one(configuration: Configuration, pair: list[Server | Side], results: Results, args, deadline: float) -> list[str]:
    problems, longest = [], 0.0
    found = described(configuration, pair, args) | {"gpu_memory_mib": gpu_memory_mib()}
    for batch, length in args.case:
        name, began = configuration.named(f"bs{batch}-len{length}-"), time.monotonic()
        if deadline - began < longest:
            problems.append(f"{name}: not measured, too little time is left")
            continue
        cases, wrong = case(name, *drive(pair, batch, length, args), batch)
        longest = max(longest, time.monotonic() - began)
        keep(results, cases, wrong, found)
        problems += wrong
    return problems


def machine(site: str, command: str) -> dict:
    try:
        found = servers.machine(site)
    except Failed as error:
        raise SystemExit(f"{error}; give their folders as --site") from None
    if found["gpu"] is None and command == servers.COMMAND:
        raise SystemExit(servers.NO_GPU)
    return {"gpu": found["gpu"] or "no GPU", "sglang": found["sglang"], "torch": found["torch"]}


def batch_and_length(text: str) -> tuple[int, int]:
    batch, length = text.split("x")
    return int(batch), int(length)


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--draft-steps", type=int, nargs="+", default=[3, 4], metavar="N", help="--speculative-num-steps of the servers")
    add("--cache", nargs="+", choices=CACHES, default=["bf16"], help="KV cache and with it the attention backends")
    add("--layers", type=int, nargs="+", default=[small_model.LAYERS], help="of the target model")
    add("--one-core", action="store_true", help="a slow host: each server has one core of its own once it is up")
    add("--batch", type=int, nargs="+", default=[1, 8], help="requests at a time")
    add("--len", type=int, nargs="+", default=[64, 4096], help="input tokens of a request")
    add("--case", type=batch_and_length, nargs="+", metavar="BATCHxLEN", help="instead of all of --batch with all of --len")
    add("--output-tokens", type=int, default=64)
    add("--repeats", type=int, default=9, help="rounds that count, for each case and server")
    # The first compiles kernels and prefills it all; from the second on the prompt is in the prefix cache.
    add("--warmup", type=int, default=2, help="rounds before them")
    help_start = "staggered: the second when the first is ready"
    help_within = "one server is both sides, and refreshes in turn with the plugin and as sglang does: all else is the same"
    add("--within", action="store_true", help=help_within)
    add("--start", choices=["together", "staggered"], default="together", help=help_start)
    add("--ready-seconds", type=float, default=420, help="until servers started together must be ready")
    add("--max-minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    add("--site", default="", help="PYTHONPATH entries with sglang and the plugin; empty: the current environment")
    add("--pairs", type=int, default=1, metavar="N", help="pairs of servers of each configuration: two processes differ, too")
    add(
        "--starts", type=int, default=0, metavar="N", help="instead of pairs: one server at a time, so many of each side, in turn"
    )
    add("--at-once", type=int, default=1, metavar="N", help="configurations whose servers are up at the same time")
    add("--port", type=int, default=30000, help="the first of two for each server")
    add("--context-length", type=int, default=32768)
    add("--max-total-tokens", type=int, help="size of each KV pool; from the cases unless given")
    add("--mem-fraction", type=float, default=0.9, help="--mem-fraction-static")
    add("--server-flags", default="", help="more flags for both servers, in one string")
    add("--server-command", default=servers.COMMAND, help=argparse.SUPPRESS)
    add("--out", type=Path, help="result file; by default in results/")
    add("--log-dir", type=Path, help="for the servers' logs")
    add("--commit", help="project commit measured; from git unless given")
    args = parser.parse_args(argv)
    if args.case:
        args.batch, args.len = (sorted({one[at] for one in args.case}) for at in (0, 1))
    else:
        args.case = list(itertools.product(args.batch, args.len))
    if max(args.len) + args.output_tokens + max(args.draft_steps) >= args.context_length:
        parser.error("--len and --output-tokens do not fit --context-length")
    if args.starts and (args.within or args.pairs > 1 or args.one_core):
        parser.error("--starts goes without --within, --pairs and --one-core")
    if min(args.draft_steps) < 2:
        parser.error("--draft-steps: with one draft step there is no metadata to replay")
    args.log_dir = (args.log_dir or Path(tempfile.mkdtemp(prefix="nsa-server-"))).resolve()
    return args


def measure_all(results: Results, args, deadline: float) -> list[str]:
    problems, longest = [], 0.0
    # By cache first: the servers that are up at once then compile much the same kernels.
    configurations = [
        Configuration(steps, cache, layers, args.one_core, args.within, args.context_length if args.starts else 0)
        for cache, layers, steps in itertools.product(args.cache, args.layers, args.draft_steps)
    ]
    try:
        for first in range(0, len(configurations), args.at_once):
            group, began = configurations[first : first + args.at_once], time.monotonic()
            if deadline - began < longest:
                problems += [f"{configuration.name}: not started, too little time is left" for configuration in group]
                continue
            if args.starts:
                problems += [problem for one in group for problem in measure_alone(one, results, args, deadline)]
            else:
                problems += measure(group, results, args, deadline)
            longest = max(longest, time.monotonic() - began)
    except KeyboardInterrupt:
        problems.append("interrupted")
    return problems


def main(argv=None) -> int:
    args = parse(argv)
    deadline = time.monotonic() + 60 * args.max_minutes
    servers.interrupt_on_signals()
    servers.write_probe(args.log_dir / "probe")
    head = {"schema": 1, "what": "server", **machine(args.site, args.server_command), "commit": args.commit or commit()}
    args.release = releases.find(head["sglang"])
    results = Results(args.out or default_path("server", head["gpu"], head["sglang"]), head)
    console.print(f"{head['gpu']}, sglang {head['sglang']}, torch {head['torch']}, logs in {args.log_dir}")
    problems = measure_all(results, args, deadline)
    if results.cases:
        results.print()
        results.write()
    console.print(f"results in {results.path}" if results.cases else "nothing was measured")
    for problem in problems:
        console.print(f"FAILED {problem.splitlines()[0]}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
