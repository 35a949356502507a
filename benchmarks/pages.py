"""Writes the tables of docs/performance.md from the committed results, so that no number there is typed.

    python -m benchmarks.pages [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.cases import parse

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/performance.md"
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)
FULL_STEPS = (20, 30, 40)  # ms on the GPU, assumed, of a step of a 61-layer model


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
                     f"{gpu['upstream'] / 1e3:.2f} → {gpu['ours'] / 1e3:.2f}" if gpu else ""])  # fmt: skip
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
                     f"{syncs['upstream']:.0f} → {syncs['ours']:.0f}"])  # fmt: skip
    return rows_of(["case", "host us", "ratio", "GPU us", "GPU operations", "syncs"], rows)


def estimate(of: str) -> str:
    """Per case what a step saved, and its share of a step that takes so long on the GPU."""
    rows = []
    for case in steps(load("server", of)).values():
        saved = case["upstream"] - case["ours"]
        rows.append([case["name"], f"{saved:.1f}", *(f"{saved / (step + saved):.0%}" for step in FULL_STEPS)])
    return rows_of(["case", "saved ms", *(f"at most, of {step} ms + saved" for step in FULL_STEPS)], rows)


TABLES = {"server": server, "replay": replay, "estimate": estimate}


def page(text: str) -> str:
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]](found[3]) + found[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    before = PAGE.read_text()
    after = page(before)
    if not parser.parse_args().check:
        PAGE.write_text(after)
    elif before != after:
        sys.exit(f"{PAGE.name}: stale; run python -m benchmarks.pages")


if __name__ == "__main__":
    main()
