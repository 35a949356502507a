"""docs/upstream/shared_expert.py, over a profile as sglang writes it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs/upstream/shared_expert.py"


def kernel(name: str, start: float, us: float, stream: int, replay: int) -> dict:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": us, "args": {"correlation": replay, "stream": stream}}


def layer(start: float, gemm: float, us: float, replay: int) -> list[dict]:
    """gemm: when the shared expert's begins, from the routed experts' kernel on. us: how long that takes."""
    return [
        kernel("nvjet", start + gemm, 6, 2, replay),
        kernel("fused_moe_kernel", start, us, 1, replay),
        kernel("fused_moe_kernel", start + us, 20, 1, replay),
    ]


def test_both_ways_of_each_graph(tmp_path):
    verify = [one for number in range(400) for one in layer(1000 * number, -4, 150 + number % 3, 1)]
    verify += [one for number in range(60) for one in layer(1000 * (400 + number), 80, 91, 1)]
    verify += [one for number in range(40) for one in layer(1000 * (460 + number), -5.5, 91, 1)]  # it ends soon enough
    drafts = [one for number in range(40) for one in layer(1000 * number, -7, 83, 2)]  # it has ended by then
    other = [kernel("nvjet", 0, 5, 1, 3), {"ph": "i", "name": "a mark"}]
    trace = tmp_path / "one.trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": verify + drafts + other}).encode()))
    ran = subprocess.run([sys.executable, SCRIPT, trace], capture_output=True, text=True)
    assert ran.stdout.splitlines() == [
        "one.trace.json.gz, verify: 400 beside a GEMM, 151 us; 100 alone, 91 us",
        "one.trace.json.gz, draft steps: 40 alone, 83 us",
    ], ran.stderr
