"""Pictures of result files: host time by batch, and what benchmarks/ draws, both sides with their spread."""

import re
from pathlib import Path

from sglang_nsa_fused.tools.bench.record import SIDES

NAMES = {"upstream": ("sglang", "#d9822b"), "ours": ("with the plugin", "#2b6cb0")}
MARKERS = "os^vD*"
SUFFIXES = (".png", ".svg")


def line(axes, ticks: list, found: list[tuple], side: str, marker: str, label: str) -> None:
    """found: (tick, case of a result file)."""
    name, color = NAMES[side]
    found = sorted(found, key=lambda pair: pair[0])
    places, values = [ticks.index(tick) for tick, _ in found], [case[side] for _, case in found]
    spreads = [case.get("spread", {}).get(side, [case[side]] * 2) for _, case in found]
    # The median of few samples may lie outside of interpolated percentiles.
    low = [max(value - spread[0], 0) for value, spread in zip(values, spreads)]
    high = [max(spread[1] - value, 0) for value, spread in zip(values, spreads)]
    axes.errorbar(
        places, values, (low, high), marker=marker, color=color, label=f"{label}, {name}", capsize=2, lw=1.2, elinewidth=0.8
    )


def draw(axes, groups: dict[str, list[tuple]], title: str, xlabel: str, ylabel: str, log: bool = False) -> None:
    """groups: label -> (tick, case)."""
    ticks = sorted({tick for found in groups.values() for tick, _ in found})
    for side in SIDES:
        for marker, (label, found) in zip(MARKERS * len(groups), groups.items()):
            line(axes, ticks, found, side, marker, label)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.set_xticks(range(len(ticks)), ticks)
    low, high = axes.get_ylim()
    axes.set_ylim((low, high * 10) if log else (0, high * 1.2))  # room for the legend
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)


def by_batch(cases: list[dict]) -> tuple[dict[str, list[tuple]], int | None]:
    """(host times of each kind of refresh, the input tokens: of several the fewest)."""
    found = [(case, re.search(r"bs(\d+)", case["name"]), re.search(r"len(\d+)", case["name"])) for case in cases]
    found = [(case, int(bs[1]), int(length[1])) for case, bs, length in found if case["metric"] == "host_us" and bs and length]
    shortest, groups = min((length for *_, length in found), default=None), {}
    for case, bs, length in found:
        if length == shortest:
            groups.setdefault(re.sub(r"-?(bs|len)\d+", "", case["name"]).strip("-"), []).append((bs, case))
    return groups, shortest


def draw_host(axes, cases: list[dict]) -> None:
    groups, length = by_batch(cases)
    draw(axes, groups, f"Host time of one refresh, {length} tokens", "batch", "us", log=True)


def save(head: dict, path: Path, *panels) -> list[Path]:
    """path: with one of SUFFIXES, or without for both. panels: each a function of the axes. What was written."""
    import matplotlib

    matplotlib.use("agg")  # no display needed
    from matplotlib import pyplot

    columns = len(panels) if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.5 * columns, 4 * rows), layout="constrained", squeeze=False)
    for panel, one in zip(panels, axes.flat):
        panel(one)
    for one in axes.flat[len(panels) :]:
        one.axis("off")
    figure.suptitle(f"{head['gpu'] or 'GPU unknown'}, sglang {head['sglang']}", fontsize=9, color="#5f6368")
    paths = [path] if path.suffix in SUFFIXES else [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    path.parent.mkdir(parents=True, exist_ok=True)
    for one in paths:
        figure.savefig(one, dpi=110, metadata={"Date": None} if one.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def host_by_batch(head: dict, cases: list[dict], path: Path) -> list[Path]:
    return save(head, path, lambda axes: draw_host(axes, cases))
