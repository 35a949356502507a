"""In sglang's CUDA graphs the routed experts' kernel takes longer where a GEMM of the shared expert runs on as it starts.

Reads profiles that sglang wrote (POST /start_profile), *.trace.json.gz, of servers whose MoE is Triton's. Needs Python alone.

    python shared_expert.py TRACE ...
"""

import collections
import gzip
import json
import statistics
import sys
from pathlib import Path

MOE = "fused_moe_kernel"  # twice a layer: gate and up, then down
SETTLED = 0.9  # us after which its blocks have their SMs: kernels with a GEMM that ended sooner were as fast as those alone
KINDS = ((1000, "verify"), (100, "draft steps"), (40, "draft extend"))  # so many kernels at the least, with 60 layers and more


def replays(path: Path) -> list[list[dict]]:
    """The kernels of each replay of a graph, in the order in which they start."""
    found = collections.defaultdict(list)
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") == "kernel":
            found[event["args"]["correlation"]].append(event)
    return [sorted(kernels, key=lambda one: one["ts"]) for kernels in found.values()]


def is_beside(kernels: list[dict], number: int) -> bool:
    """Whether a kernel of another stream that began before this one still runs when this one's blocks have their SMs."""
    this, before = kernels[number], kernels[max(0, number - 8) : number]
    others = [one for one in before if one["args"]["stream"] != this["args"]["stream"]]
    return any(one["ts"] + one["dur"] > this["ts"] + SETTLED for one in others)


def first_kernels(path: Path) -> dict[str, dict[str, list[float]]]:
    """Of each kind of graph in a profile, the microseconds of each layer's first kernel of the routed experts."""
    found = collections.defaultdict(lambda: {"beside a GEMM": [], "alone": []})
    for kernels in replays(path):
        kind = next((kind for least, kind in KINDS if len(kernels) >= least), None)
        first = [number for number, one in enumerate(kernels) if MOE in one["name"]][::2]
        for number in first if kind else ():
            found[kind]["beside a GEMM" if is_beside(kernels, number) else "alone"].append(kernels[number]["dur"])
    return found


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        for kind, of in first_kernels(path).items():
            said = [f"{len(us)} {how}, {statistics.median(us):.0f} us" for how, us in of.items() if us]
            print(f"{path.name}, {kind}: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
