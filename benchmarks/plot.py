"""The README's picture, from the committed results of the copy.

    python -m benchmarks.plot
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE / "results/copy-h100-0.5.12.post1.json"
DESTINATIONS, BATCHES = (1, 2, 3, 4, 7), (1, 4, 16, 64, 256)
SIDES = {"copies": ("individual copies", "#9aa0a6"), "jit": ("upstream's fused kernel", "#d9822b"), "ours": ("ours", "#2b6cb0")}


def series(cases: dict, metric: str, names: list[str]) -> dict[str, list[float]]:
    """Side -> values; ours as measured against upstream's fused kernel."""
    found = {side: [cases[f"vs-{side}-{name}", metric]["upstream"] for name in names] for side in ("copies", "jit")}
    return found | {"ours": [cases[f"vs-jit-{name}", metric]["ours"] for name in names]}


def draw(axes, x, found: dict, title: str, xlabel: str, ylabel: str) -> None:
    for side, values in found.items():
        label, color = SIDES[side]
        axes.plot(range(len(x)), values, "o-", label=label, color=color)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log", xticks=range(len(x)), xticklabels=x)
    axes.grid(axis="y", alpha=0.3)


def main() -> None:
    results = json.loads(RESULTS.read_text())
    cases = {(case["name"], case["metric"]): case for case in results["cases"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    host = series(cases, "host_us", [f"d{n}-bs4-len512" for n in DESTINATIONS])
    draw(left, DESTINATIONS, host, "Host time, batch 4, 512 tokens", "step backends", "us per copy")
    gpu = series(cases, "gpu_us", [f"d3-bs{bs}-len163840" for bs in BATCHES])
    del gpu["copies"]  # small ones wait for the host
    draw(right, BATCHES, gpu, "GPU time, 3 step backends, 163,840 tokens", "batch", "us per copy")
    left.legend(frameon=False)
    figure.suptitle(f"{results['gpu']}, sglang {results['sglang']}", fontsize=9, color="#5f6368")
    for kind in ("svg", "png"):
        figure.savefig(HERE.parent / f"docs/copy.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
