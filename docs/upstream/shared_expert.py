"""In sglang's CUDA graphs the routed experts' kernel takes longer where a GEMM of the shared expert runs on as it starts.

Reads profiles that sglang wrote (POST /start_profile), *.trace.json.gz, of servers whose MoE is Triton's; without an argument the
replay of a verify graph that lies here. Needs Python alone.

    python shared_expert.py [TRACE ...]
"""

import collections
import gzip
import json
import math
import statistics
import sys
from pathlib import Path

REPLAY = Path(__file__).parent / "verify_graph.trace.json.gz"
MOE = "fused_moe_kernel"  # twice a layer: gate and up, then down
SETTLED = 0.9  # us after which its blocks have their SMs: kernels with a GEMM that ended sooner were as fast as those alone
KINDS = ((1000, "verify"), (100, "draft steps"), (40, "draft extend"))  # so many kernels at the least, with 60 layers and more
SMS, REGISTERS, THREADS, BYTES = 132, 65_536, 2_048, 233_472  # of an H100 or H200; the rest of each SM


def replays(trace: dict) -> list[list[dict]]:
    """The kernels of each replay of a graph, in the order in which they start."""
    found = collections.defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") == "kernel":
            found[event["args"]["correlation"]].append(event)
    return [sorted(kernels, key=lambda one: one["ts"]) for kernels in found.values()]


def beside(kernels: list[dict], number: int) -> dict | None:
    """The kernel of another stream that began before this one and still runs when this one's blocks have their SMs."""
    this, before = kernels[number], kernels[max(0, number - 8) : number]
    others = [one for one in before if one["args"]["stream"] != this["args"]["stream"]]
    return next((one for one in others if one["ts"] + one["dur"] > this["ts"] + SETTLED), None)


def first_kernels(trace: dict) -> dict[str, dict[str, list[tuple[dict, dict | None]]]]:
    """Of each kind of graph in a profile, each layer's first kernel of the routed experts, and what runs beside it."""
    found = collections.defaultdict(lambda: {"beside a GEMM": [], "alone": []})
    for kernels in replays(trace):
        kind = next((kind for least, kind in KINDS if len(kernels) >= least), None)
        first = [number for number, one in enumerate(kernels) if MOE in one["name"]][::2]
        for number in first if kind else ():
            gemm = beside(kernels, number)
            found[kind]["beside a GEMM" if gemm else "alone"].append((kernels[number], gemm))
    return found


def needs(kernel: dict) -> tuple[int, int, int]:
    """Registers, threads and bytes of shared memory of a block; registers come in eights for each thread."""
    of = kernel["args"]
    threads = math.prod(of["block"])
    return -(-of["registers per thread"] // 8) * 8 * threads, threads, of["shared memory"] + 1024


def room(kernel: dict, other: dict, blocks: int) -> int:
    """How many blocks of a kernel an SM takes that has so many of the other one's."""
    free = (had - blocks * taken for had, taken in zip((REGISTERS, THREADS, BYTES), needs(other)))
    return min(left // need for left, need in zip(free, needs(kernel)))


def why(kernel: dict, gemm: dict) -> str:
    """Where the blocks of a kernel go that starts while a GEMM, one block to an SM, runs."""
    blocks, held = math.prod(kernel["args"]["grid"]), min(SMS, math.prod(gemm["args"]["grid"]))
    alone, shared = (room(kernel, gemm, number) for number in (0, 1))
    there = min(blocks, (SMS - held) * alone)
    return (
        f"{held} of {SMS} SMs have a block of the GEMM, and room for {shared} of the kernel's beside it; the other "
        f"{SMS - held} for {alone} each: {there} of its {blocks} blocks."
    )


def main() -> None:
    for path in map(Path, sys.argv[1:] or [REPLAY]):
        for kind, of in first_kernels(json.loads(gzip.decompress(path.read_bytes()))).items():
            said = [f"{len(us)} {how}, {statistics.median(one['dur'] for one, _ in us):.0f} us" for how, us in of.items() if us]
            print(f"{path.name}, {kind}: {'; '.join(said)}", flush=True)
            if pairs := of["beside a GEMM"]:
                sooner = statistics.median(kernel["ts"] - gemm["ts"] for kernel, gemm in pairs)
                print(f"  The GEMM starts {sooner:.1f} us before it. {why(*pairs[len(pairs) // 2])}", flush=True)


if __name__ == "__main__":
    main()
