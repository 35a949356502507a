"""The highest --mem-fraction-static at which a server with speculation starts and serves a full batch, without and with the
plugin, and the KV cache that it then has.

A server runs out of memory in its graphs or in its first full batch where too little is left beside the KV cache. For each side
this finds the highest of the hundredths from --low to --high that works, several servers at a time, each alone on its GPU.

    python -m benchmarks.memory --model-path MODEL [--gpus 4] [--low 0.80] [--high 0.97]
"""

import argparse
import concurrent.futures
import json
import os
import random
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import commit, default_path, machine
from sglang_nsa_fused.tools.bench import process, record, servers
from sglang_nsa_fused.tools.bench.process import COMMAND, Failed, gpu_memory_mib
from sglang_nsa_fused.tools.bench.record import OURS, SIDES
from sglang_nsa_fused.tools.bench.report import console

POOL = re.compile(r"max_total_num_tokens=(\d+)")
TOO_LOW = "Please try to increase --mem-fraction-static"
PORTS_APART = 100  # of two servers that are up at once


class Search:
    """For one side: the hundredths that may still be the highest that works."""

    def __init__(self, side: str, low: int, high: int):
        self.side, self.low, self.high, self.best = side, low, high, None  # best: of the tries

    @property
    def is_open(self) -> bool:
        return self.low <= self.high

    def probes(self, count: int) -> list[int]:
        """What to try at once: at most so many, with parts of one size between them."""
        left = self.high - self.low + 1
        count = min(count, left)
        return [self.low + (part + 1) * left // (count + 1) for part in range(count)]

    def add(self, one: dict) -> None:
        """one: a try."""
        if one["worked"] and (self.best is None or one["hundredths"] > self.best["hundredths"]):
            self.best = one
        if one["worked"] or one["too_low"]:
            self.low = max(self.low, one["hundredths"] + 1)
        else:
            self.high = min(self.high, one["hundredths"] - 1)


class Server(process.Server):
    def __init__(self, side: str, hundredths: int, gpu: str, port: int, args):
        self.side, self.hundredths = side, hundredths
        env = servers.environment(side == OURS, loader=args.loader) | {"CUDA_VISIBLE_DEVICES": gpu}
        flags = servers.flags(args.release, args.draft_steps, args.cache, args.batch)
        flags += servers.size_flags(args.model_path, args.context_length, args.batch, hundredths / 100)
        flags += shlex.split(args.server_flags)
        super().__init__(f"{side}-{hundredths}", port, flags, env, args.log_dir, args.server_command)

    @property
    def pool_tokens(self) -> int | None:
        found = POOL.search(self.log_from(0))
        return int(found[1]) if found else None

    def serve(self, args, deadline: float) -> None:
        """Waits until it is up, and sends it one full batch. Raises Failed."""
        process.wait_ready([self], deadline)
        self.check_plugin(self.side == OURS)
        draw = random.Random(0)
        prompts = [draw.choices(range(10, args.vocabulary), k=args.input_tokens) for _ in range(args.batch)]
        self.generate(prompts, args.output_tokens)


def outcome(server: Server, args, deadline: float) -> dict:
    """Of a try. Raises Failed where it fails for another reason than memory."""
    found = {"side": server.side, "hundredths": server.hundredths, "gpu": server.gpu}
    found |= {"worked": True, "too_low": False, "why": ""}
    try:
        server.serve(args, deadline)
    except Failed:
        log = server.log_from(0)
        if not process.OUT_OF_MEMORY.search(log):
            raise
        when = "its first full batch" if server.ready_seconds else "its start"
        too_low = TOO_LOW in log
        why = "no memory for a KV cache" if too_low else f"out of memory in {when}"
        found |= {"worked": False, "too_low": too_low, "why": why}
    found |= {"pool_tokens": server.pool_tokens, "seconds_to_ready": server.ready_seconds}
    return found | {"gpu_memory_mib": gpu_memory_mib(server.gpu) if found["worked"] else None}


class Results:
    def __init__(self, path: Path, head: dict, searches: list[Search], args):
        self.path, self.head, self.searches, self.tries = path, head, searches, []
        self.name = f"n{args.draft_steps}-bs{args.batch}-context{args.context_length}-{args.cache}"

    def add(self, one: dict) -> None:
        next(search for search in self.searches if search.side == one["side"]).add(one)
        self.tries.append(one)
        text = f"served a full batch, {one['pool_tokens']} tokens of KV cache" if one["worked"] else one["why"]
        console.print(f"{one['side']} {one['hundredths'] / 100:.2f}: {text}")
        finished = not any(search.is_open for search in self.searches)
        record.write(self.path, self.head | {"finished": finished}, cases=self.cases(), tries=self.tries)

    def cases(self) -> list[dict]:
        """The highest so far, once each side has worked somewhere."""
        best = {search.side: search.best for search in self.searches}
        if None in best.values():
            return []
        starts = len(self.tries)
        values = {"mem_fraction": lambda one: one["hundredths"] / 100, "pool_tokens": lambda one: one["pool_tokens"]}
        return [record.case(self.name, metric, *(of(best[side]) for side in SIDES), starts) for metric, of in values.items()]


def at_once(searches: list[Search], gpus: int) -> list[tuple[str, int]]:
    """The sides and hundredths to try next, one on each GPU."""
    still = [search for search in searches if search.is_open][:gpus]
    return [(search.side, hundredths) for search in still for hundredths in search.probes(gpus // len(still))]


def attempt(tries: list[tuple[str, int]], number: int, results: Results, args) -> None:
    """number: of the round, for ports that nobody still holds. Raises Failed, when all others have been recorded."""
    up = [
        Server(side, hundredths, gpu, args.port + PORTS_APART * place + 4 * number, args)
        for place, ((side, hundredths), gpu) in enumerate(zip(tries, args.gpu_names))
    ]
    failures = []
    # The servers end first: what still waits for one then ends, too.
    with concurrent.futures.ThreadPoolExecutor(len(up)) as pool, process.running(up):
        deadline = time.monotonic() + args.ready_seconds
        for done in concurrent.futures.as_completed([pool.submit(outcome, server, args, deadline) for server in up]):
            try:
                results.add(done.result())
            except Failed as error:
                failures.append(error)
    if failures:
        raise failures[0]


def search(results: Results, args, deadline: float) -> list[str]:
    """What is wrong with what was found."""
    longest = 0.0
    try:
        for number in range(100):
            if not (tries := at_once(results.searches, args.gpus)):
                break
            if deadline - (began := time.monotonic()) < longest:
                return ["not finished: too little time is left"]
            attempt(tries, number, results, args)
            longest = max(longest, time.monotonic() - began)
    except Failed as error:
        return [str(error)]
    except KeyboardInterrupt:
        return ["interrupted"]
    problems = [f"{one.side}: no fraction worked" for one in results.searches if one.best is None]
    at_end = [one.side for one in results.searches if one.best and one.best["hundredths"] == round(100 * args.high)]
    return problems + [f"{side}: --high {args.high} works; give a higher one" for side in at_end]


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", required=True, help="a folder with a config.json; weights are random")
    add("--low", type=float, default=0.80, help="the lowest --mem-fraction-static to try")
    add("--high", type=float, default=0.97)
    add("--gpus", type=int, default=1, metavar="N", help="servers at once, each alone on its GPU")
    add("--draft-steps", type=int, default=5, metavar="N", help="--speculative-num-steps of the servers")
    add("--batch", type=int, default=64, help="the largest captured batch size, and requests at a time")
    add("--context-length", type=int, default=1_048_576)
    add("--cache", choices=servers.CACHES, default="bf16")
    add("--input-tokens", type=int, default=300, help="of a request")
    add("--output-tokens", type=int, default=64)
    add("--ready-seconds", type=float, default=420, help="until servers started together must be ready")
    add("--max-minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    add("--port", type=int, default=30000)
    add("--server-flags", default="", help="more flags for all servers, in one string")
    add("--server-command", default=COMMAND, help=argparse.SUPPRESS)
    add("--out", type=Path, help="result file; by default in results/")
    add("--log-dir", type=Path, help="for the servers' logs")
    add("--commit", help="project commit measured; from git unless given")
    args = parser.parse_args(argv)
    if not 0 < args.low <= args.high < 1:
        parser.error(f"--low, --high: expected 0 < low <= high < 1, got {args.low} and {args.high}")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    args.gpu_names = (visible or [str(number) for number in range(args.gpus)])[: args.gpus]
    if args.gpus < 1 or len(args.gpu_names) < args.gpus:
        most = f" and at most the {len(visible)} of CUDA_VISIBLE_DEVICES" if visible else ""
        parser.error(f"--gpus: expected at least 1{most}, got {args.gpus}")
    try:
        args.vocabulary = json.loads((Path(args.model_path) / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--model-path: expected a folder with a config.json that has a vocab_size, got {args.model_path} ({error})")
    args.model_path = str(Path(args.model_path).resolve())
    args.log_dir = (args.log_dir or Path(tempfile.mkdtemp(prefix="nsa-memory-"))).resolve()
    args.log_dir.mkdir(parents=True, exist_ok=True)
    return args


def main(argv=None) -> int:
    args = parse(argv)
    deadline = time.monotonic() + 60 * args.max_minutes
    of, args.release, args.loader = machine()
    names = ("draft_steps", "batch", "context_length", "cache", "input_tokens", "output_tokens", "low", "high", "server_flags")
    settings = {"model": Path(args.model_path).name} | {name: getattr(args, name) for name in names}
    head = record.head("memory", args.commit or commit(), of, settings=settings)
    searches = [Search(side, round(100 * args.low), round(100 * args.high)) for side in SIDES]
    results = Results(args.out or default_path("memory", head["gpu"], head["sglang"]), head, searches, args)
    console.print(f"{head['gpu']}, sglang {head['sglang']}, torch {head['torch']}, logs in {args.log_dir}")
    problems = search(results, args, deadline)
    for one in results.cases():
        console.print(f"{one['name']}: {one['metric']} upstream {one['upstream']}, ours {one['ours']}")
    console.print(f"results in {results.path}" if results.tries else "nothing was measured")
    for problem in problems:
        console.print(f"FAILED {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
