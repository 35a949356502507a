"""Writes the tables of the README and of docs/ from the committed results, and from what page tables take, so that no number
there is typed.

    python -m benchmarks.pages [--check]
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Sequence

from benchmarks.cases import Case, parse
from benchmarks.kv_cache import MODELS, bytes_per_token
from sglang_nsa_fused.tools import table_memory
from sglang_nsa_fused.tools.bench import record
from sglang_nsa_fused.tools.bench.record import SIDES
from sglang_nsa_fused.tools.bench.servers import CACHES
from sglang_nsa_fused.tools.bench.small_model import LAYERS

HERE = Path(__file__).parent
# Metric of a refresh -> column, its decimals, and what it counts in.
OF_REFRESHES = {
    "gpu_us": ("GPU us", 1, 1),
    "launches": ("GPU operations", 0, 1),
    "syncs": ("syncs", 0, 1),
    "table_bytes": ("MiB held", 1, 2**20),
}
PAGES = tuple(HERE.parent / page for page in ("README.md", "docs/performance.md", "docs/memory.md"))
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)
MODELS_RUN = {"model-v32-rank8": "DeepSeek-V3.2", "model-glm52-rank8": "GLM-5.2"}  # one rank of eight, at full depth
# Starts that are shown together -> their result files; those from 0.5.23-n3-8long on are of several machines.
POOLED = {
    "0.5.23-n3": ("h100-0.5.23-rank8-n3-gpu0", "h100-0.5.23-rank8-n3-gpu1"),
    "0.5.23-n5": ("h200-0.5.23-rank8-n5-gpu2", "h200-0.5.23-rank8-n5-gpu3"),
    "0.5.23-glm52": ("h200-0.5.23-glm52-rank8-gpu0", "h200-0.5.23-glm52-rank8-gpu1"),
    "0.5.12.post1": ("h100-0.5.12.post1-rank8-gpu2", "h100-0.5.12.post1-rank8-gpu3"),
    "0.5.23-n3-8long": (
        "h100-0.5.23-rank8-n3-8long-gpu0",
        "h100-0.5.23-rank8-n3-8long-gpu2",
        "h100-0.5.23-rank8-n3-8long-later-gpu0",
        "h100-0.5.23-rank8-n3-8long-later-gpu1",
    ),
    "0.5.23-n5-8long": (
        "h100-0.5.23-rank8-n5-8long",
        "h100-0.5.23-rank8-n5-8x131072",
        "h100-0.5.23-rank8-n5-8long-later-gpu2",
        "h100-0.5.23-rank8-n5-8long-later-gpu3",
    ),
    "0.5.23-n3-speeds": (
        "h100-0.5.23-rank8-n3-first-gpu1",
        "h100-0.5.23-rank8-n3-first-gpu3",
        "h100-0.5.23-rank8-n3-gpu0",
        "h100-0.5.23-rank8-n3-gpu1",
        "h100-0.5.23-rank8-n3-gpu2",
        "h100-0.5.23-rank8-n3-gpu3",
        "h200-0.5.23-rank8-n3-gpu0",
        "h200-0.5.23-rank8-n3-gpu1",
        "h200-0.5.23-rank8-n3-gpu2",
        "h200-0.5.23-rank8-n3-gpu3",
        "h200-0.5.23-rank8-n3-together",
        "h200-0.5.23-rank8-n3-together-later",
    ),
    "0.5.23-n5-speeds": ("h200-0.5.23-rank8-n5-together", "h200-0.5.23-rank8-n5-together-later"),
    "0.5.23-n5-all": ("h200-0.5.23-rank8-n5-all-rows", "h200-0.5.23-rank8-n5-gpu2", "h200-0.5.23-rank8-n5-gpu3"),
    "0.5.23-n3-8long-h200": ("h200-0.5.23-rank8-n3-8long", "h200-0.5.23-rank8-n3-128", "h200-0.5.23-rank8-n3-8x131072"),
    "0.5.23-n5-8long-h200": ("h200-0.5.23-rank8-n5-8long", "h200-0.5.23-rank8-n5-8x32768", "h200-0.5.23-rank8-n5-128"),
    "0.5.23-n3-small": ("h200-0.5.23-rank8-n3", "h200-0.5.23-rank8-n3-gpu3"),
    "0.5.23-n3-large": ("h200-0.5.23-rank8-n3-all-rows", "h200-0.5.23-rank8-n3-gpu3"),
    "0.5.23-n3-long": ("h200-0.5.23-rank8-n3-all-rows", "h200-0.5.23-rank8-n3-128", "h200-0.5.23-rank8-n3-gpu3"),
    "0.5.12.post1-h200": (
        "h200-0.5.12.post1-rank8",
        "h200-0.5.12.post1-rank8-gpu0",
        "h200-0.5.12.post1-rank8-gpu0-later",
    ),
}
FAST_US = 0.3  # between two kernels: 0.41 and more, or 0.16 and less
CHANGED = 0.985  # or less of the time of the plugin's draft graph at batch 128: 0.96 to 0.98, or 0.99 to 1.00
# What the pages show of a release's servers with the small model.
SHOWN = {
    "h200-0.5.23-wide": (
        "n5-bs8-len512-width1048576-bf16",
        "n5-bs64-len512-width1048576-bf16",
        "n5-bs64-len512-width163840-bf16",
    ),
    "h100-0.5.12.post1": (
        "n4-bs1-len512-bf16",
        "n4-bs8-len512-bf16",
        "n4-bs32-len512-bf16",
        "n4-bs1-len131072-bf16",
        "n4-bs1-len131072-fp8",
        "n2-bs1-len512-bf16",
        "n7-bs1-len512-bf16",
        "n4-bs1-len512-bf16-layers8",
        "n4-bs1-len512-bf16-1core",
    ),
    "h100-0.5.17": (
        "n4-bs1-len512-bf16",
        "n4-bs32-len512-bf16",
        "n4-bs1-len32768-bf16",
        "n4-bs1-len131072-bf16",
        "n4-bs1-len131072-fp8",
    ),
    "h100-0.5.17-steps-layers-core": ("n7-bs1-len512-bf16", "n4-bs1-len512-bf16-layers8", "n4-bs1-len512-bf16-1core"),
    "h100-0.5.17-long": ("n7-bs1-len131072-bf16",),
}
# And of its refreshes alone: those of four draft steps, a bf16 cache and these batch sizes.
SHOWN_BATCHES = (1, 64)


def load(what: str, of: str) -> dict:
    return json.loads((HERE / f"results/{what}-{of}.json").read_text())


def by_name(results: dict, metric: str) -> dict[str, dict]:
    """In the order in which cases are listed."""
    found = [case for case in results["cases"] if case["metric"] == metric]
    return {case["name"]: case for case in sorted(found, key=lambda case: parse(case["name"]))}


def rows_of(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def least_to_most(values: Sequence[float], digits: int) -> str:
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))))


def start_words(plugin: bool, changed: bool, *more: str, switched: bool = False) -> str:
    """changed: its graphs became faster while it ran. switched: another process had made a context on its GPU."""
    after = ["after another's context"] if switched else ["after it changed"] * changed
    return ", ".join(["with the plugin" if plugin else "sglang", *more, *after])


def has_changed(start: dict) -> bool:
    """Whether a start of `speeds` had become faster when it was profiled."""
    return start.get("between_kernels_us", math.inf) < FAST_US


def steps(results: dict) -> dict[str, dict]:
    """decode_step_ms, or step_ms in a file from before there was that."""
    return by_name(results, "decode_step_ms") or by_name(results, "step_ms")


def pooled(of: str) -> dict:
    """The first of these server result files, with the steps of all: of a case the median of their starts, and as spread the
    fastest and the slowest start; tables: what the graphs held in each file that has it. of: one of POOLED, or a file."""
    files, found, held = [load("server", name) for name in POOLED.get(of, (of,))], {}, {}
    for results in files:
        tables = {one["name"]: one["table_bytes"] for one in results["configurations"]}
        for case in steps(results).values():
            starts = found.setdefault(case["name"], {side: [] for side in SIDES})
            for side in SIDES:
                starts[side] += case["processes"][side]
            held.setdefault(case["name"], []).append(tables[re.sub(r"-bs\d+-len\d+", "", case["name"])])
    cases = [of_starts(name, found[name], tables=held[name]) for name in sorted(found, key=parse)]
    return files[0] | {"cases": cases}


def unchanged(of: str, gpu: str) -> dict:
    """As pooled, of the starts of `speeds` on such a GPU that add nothing, had not changed and were not made to. Those whose
    profile is not kept count among them. of: one of POOLED."""
    files = [results for name in POOLED[of] if (results := load("speeds", name))["gpu"].split()[1] == gpu]
    found: dict[str, dict[str, list[float]]] = {}
    for results in files:
        for one in results["starts"]:
            if not ("+" in one["start"] or has_changed(one) or one.get("switched")):
                name = f"n{results['draft_steps']}-{one['case']}-width{results['context_length']}-bf16"
                starts = found.setdefault(name, {side: [] for side in SIDES})
                starts["ours" if one["start"] == "on" else "upstream"].append(one["decode_step_ms"])
    return files[0] | {"cases": [of_starts(name, found[name]) for name in sorted(found, key=parse)]}


def of_starts(name: str, starts: dict[str, list[float]], **more) -> dict:
    medians = [statistics.median(starts[side]) for side in SIDES]
    spread = {side: [min(of), max(of)] for side, of in starts.items()}
    fewest = min(map(len, starts.values()))
    return record.case(name, "decode_step_ms", *medians, fewest, spread=spread, processes=starts, **more)


def full(of: str) -> str:
    """Servers with a model of full depth. of: as in pooled, with commas between; of NAME:8x512+64x512 these cases alone; of
    NAME@H200 the starts as in unchanged, whose files do not tell what the tables take."""
    rows = []
    for name, _, shown in (one.partition(":") for one in of.split(",")):
        pool, _, gpu = name.partition("@")
        results = unchanged(pool, gpu) if gpu else pooled(pool)
        for case in results["cases"]:
            at = parse(case["name"])
            if shown and f"{at.batch}x{at.length}" not in shown.split("+"):
                continue
            row = [MODELS_RUN[results["model"]] + ", fp8 cache" * (at.cache == "fp8"), f"{at.draft_steps}, {at.width:,}"]
            row.append(f"{at.batch} x {at.length:,}")
            tables = case.get("tables", ())
            row.append(" → ".join(least_to_most([held[side] / 2**30 for held in tables], 2) for side in SIDES if tables) or "–")
            times = [f"{case[side]:.1f} ({case['spread'][side][0]:.1f} to {case['spread'][side][1]:.1f})" for side in SIDES]
            starts = " and ".join(str(len(case["processes"][side])) for side in SIDES)
            release = f"{results['sglang']}, {results['gpu'].split()[1]}"  # NVIDIA H100 80GB HBM3
            rows.append([release, *row, *times, f"{case['ratio']:.2f}", starts])
    header = ["sglang, GPU", "model", "draft steps, context", "batch x tokens", "GiB of tables"]
    return rows_of([*header, "step ms, sglang", "with the plugin", "times", "starts"], rows)


def replay(of: str) -> str:
    """A file from before memory was measured has no such column."""
    results = load("replay", of)
    others = {metric: found for metric in OF_REFRESHES if (found := by_name(results, metric))}
    rows = []
    for name, case in by_name(results, "host_us").items():
        at = parse(name)
        if at.draft_steps != 4 or at.cache or at.batch not in SHOWN_BATCHES:
            continue
        row = [name, f"{case['upstream']:.0f} → {case['ours']:.0f}", f"{case['ratio']:.1f}"]
        for metric, found in others.items():
            _, digits, unit = OF_REFRESHES[metric]
            row.append(" → ".join(f"{found[name][side] / unit:.{digits}f}" for side in SIDES))
        rows.append(row)
    return rows_of(["case", "host us", "ratio", *(OF_REFRESHES[metric][0] for metric in others)], rows)


def gain(of: str) -> str:
    """of: those of SHOWN, with commas between."""
    rows = []
    for release in of.split(","):
        results = load("server", release)
        found = steps(results)
        for case in (found[name] for name in SHOWN[release]):
            values = [f"{case[side]:.1f} ms" for side in SIDES]
            rows.append([results["sglang"], words(parse(case["name"])), *values, f"{case['ratio']:.2f}"])
    return rows_of(["sglang", "server", "step, sglang", "with the plugin", "times"], rows)


def words(of: Case) -> str:
    """What a server's case is, but for what the README says of all."""
    batch = f"batch {of.batch}, {of.length:,} tokens, {of.draft_steps} draft steps, {of.cache}"
    batch += f", context {of.width:,}" * (of.width > 0)
    return batch + f", {of.layers} layers" * (of.layers != LAYERS) + ", on one core" * of.one_core


def models(of: str) -> str:
    """of: the release of sglang that benchmarks.kv_cache is about."""
    rows = []
    for model in MODELS:
        per_token = [f"{bytes_per_token(model, cache):,}" for cache in CACHES]
        layers = [f"{model.layers} + 1", f"{model.indexers} + 1"]
        rows.append([model.name, f"{model.context:,}", model.draft_tokens, *layers, *per_token])
    per_token = [f"bytes of a token, {cache} cache" for cache in CACHES]
    return rows_of([f"in sglang {of}", "context", "draft tokens", "layers", "with an indexer", *per_token], rows)


def memory(of: str) -> str:
    """By the largest captured batch size. of: batch sizes, as 32,64."""
    rows = []
    for model in MODELS:
        for bs in map(int, of.split(",")):
            held = table_memory.total(table_memory.tables(model.context, bs, model.draft_tokens))
            tokens = [int((held.upstream - held.ours) / bytes_per_token(model, cache)) for cache in CACHES]
            gib = [f"{size / 2**30:.2f}" for size in (held.upstream, held.ours, held.upstream - held.ours)]
            rows.append([model.name, bs, *gib, *(f"{one // 100 * 100:,}" for one in tokens)])
    in_tokens = [f"= tokens of {cache} cache" for cache in CACHES]
    return rows_of(["model", "graphs up to batch", "GiB without", "GiB with", "GiB less", *in_tokens], rows)


def fraction(of: str) -> str:
    results = load("memory", of)
    found = {one["metric"]: one for one in results["cases"]}
    shown = {"mem_fraction": ("highest --mem-fraction-static", ".2f"), "pool_tokens": ("tokens of KV cache", ",.0f")}
    rows = [[label, *(f"{found[metric][side]:{form}}" for side in SIDES)] for metric, (label, form) in shown.items()]
    return rows_of([results["gpu"], f"sglang {results['sglang']}", "with the plugin"], rows)


def graphs(of: str) -> str:
    """A step of a server without the plugin, with its launches before the graphs, and in them."""
    found: dict[str, dict[str, dict]] = {}
    for one in load("graphs", of)["cases"]:
        found.setdefault(one["name"], {})[one["metric"]] = one
    metrics = {
        "plugin_launches": ("the plugin's launches", 0),
        "launches": ("all launches", 0),
        "plugin_nodes": ("nodes in graphs", 0),
        "gap_draft_us": ("us to the draft graph", 1),
        "gap_verify_us": ("to the verify graph", 1),
        "gap_extend_us": ("to the draft extend graph", 1),
    }
    rows = []
    for name, of_case in found.items():
        values = [
            " → ".join(f"{of_case[metric][way]:.{digits}f}" for way in ("upstream", "before", "ours"))
            for metric, (_, digits) in metrics.items()
        ]
        rows.append([name, *values])
    return rows_of(["case", *(label for label, _ in metrics.values())], rows)


def speeds(of: str) -> str:
    """Starts with a profile each, those that differ in nothing in one row, and in others those that were profiled after they had
    changed, or after the GPU had been made to switch contexts. of: one of POOLED, a colon, and the case."""
    of, _, shown = of.partition(":")
    starts: dict[tuple[str, str, bool, bool], list[dict]] = {}
    for results in (load("speeds", name) for name in POOLED[of]):
        for one in results["starts"]:
            if one["case"] == shown:
                at = (results["gpu"].split()[1], one["start"], one.get("switched", False), has_changed(one))
                starts.setdefault(at, []).append(one)
    rows = []
    for key in sorted(starts, key=lambda key: (key[0], key[1].count("+"), key[1].startswith("on"), *key[1:])):
        gpu, start, switched, fast = key
        side, *more = start.replace("SGLANG_NSA_FUSED_", "").split("+")
        row = [gpu, start_words(side == "on", fast, *(f"`{one}`" for one in more), switched=switched), len(starts[key])]
        for metric, digits, unit in (
            ("decode_step_ms", 2, 1),
            ("between_kernels_us", 2, 1),
            ("graph_verify_us", 2, 1e3),
            ("experts_beside_us", 0, 1),
            ("experts_alone_us", 0, 1),
        ):
            row.append(least_to_most([one[metric] / unit for one in starts[key] if one.get(metric)], digits))
        beside, alone = (sum(one[f"experts_{how}"] for one in starts[key]) for how in ("beside", "alone"))
        rows.append([*row, f"{100 * alone / (beside + alone):.1f}"])
    header = ["GPU", "start", "starts", "step, ms", "between kernels, us", "verify graph, ms"]
    return rows_of([*header, "experts' kernel beside a GEMM, us", "alone, us", "% alone"], rows)


def changed(of: str) -> str:
    """Starts by whether they had changed when they served 128 requests, which their draft graph tells. of: some of POOLED, with
    commas between."""
    of_start = (
        ("gpu_draft_us", "bs128-len512", 0),
        ("decode_step_ms", "bs1-len32768", 1),
        ("decode_step_ms", "bs1-len131072", 1),
    )
    rows = []
    for pool in of.split(","):
        starts: dict[tuple[bool, bool], list[tuple[float, ...]]] = {}
        for results in (load("server", name) for name in POOLED[pool]):
            cases = [
                next(case for name, case in by_name(results, metric).items() if f"-{at}-" in name) for metric, at, _ in of_start
            ]
            usual = statistics.median(cases[0]["processes"]["ours"])
            for side in SIDES:
                for values in zip(*(case["processes"][side] for case in cases)):
                    starts.setdefault((side == "ours", values[0] < CHANGED * usual), []).append(values)
        for plugin, has in sorted(starts):
            found = starts[plugin, has]
            times = [least_to_most(values, digits) for values, (*_, digits) in zip(zip(*found), of_start)]
            gpu, draft_steps = results["gpu"].split()[1], parse(cases[0]["name"]).draft_steps
            rows.append([f"{gpu}, {draft_steps}", start_words(plugin, has), len(found), *times])
    header = ["GPU, draft steps", "start", "starts", "draft graph at 128 x 512, us", "step at 1 x 32,768, ms", "at 1 x 131,072"]
    return rows_of(header, rows)


TABLES = {
    "changed": changed,
    "graphs": graphs,
    "speeds": speeds,
    "full": full,
    "replay": replay,
    "gain": gain,
    "models": models,
    "memory": memory,
    "fraction": fraction,
}


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
