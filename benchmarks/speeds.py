"""Why two starts of one server differ by a millisecond and more: starts that differ in one thing each, one after the other, alone
on the GPU. Of each, and each case, the time of a step, and of a profile of the same process what the graphs take, the time
between their kernels, and how the shared expert and the routed experts meet in the verify graph (docs/upstream/shared_expert.py).
A server serves the cases of --before first. All steps are measured before the first profile: what CUPTI changes in a process
stays. Then the GPU is made to switch contexts, and the cases of --switch are measured again: that changes the time between
kernels of some servers. over_time has what sglang's log says of steps, before the profile and after it.

    python -m benchmarks.speeds off on off on+SGLANG_NSA_FUSED_KEEP_WIDE_TABLE=1 off+--random-seed=1 --model-path MODEL --out FILE

What follows a + is one more variable of the environment, or one more flag.
"""

import argparse
import collections
import importlib.util
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator

from benchmarks import graphs
from benchmarks.record import commit, machine
from benchmarks.server import batch_and_length
from sglang_nsa_fused.tools.bench import compare, measure, record, servers
from sglang_nsa_fused.tools.bench.process import Failed, Server, running, wait_ready
from sglang_nsa_fused.tools.bench.report import console

OUTPUT_TOKENS = 192  # so that a profile lies within a call
METRICS = (
    *("decode_step_ms", "graph_extend_us", "graph_draft_us", "graph_verify_us", "between_kernels_us"),
    *("experts_beside", "experts_beside_us", "experts_alone", "experts_alone_us"),
)
WAITED_US = 1.2  # a kernel that starts later waited for more than the one before it
# Of sglang's log: when, how many requests, their tokens, tokens a step and a second.
DECODE = re.compile(
    r"(\d\d:\d\d:\d\d)[^\]]*\] Decode batch, #running-req: (\d+), #token: (\d+),"
    r".*? accept len: ([\d.]+),.*? throughput \(token/s\): ([\d.]+)"
)
_spec = importlib.util.spec_from_file_location("shared_expert", Path(__file__).parents[1] / "docs/upstream/shared_expert.py")
shared_expert = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared_expert)


def between_kernels(trace: dict) -> float:
    """Microseconds from the end of a kernel of a graph to the start of the next of its stream, the median of those that overlap
    with nothing and wait for nothing else."""
    gaps = []
    for kernels in shared_expert.replays(trace):
        streams = collections.defaultdict(list)
        for kernel in kernels:
            streams[kernel["args"]["stream"]].append(kernel)
        for of in streams.values():
            gaps += [after["ts"] - before["ts"] - before["dur"] for before, after in itertools.pairwise(of)]
    return statistics.median(gap for gap in gaps if 0 <= gap < WAITED_US)


def over_time(log: str, case: measure.Case, step_ms: float) -> list[tuple[str, float]]:
    """When sglang's log says how fast it decodes the case, and the step's milliseconds; not where a prefill or a profile was in
    between."""
    found = []
    for at, batch, tokens, accepted, per_second in DECODE.findall(log):
        ms = round(1000 * int(batch) * float(accepted) / float(per_second), 2)
        if int(batch) == case.batch and case.length <= int(tokens) / case.batch < 2 * case.length and 0.85 < ms / step_ms < 1.15:
            found.append((at, ms))
    return found


def of_profile(trace: dict) -> dict[str, float]:
    found = graphs.measures(trace)
    times = {f"graph_{name}_us": round(found[f"graph_{name}_us"], 1) for name in graphs.GRAPHS}
    times["between_kernels_us"] = round(between_kernels(trace), 2)
    for how, of in shared_expert.first_kernels(trace)["verify"].items():
        name, us = how.split()[0], [kernel["dur"] for kernel, _ in of]
        times |= {f"experts_{name}": len(us), f"experts_{name}_us": round(statistics.median(us), 1) if us else None}
    return times


def compared(starts: list[dict], draft_steps: int) -> list[dict]:
    """Of starts to which nothing is added, those without the plugin and those with it, before the GPU was made to switch."""
    found = []
    for case, metric in itertools.product(dict.fromkeys(one["case"] for one in starts), METRICS):
        of = [one for one in starts if one["case"] == case and one[metric] is not None and not one["switched"]]
        values = {side: [[one[metric]] for one in of if one["start"] == label] for side, label in measure.LABELS.items()}
        if all(values.values()):
            found.append(compare.result(f"n{draft_steps}-{case}", metric, values))
    return found


def switch(env: dict[str, str]) -> None:
    """Makes the GPU switch contexts: another process has one for a second. Raises Failed."""
    code = "import time, torch; torch.zeros(1, device='cuda'); time.sleep(1)"
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if ended.returncode:
        raise Failed(f"no context of another process: {ended.stderr.strip()[-500:]}")


def started(start: str, number: int, flags: list, args, loader: bool) -> Iterator[dict]:
    """What was measured of a start, for each case. Raises Failed."""
    side, *more = start.split("+")
    plugin = side == "on"
    env = servers.environment(plugin, args.log_dir / "probe", loader=loader)
    env |= dict(one.split("=", 1) for one in more if not one.startswith("-"))
    flags = [*flags, *(part for one in more if one.startswith("-") for part in one.split("=", 1))]
    server = Server(f"{number}-{side}", args.port, flags, env, args.log_dir)
    plan, runs = measure.Plan(args.case, 1, 1, args.repeats, OUTPUT_TOKENS, args.ready_seconds, args.ready_seconds), {}
    with running([server]):
        wait_ready([server], time.monotonic() + args.ready_seconds)
        server.check_plugin(plugin)
        for case in args.before + args.case:
            runs[case] = [measure.generate(server, case, plan) for _ in range(plan.warmup + plan.repeats)][plan.warmup :]
        for switched, cases in ((False, args.case[::-1]), (True, args.switch)):  # first the one that was just served
            if switched and cases:
                switch(env)
                runs |= {case: [measure.generate(server, case, plan) for _ in range(plan.repeats)] for case in cases}
            for case in cases:
                path = graphs.profile(server, case, plan, args.log_dir / f"{server.name}-{case.name}{'-switched' * switched}")
                steps = compare.decode_steps(server.samples(), runs[case], case.batch)
                step_ms = statistics.median(steps)
                found = {"number": number, "start": start, "case": case.name, "switched": switched}
                found |= {"seconds_to_ready": server.ready_seconds, "decode_step_ms": round(step_ms, 3)}
                found |= {"spread": record.spread(steps)} | of_profile(graphs.read(path))
                yield found | {"over_time": over_time(server.log_from(0), case, step_ms)}


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("starts", nargs="+", metavar="off|on[+NAME=VALUE|+--flag=value]")
    add("--model-path", type=Path, required=True, help="a folder with a config.json; weights are random")
    add("--draft-steps", type=int, default=3)
    add("--case", type=batch_and_length, nargs="+", default=[measure.Case(1, 32_768)], metavar="BATCHxLEN", help="in this order")
    add("--before", type=batch_and_length, nargs="+", default=[], metavar="BATCHxLEN", help="served before, and not recorded")
    add("--switch", type=batch_and_length, nargs="+", default=[], metavar="BATCHxLEN", help="some of --case, measured again")
    add("--repeats", type=int, default=2)
    add("--context-length", type=int, default=163_840)
    add("--server-flags", default="", help="more flags for all servers, in one string")
    add("--ready-seconds", type=float, default=420)
    add("--max-minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    add("--port", type=int, default=30000)
    add("--log-dir", type=Path)
    add("--out", type=Path, required=True)
    add("--add", action="store_true", help="to the starts that --out holds already")
    add("--commit")
    args = parser.parse_args(argv)
    for start in args.starts:
        side, *more = start.split("+")
        if side not in ("off", "on") or not all("=" in one for one in more):
            parser.error(f"starts: expected off or on and what is added as NAME=VALUE or --flag=value, got {start}")
    if other := [case.name for case in args.switch if case not in args.case]:
        parser.error(f"--switch: expected cases of --case, got {', '.join(other)}")
    args.log_dir = (args.log_dir or Path(tempfile.mkdtemp(prefix="nsa-speeds-"))).resolve()
    return args


def main(argv=None) -> int:
    args = parse(argv)
    deadline, longest, problems, found = time.monotonic() + 60 * args.max_minutes, 0.0, [], []
    of, release, loader = machine()
    servers.write_probe(args.log_dir / "probe")
    served = args.before + args.case
    most = max(case.batch for case in served)
    flags = servers.flags(release, args.draft_steps, "bf16", most)
    flags += servers.size_flags(args.model_path.resolve(), args.context_length, max(16, most))
    flags += ["--max-total-tokens", servers.total_tokens(served, OUTPUT_TOKENS), *shlex.split(args.server_flags)]
    more = {name: getattr(args, name) for name in ("draft_steps", "context_length", "server_flags")}
    more["before"] = [case.name for case in args.before]
    head = record.head("speeds", args.commit or commit(), of, model=args.model_path.name, **more)
    if args.add and args.out.exists():
        held = json.loads(args.out.read_text())
        if other := [name for name in head if held.get(name) != head[name]]:
            console.print(f"FAILED {args.out}: --add needs a file of the same {', '.join(other)}", markup=False)
            return 1
        found = held["starts"]
    for number, start in enumerate(args.starts, 1 + max((one["number"] for one in found), default=0)):
        began = time.monotonic()
        if deadline - began < longest:
            problems.append(f"{start}: not started, too little time is left")
            break
        try:
            for one in started(start, number, flags, args, loader):
                found.append(one)
                console.print(one)
                record.write(args.out, head, starts=found, cases=compared(found, args.draft_steps))
        except (Failed, ValueError) as error:
            problems.append(f"{start}: {error}")
        longest = max(longest, time.monotonic() - began)
    for problem in problems:
        console.print(f"FAILED {problem}", markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
