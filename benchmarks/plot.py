"""The README's picture, from the committed results of the replays and of the servers.

    python -m benchmarks.plot
"""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.pages import load
from sglang_nsa_fused.bench.plots import NAMES

HERE = Path(__file__).parent
RELEASE = "h100-0.5.12.post1"
BATCHES = (1, 4, 16, 64)
KINDS = {"draft": ("draft steps", "o"), "verify": ("target verify", "s"), "extend": ("draft extend", "^")}


def draw_host(axes, cases: list[dict]) -> None:
    found = {case["name"]: case for case in cases if case["metric"] == "host_us"}
    for side, (name, color) in NAMES.items():
        for kind, (label, marker) in KINDS.items():
            values = [found[f"{kind}-n4-bs{bs}-len512"][side] for bs in BATCHES]
            axes.plot(range(len(BATCHES)), values, marker + "-", color=color, label=f"{label}, {name}")
    axes.set(title="Host time of one refresh, 4 draft steps, 512 tokens", xlabel="batch", ylabel="us", yscale="log")
    axes.set(ylim=(4, 20000), xticks=range(len(BATCHES)), xticklabels=BATCHES)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, ncols=2, fontsize=7, loc="upper left")


def draw_steps(axes, cases: list[dict]) -> None:
    steps = sorted((case for case in cases if case["metric"] == "step_ms"), key=lambda case: case["name"])
    for offset, (side, (name, color)) in zip((-0.2, 0.2), NAMES.items()):
        values = [case[side] for case in steps]
        low, high = ([abs(case["spread"][side][at] - case[side]) for case in steps] for at in (0, 1))
        places = [at + offset for at in range(len(steps))]
        axes.barh(places, values, 0.38, xerr=(low, high), color=color, label=name, error_kw={"elinewidth": 0.8})
    axes.set(title="One speculative step in a server", xlabel="ms, median, 10th to 90th percentile")
    axes.set_yticks(range(len(steps)), [case["name"] for case in steps], fontsize=7)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=7, loc="upper right")


def main() -> None:
    replays, servers = load("replay", RELEASE), load("server", RELEASE)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_host(left, replays["cases"])
    draw_steps(right, servers["cases"])
    figure.suptitle(f"{servers['gpu']}, sglang {servers['sglang']}", fontsize=9, color="#5f6368")
    for kind in ("svg", "png"):
        figure.savefig(HERE.parent / f"docs/gain.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
