"""docs/upstream/shared_expert.py, over a profile as sglang writes it."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs/upstream/shared_expert.py"


# Blocks, and of each the threads, registers of a thread and bytes of shared memory.
GEMM, EXPERTS = (112, 384, 168, 164_308), (288, 128, 37, 12_288)


def kernel(name: str, start: float, us: float, stream: int, replay: int, shape: tuple = EXPERTS) -> dict:
    blocks, threads, registers, memory = shape
    of = {"correlation": replay, "stream": stream, "grid": [blocks // 4, 4, 1], "block": [threads, 1, 1]}
    of |= {"registers per thread": registers, "shared memory": memory}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": us, "args": of}


def layer(start: float, gemm: float, us: float, replay: int, shape: tuple = GEMM) -> list[dict]:
    """gemm: when the shared expert's begins, from the routed experts' kernel on. us: how long that takes."""
    return [
        kernel("nvjet", start + gemm, 6, 2, replay, shape),
        kernel("fused_moe_kernel", start, us, 1, replay),
        kernel("fused_moe_kernel", start + us, 20, 1, replay),
    ]


def lines(*profiles: Path) -> list[str]:
    ran = subprocess.run([sys.executable, SCRIPT, *profiles], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def write(path: Path, events: list[dict]) -> Path:
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_both_ways_of_each_graph(tmp_path):
    verify = [one for number in range(400) for one in layer(1000 * number, -4, 150 + number % 3, 1)]
    verify += [one for number in range(60) for one in layer(1000 * (400 + number), 80, 91, 1)]
    verify += [one for number in range(40) for one in layer(1000 * (460 + number), -5.5, 91, 1)]  # it ends soon enough
    drafts = [one for number in range(40) for one in layer(1000 * number, -7, 83, 2)]  # it has ended by then
    other = [kernel("nvjet", 0, 5, 1, 3), {"ph": "i", "name": "a mark"}]
    assert lines(write(tmp_path / "one.trace.json.gz", verify + drafts + other)) == [
        "one.trace.json.gz, verify: 400 beside a GEMM, 151 us; 100 alone, 91 us",
        "  The GEMM starts 4.0 us before it. 112 of 132 SMs have a block of the GEMM, and room for 0 of the kernel's beside it; "
        "the other 20 for 12 each: 240 of its 288 blocks.",
        "one.trace.json.gz, draft steps: 40 alone, 83 us",
    ]


@pytest.mark.parametrize(
    "gemm, held, beside, alone, there",
    [
        ((100, 256, 64, 1_024), 100, 9, 12, 288),
        ((120, 384, 168, 1_024), 120, 0, 12, 144),
        ((132, 384, 168, 1_024), 132, 0, 12, 0),
        ((56, 128, 16, 180_000), 56, 3, 12, 288),
    ],
)
def test_the_room_beside_a_gemm(tmp_path, gemm, held, beside, alone, there):
    verify = [one for number in range(500) for one in layer(1000 * number, -4, 150, 1, gemm)]
    _, _, found = lines(write(tmp_path / "one.trace.json.gz", verify))[1].partition("it. ")
    assert list(map(int, re.findall(r"\d+", found)[:6])) == [held, 132, beside, 132 - held, alone, there]


def test_the_profile_that_lies_beside_it():
    assert lines()[0] == "verify_graph.trace.json.gz, verify: 55 beside a GEMM, 124 us; 3 alone, 56 us"
