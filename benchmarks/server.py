"""sglang servers with MTP speculative decoding, without and with the plugin, over the cases of this repository's results.

One server at a time, alone on its GPU, the sides in turn (off, on, on, off), with random weights: a small DeepSeek-V3.2, or the
model of --model-path's config. They get the same greedy requests. Records the time of a speculative step (step_ms: of a whole
call, by its verify steps; decode_step_ms: from one draft to the next), the host time of each refresh of metadata (draft, verify,
draft extend), the GPU time of the draft steps' graph, and hashes of the output ids and of the draft tokens, which must be the
same.

    python -m benchmarks.server
"""

import argparse
import itertools
import json
import re
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import commit, default_path, machine
from sglang_nsa_fused.tools.bench import compare, measure, record, report, servers, small_model
from sglang_nsa_fused.tools.bench.measure import Case, Start
from sglang_nsa_fused.tools.bench.process import COMMAND, Failed
from sglang_nsa_fused.tools.bench.report import console

FREE = re.compile(r"available_gpu_mem=([\d.]+) GB")  # of sglang's log, after the captures; its GB are GiB


@dataclass(frozen=True)
class Configuration:
    draft_steps: int
    cache: str
    layers: int
    width: int  # of its servers' context

    def named(self, case: str) -> str:
        """The name of a case of it, or of its own for "": what is not as in most results stands at the end."""
        more = f"-layers{self.layers}" * (self.layers != small_model.LAYERS)
        return f"n{self.draft_steps}-{case}width{self.width}-{self.cache}{more}"

    @property
    def name(self) -> str:
        return self.named("")


class Results:
    """The result file. Raises SystemExit where it is there already: another run's."""

    def __init__(self, path: Path, head: dict):
        if path.exists():
            raise SystemExit(f"{path} holds the results of another run; give another --out")
        self.path, self.head, self.configurations, self.cases = path, head, {}, {}

    def add(self, cases: list[dict], configuration: dict) -> None:
        self.cases |= {(one["name"], one["metric"]): one for one in cases}
        self.configurations[configuration["name"]] = configuration
        record.write(self.path, self.head, configurations=self.configurations.values(), cases=self.cases.values())


def setup(configuration: Configuration, release, loader: bool, args) -> measure.Setup:
    model = args.model_path or small_model.write(args.log_dir / f"model-{configuration.layers}", configuration.layers)
    most = max(case.batch for case in args.case)
    flags = servers.flags(release, configuration.draft_steps, configuration.cache, most)
    flags += servers.size_flags(model, configuration.width, max(16, most))
    flags += ["--max-total-tokens", servers.total_tokens(args.case, args.output_tokens), *shlex.split(args.server_flags)]
    return measure.Setup(args.log_dir, flags, args.port, f"{configuration.name}-", loader, command=args.server_command)


def described(configuration: Configuration, up: list[Start], args) -> dict:
    """The configuration as the result file has it."""
    names = ("output_tokens", "repeats", "warmup", "context_length", "server_flags")
    servers_up = compare.by_side(up, lambda start: start.server)
    ready = {side: max(server.ready_seconds for server in of) for side, of in servers_up.items()}
    found = {"name": configuration.name, "start": "alone", "starts": min(map(len, servers_up.values()))}
    found |= {name: getattr(args, name) for name in names}
    found |= {"seconds_to_ready": ready, "table_bytes": compare.table_bytes(up)}
    free = {side: [float(gib) for server in of for gib in FREE.findall(server.log_from(0))] for side, of in servers_up.items()}
    found["free_gib"] = {side: min(of) for side, of in free.items() if of}
    return found | {"plugin": "".join(servers_up[record.OURS][-1].plugin_lines())}


def measure_one(configuration: Configuration, plan: measure.Plan, results: Results, of: measure.Setup, args) -> list[str]:
    """What went wrong. What was measured until then is in the file."""
    up, problems, ended = [], [], []
    try:
        for start in measure.starts(of, plan, console.print):
            up.append(start)
            problems = []
            for case in args.case:
                cases, *wrong = compare.cases(configuration.named(f"{case.name}-"), case, up)
                problems += itertools.chain(*wrong)
                if cases:
                    results.add(cases, described(configuration, up, args))
    except Failed as error:
        console.print(error)
        ended = [f"{configuration.name}: {error}"]
    return problems + ended


def batch_and_length(text: str) -> Case:
    batch, length = text.split("x")
    return Case(int(batch), int(length))


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", type=Path, help="a folder with a config.json, in place of the small model; weights are random")
    add("--draft-steps", type=int, nargs="+", default=[3, 4], metavar="N", help="--speculative-num-steps of the servers")
    add("--cache", nargs="+", choices=servers.CACHES, default=["bf16"], help="KV cache and with it the attention backends")
    add("--layers", type=int, nargs="+", default=[small_model.LAYERS], help="of the small model")
    cases = [Case(batch, length) for batch in (1, 8) for length in (64, 4096)]
    add("--case", type=batch_and_length, nargs="+", default=cases, metavar="BATCHxLEN", help="requests at a time, their tokens")
    add("--output-tokens", type=int, default=64)
    add("--starts", type=int, default=2, metavar="N", help="of each side, in turn: two servers of one side differ, too")
    add("--repeats", type=int, default=9, help="runs of each case after a start")
    # The first compiles kernels and prefills it all; from the second on the prompt is in the prefix cache.
    add("--warmup", type=int, default=2, help="runs before them")
    add("--ready-seconds", type=float, default=420, help="until a server must be ready")
    add("--max-minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    add("--port", type=int, default=30000)
    add("--context-length", type=int, default=32768)
    add("--server-flags", default="", help="more flags for the servers of both sides, in one string")
    add("--server-command", default=COMMAND, help=argparse.SUPPRESS)
    add("--out", type=Path, help="result file; by default in results/")
    add("--log-dir", type=Path, help="for the servers' logs")
    add("--commit", help="project commit measured; from git unless given")
    args = parser.parse_args(argv)
    longest = max(case.length for case in args.case)
    if longest + args.output_tokens + max(args.draft_steps) >= args.context_length:
        parser.error("--case and --output-tokens do not fit --context-length")
    if min(args.draft_steps) < 2:
        parser.error("--draft-steps: with one draft step there is no metadata to replay")
    if args.model_path:
        try:
            args.layers = [json.loads((args.model_path / "config.json").read_text())["num_hidden_layers"]]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--model-path: expected a folder with a config.json of a model, got {args.model_path} ({error})")
        args.model_path = args.model_path.resolve()
    args.log_dir = (args.log_dir or Path(tempfile.mkdtemp(prefix="nsa-server-"))).resolve()
    return args


def main(argv=None) -> int:
    args = parse(argv)
    deadline = time.monotonic() + 60 * args.max_minutes
    of, release, loader = machine()
    servers.write_probe(args.log_dir / "probe")
    model = args.model_path.name if args.model_path else None
    head = record.head("server", args.commit or commit(), of, model=model)
    results = Results(args.out or default_path("server", head["gpu"], head["sglang"]), head)
    console.print(f"{head['gpu']}, sglang {head['sglang']}, torch {head['torch']}, logs in {args.log_dir}")
    runs = {name: getattr(args, name) for name in ("starts", "warmup", "repeats", "output_tokens", "ready_seconds")}
    plan, problems = measure.Plan(args.case, **runs, request_seconds=args.ready_seconds, deadline=deadline), []
    try:
        for cache, layers, steps in itertools.product(args.cache, args.layers, args.draft_steps):
            configuration = Configuration(steps, cache, layers, args.context_length)
            problems += measure_one(configuration, plan, results, setup(configuration, release, loader, args), args)
    except KeyboardInterrupt:
        problems.append("interrupted")
    if results.cases:
        report.show(list(results.cases.values()))
    console.print(f"results in {results.path}" if results.cases else "nothing was measured")
    for problem in problems:
        console.print(f"FAILED {problem.splitlines()[0]}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
