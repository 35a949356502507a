"""What a speculative step of a real server launches, from profiles: without the plugin, with its launches before the graphs, and
with them as nodes of the graphs.

For each batch size: GPU operations that the host launches one by one (all, their GPU time, and the plugin's), the plugin's
kernels inside graphs, and of each of the three graphs two times: from the end of what ran before it to its first kernel of the
model, and from there to its end. Each server has the GPU to itself. A profile makes a step slower: its times are of no other use.

    python -m benchmarks.graphs --model-path MODEL --out FILE [--draft-steps 5] [--batch 1 8 64] [--context-length 163840]
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.record import commit, default_path, machine
from sglang_nsa_fused.settings import BEFORE_GRAPH
from sglang_nsa_fused.tools.bench import measure, record, servers
from sglang_nsa_fused.tools.bench.process import Failed, Server, running, wait, wait_ready
from sglang_nsa_fused.tools.bench.report import console

WAYS = {"off": (False, {}), "before": (True, {BEFORE_GRAPH: "1"}), "in": (True, {})}
GRAPHS = ("extend", "draft", "verify")  # by their number of kernels: a layer, one for each draft step but the first, the model
KERNEL, GRAPH_LAUNCH = "generate_kernel", "GraphLaunch"
STEPS = 20


def measures(trace: dict) -> dict[str, float]:
    """Of a profile: means of what is counted for a step, and medians of microseconds. Raises ValueError."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launched_by = {
        event["args"]["correlation"]: event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")
    }
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    work.sort(key=lambda event: event["ts"])
    graphs, alone = {}, []
    for event in work:
        if GRAPH_LAUNCH in launched_by.get(event["args"]["correlation"], ""):
            graphs.setdefault(event["args"]["correlation"], []).append(event)
        else:
            alone.append(event)
    sizes = sorted({_own(graph)[1] for graph in graphs.values()})
    if len(sizes) != len(GRAPHS):
        raise ValueError(f"expected graphs of {len(GRAPHS)} sizes, got {sizes}")
    gaps, spans = ({name: [] for name in GRAPHS} for _ in range(2))
    for graph in graphs.values():
        own, size = _own(graph)
        name, first = GRAPHS[sizes.index(size)], next(event for event in graph if KERNEL not in event["name"])
        spans[name].append(max(event["ts"] + event["dur"] for event in graph) - first["ts"])
        before = [e for e in work if e["ts"] < first["ts"] and KERNEL not in e["name"] and e["args"].get("stream") is not None]
        if before:
            end = max(event["ts"] + event["dur"] for event in before[-64:])
            gaps[name].append(first["ts"] - end)
    steps = len(gaps["verify"])
    found = {
        "steps": steps,
        "launches": len(alone) / steps,
        "launches_us": sum(event["dur"] for event in alone) / steps,
        "plugin_launches": sum(KERNEL in event["name"] for event in alone) / steps,
        "plugin_nodes": sum(_own(graph)[0] for graph in graphs.values()) / steps,
    }
    times = {f"{what}_{name}_us": of[name] for what, of in (("gap", gaps), ("graph", spans)) for name in GRAPHS}
    return found | {metric: statistics.median(of) for metric, of in times.items()}


def _own(graph: list[dict]) -> tuple[int, int]:
    """(the plugin's kernels, all others)"""
    own = sum(KERNEL in event["name"] for event in graph)
    return own, len(graph) - own


def profile(server: Server, case: measure.Case, plan: measure.Plan, folder: Path) -> Path:
    """Of steps in the midst of a call. Raises Failed."""
    folder.mkdir()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(measure.generate, server, case, plan)
        time.sleep(0.5)  # its prefill is over
        server.post("/start_profile", {"output_dir": str(folder), "num_steps": STEPS, "activities": ["CPU", "GPU"]})
        asked.result()
    if not wait(lambda: any(folder.glob("*.trace.json.gz")), 60):
        raise Failed(f"{server.name}: sglang wrote no profile of {case.name}{server.tail()}")
    time.sleep(2)  # and has closed it
    return next(folder.glob("*.trace.json.gz"))


def read(path: Path) -> dict:
    with gzip.open(path, "rt") as file:
        return json.load(file)


def compared(results: dict, cases: list[measure.Case], draft_steps: int) -> list[dict]:
    """results: measures of (way, case name). upstream is without the plugin, ours has its launches in the graphs; before: where
    these were before the graphs."""
    found = []
    for case in cases:
        off, before, ours = (results.get((way, case.name)) for way in WAYS)
        if off and ours:
            name, steps = f"n{draft_steps}-{case.name}", int(min(off["steps"], ours["steps"]))
            for metric in [metric for metric in off if metric != "steps"]:
                more = {"before": round(before[metric], 3)} if before else {}
                found.append(record.case(name, metric, off[metric], ours[metric], steps, **more))
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="a folder with a config.json; weights are random")
    add("--draft-steps", type=int, default=5)
    add("--batch", type=int, nargs="+", default=[1, 8, 64])
    add("--length", type=int, default=512)
    add("--context-length", type=int, default=163_840)
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--ready-seconds", type=float, default=420)
    add("--port", type=int, default=30000)
    add("--log-dir", type=Path)
    add("--out", type=Path)
    add("--commit")
    args = parser.parse_args(argv)
    folder = (args.log_dir or Path(tempfile.mkdtemp(prefix="nsa-graphs-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    of, release, loader = machine()
    cases, problems, results = [measure.Case(batch, args.length) for batch in args.batch], [], {}
    plan = measure.Plan(cases, 1, 2, 1, 192, args.ready_seconds, args.ready_seconds)
    flags = servers.flags(release, args.draft_steps, "bf16", max(args.batch))
    flags += servers.size_flags(args.model_path.resolve(), args.context_length, max(16, *args.batch))
    flags += ["--max-total-tokens", servers.total_tokens(cases, plan.output_tokens)]
    path = args.out or default_path("graphs", of["gpu"], of["sglang"])
    head = record.head("graphs", args.commit or commit(), of, model=args.model_path.name)
    for way in args.ways:
        plugin, more = WAYS[way]
        server = Server(way, args.port, flags, servers.environment(plugin, loader=loader) | more, folder)
        try:
            with running([server]):
                wait_ready([server], time.monotonic() + args.ready_seconds)
                server.check_plugin(plugin)
                for case in cases:
                    for _ in range(plan.warmup):
                        measure.generate(server, case, plan)
                    results[way, case.name] = measures(read(profile(server, case, plan, folder / f"{way}-{case.name}")))
                    console.print(case.name, way, results[way, case.name])
                    record.write(path, head, cases=compared(results, cases, args.draft_steps))
        except (Failed, ValueError) as error:
            problems.append(f"{way}: {error}")
    for problem in problems:
        console.print(f"FAILED {problem}", markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
