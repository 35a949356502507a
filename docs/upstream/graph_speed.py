"""Why the same CUDA graph has two speeds: a node takes longer once its process has used more streams, until the GPU switches
contexts; then it is short again, and stays so. Needs torch and a GPU; nothing of sglang.

    python docs/upstream/graph_speed.py

Each line is a process of its own. It replays a graph of 2,000 small kernels of one stream, uses more streams, and waits for what
another process does. Printed is the time of a node in microseconds, the median of 30 replays, before and after.
"""

import os
import statistics
import subprocess
import sys
import time

import torch

NODES, CYCLES, REPLAYS, STREAMS = 2000, 1000, 30, 32


def node_us(graph: torch.cuda.CUDAGraph) -> float:
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # so that the launch of the next one is hidden
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / NODES)
    return statistics.median(times)


def measure(what: str, gpu: str | None) -> None:
    """gpu: the one on which another process makes a context."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NODES):
            torch.cuda._sleep(CYCLES)
    found = [node_us(graph)]
    for stream in [torch.cuda.Stream() for _ in range(STREAMS)]:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10)
        torch.cuda.synchronize()
    found.append(node_us(graph))
    if gpu is not None:
        code = "import time, torch; torch.zeros(1, device='cuda'); time.sleep(0.5)"
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}, check=True)
    found.append(node_us(graph))
    time.sleep(2)
    found.append(node_us(graph))
    print(f"| {what} | " + " | ".join(f"{one:.3f}" for one in found) + " |", flush=True)


def main() -> None:
    cases = {"nothing": None, "a context of another process on this GPU": "0", "one on another GPU that nobody used": "1"}
    if len(sys.argv) > 1:
        return measure(sys.argv[1], cases[sys.argv[1]])
    names = "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__)"
    subprocess.run([sys.executable, "-c", names], check=True)  # this process makes no context
    print("| what happened | first | more streams used | after it | 2 s later |\n| --- | --- | --- | --- | --- |", flush=True)
    for what in list(cases)[: 1 + torch.cuda.device_count()]:  # asks NVML
        subprocess.run([sys.executable, __file__, what], check=True)


if __name__ == "__main__":
    main()
