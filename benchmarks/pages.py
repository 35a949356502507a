"""Writes the tables of the README and of docs/performance.md from the committed results, so that no number there is typed.

    python -m benchmarks.pages [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.cases import Case, parse
from sglang_nsa_fused.bench.small_model import LAYERS

HERE = Path(__file__).parent
PAGES = tuple(HERE.parent / page for page in ("README.md", "docs/performance.md"))
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)
FULL_STEPS = (20, 30, 40)  # ms on the GPU, assumed, of a step of a 61-layer model
# What the README shows of a release's servers.
SHOWN = {
    "h100-0.5.12.post1": (
        "n4-bs1-len512-bf16", "n4-bs8-len512-bf16", "n4-bs32-len512-bf16", "n4-bs1-len32768-bf16", "n4-bs1-len131072-bf16",
        "n4-bs1-len131072-fp8", "n2-bs1-len512-bf16", "n7-bs1-len512-bf16", "n4-bs1-len512-bf16-layers8", "n4-bs1-len512-bf16-1core",
    ),
    "h100-0.5.17": (
        "n4-bs1-len512-bf16", "n4-bs32-len512-bf16", "n4-bs1-len32768-bf16", "n4-bs1-len131072-bf16", "n4-bs1-len131072-fp8",
    ),
    "h100-0.5.17-steps-layers-core": (
        "n2-bs1-len512-bf16", "n7-bs1-len512-bf16", "n4-bs1-len512-bf16-layers8", "n4-bs1-len512-bf16-1core",
    ),
    "h100-0.5.17-long": ("n7-bs1-len131072-bf16",),
    "h100-0.5.17-one-server": ("n7-bs1-len512-bf16-within",),
}


def load(what: str, of: str) -> dict:
    return json.loads((HERE / f"results/{what}-{of}.json").read_text())


def by_name(results: dict, metric: str) -> dict[str, dict]:
    """In the order in which cases are listed."""
    found = [case for case in results["cases"] if case["metric"] == metric]
    return {case["name"]: case for case in sorted(found, key=lambda case: parse(case["name"]))}


def rows_of(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def steps(results: dict) -> dict[str, dict]:
    """decode_step_ms, or step_ms in a file from before there was that."""
    return by_name(results, "decode_step_ms") or by_name(results, "step_ms")


def server(of: str) -> str:
    results = load("server", of)
    host, graph = by_name(results, "host_us"), by_name(results, "gpu_draft_us")
    rows = []
    for case in steps(results).values():
        spread = [f"{case[side]:.1f} ({case['spread'][side][0]:.1f} to {case['spread'][side][1]:.1f})" for side in ("upstream", "ours")]
        kinds = [host.get(f"{case['name']}-{kind}") for kind in ("draft", "verify", "extend")]
        refreshes = [f"{one['upstream']:.0f} → {one['ours']:.0f}" if one else "" for one in kinds]
        gpu = graph.get(case["name"])
        rows.append([case["name"], *spread, f"{case['ratio']:.2f}", *refreshes,
                     f"{gpu['upstream'] / 1e3:.2f} → {gpu['ours'] / 1e3:.2f}" if gpu else ""])
    header = ["case", "step ms, sglang", "with the plugin", "ratio", "draft us", "verify us", "extend us", "draft graph, GPU ms"]
    return rows_of(header, rows)


def replay(of: str) -> str:
    results = load("replay", of)
    others = {metric: by_name(results, metric) for metric in ("gpu_us", "launches", "syncs")}
    rows = []
    for case in by_name(results, "host_us").values():
        gpu, launches, syncs = (others[metric][case["name"]] for metric in ("gpu_us", "launches", "syncs"))
        rows.append([case["name"], f"{case['upstream']:.0f} → {case['ours']:.0f}", f"{case['ratio']:.1f}",
                     f"{gpu['upstream']:.1f} → {gpu['ours']:.1f}", f"{launches['upstream']:.0f} → {launches['ours']:.0f}",
                     f"{syncs['upstream']:.0f} → {syncs['ours']:.0f}"])
    return rows_of(["case", "host us", "ratio", "GPU us", "GPU operations", "syncs"], rows)


def gain(of: str) -> str:
    """Of the releases of SHOWN whose names begin so."""
    rows = []
    for release, names in SHOWN.items():
        if release.startswith(of):
            results = load("server", release)
            found = steps(results)
            for case in (found[name] for name in names):
                values = [f"{case[side]:.1f} ms" for side in ("upstream", "ours")]
                rows.append([results["sglang"], words(parse(case["name"])), *values, f"{case['ratio']:.2f}"])
    return rows_of(["sglang", "server", "step, sglang", "with the plugin", "times"], rows)


def words(of: Case) -> str:
    """What a server's case is, but for what the README says of all."""
    batch = f"batch {of.batch}, {of.length:,} tokens, {of.draft_steps} draft steps, {of.cache}"
    return batch + f", {of.layers} layers" * (of.layers != LAYERS) + ", on one core" * of.one_core + ", in one server" * of.within


def estimate(of: str) -> str:
    """What a step saved with the most layers measured, and what the draft graph saves by its schedule at a length on top, which
    no layer of the target changes; and their share of a step that takes so long on the GPU."""
    results = load("server", of)
    all_steps, graphs = steps(results), by_name(results, "gpu_draft_us")
    most = max(parse(name).layers for name in all_steps)
    rows = []
    for name, case in all_steps.items():
        if (base := parse(name)).layers == most:
            saved = case["upstream"] - case["ours"]
            rows.append(row_of(name, saved))
            for other, graph in graphs.items():
                if (at := parse(other)).but(length=0) == base.but(length=0, layers=LAYERS) and at.length > base.length:
                    rows.append(row_of(f"{name}, schedule of {other}", saved + (graph["upstream"] - graph["ours"]) / 1e3))
    return rows_of(["case", "saved ms", *(f"of {step} ms + saved" for step in FULL_STEPS)], rows)


def row_of(name: str, saved: float) -> list[str]:
    return [name, f"{saved:.2f}", *(f"{saved / (step + saved):.1%}" for step in FULL_STEPS)]


TABLES = {"server": server, "replay": replay, "gain": gain, "estimate": estimate}


def page(text: str) -> str:
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]](found[3]) + found[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    check, stale = parser.parse_args().check, []
    for path in PAGES:
        before = path.read_text()
        if before != (after := page(before)):
            stale.append(path.name)
            if not check:
                path.write_text(after)
    if check and stale:
        sys.exit(f"{', '.join(stale)}: stale; run python -m benchmarks.pages")


if __name__ == "__main__":
    main()
