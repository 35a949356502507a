"""The pictures of the README and of docs/performance.md, from the committed results.

python -m benchmarks.plot
"""

from functools import partial
from pathlib import Path

from benchmarks.cases import Case, parse
from benchmarks.kv_cache import MODELS
from benchmarks.pages import MODELS_RUN, load, pooled
from sglang_nsa_fused.tools import table_memory
from sglang_nsa_fused.tools.bench.plots import draw, save
from sglang_nsa_fused.tools.bench.record import SIDES

DOCS = Path(__file__).parents[1] / "docs"
REPLAYS, SMALL = ("h100-0.5.12.post1", "h200-0.5.23"), "h100-0.5.12.post1"
FULL = ("0.5.23-n5", "0.5.23-glm52")
KINDS = {"draft": "draft steps", "verify": "target verify", "extend": "draft extend"}
# Of a server's case -> how a picture calls it along its axis, and one value of it.
DIMENSIONS = {
    "length": ("input tokens", "{:,} tokens"),
    "batch": ("batch", "batch {}"),
    "draft_steps": ("draft steps", "{} draft steps"),
    "layers": ("layers", "{} layers"),
}


def of_metric(results: dict, metric: str) -> list[tuple[Case, dict]]:
    found = [(parse(case["name"]), case) for case in results["cases"] if case["metric"] == metric]
    return sorted(found, key=lambda pair: pair[0])


def gpu_by_batch(cases: list[tuple[Case, dict]], kind: str, axes) -> None:
    found = [(of, case) for of, case in cases if (of.kind, of.draft_steps, of.cache) == (kind, 4, "")]
    groups: dict[str, list] = {}
    for of, case in found:
        groups.setdefault(f"{of.length:,} tokens" + f", width {of.width:,}" * bool(of.width), []).append((of.batch, case))
    draw(axes, groups, f"GPU time of one refresh: {KINDS[kind]}", "batch", "us", log=True)


def along(cases: list[tuple[Case, dict]], dimension: str) -> tuple[str, dict[str, list]]:
    """The cases that differ in this dimension and in the cache alone, where most do: (what they share, cache -> (tick, case))."""
    alike: dict[Case, list] = {}
    for of, case in cases:
        alike.setdefault(of.but(**{dimension: 0, "cache": ""}), []).append((of, case))
    shared, found = max(alike.items(), key=lambda one: (len({getattr(of, dimension) for of, _ in one[1]}), -one[0].length))
    groups: dict[str, list] = {}
    for of, case in found:
        groups.setdefault(of.cache, []).append((getattr(of, dimension), case))
    fixed = [one.format(getattr(shared, other)) for other, (_, one) in DIMENSIONS.items() if other != dimension]
    return ", ".join(fixed) + ", one core" * shared.one_core, {cache: one for cache, one in groups.items() if len(one) > 1}


def step_along(cases: list[tuple[Case, dict]], dimension: str):
    """A panel, or None where nothing was measured at two places of this dimension."""
    shared, groups = along(cases, dimension)
    return partial(draw, groups=groups, title=shared, xlabel=DIMENSIONS[dimension][0], ylabel="step, ms") if groups else None


def full_depth(results: dict):
    """A panel: the step of one rank of eight."""
    found = of_metric(results, "decode_step_ms")
    at, _ = found[0]
    found = [(of, case) for of, case in found if of.length == at.length]
    title = f"{MODELS_RUN[results['model']]}, {at.draft_steps} draft steps, context {at.width:,}"
    groups = {f"{at.length:,} tokens": [(of.batch, case) for of, case in found]}
    return partial(draw, groups=groups, title=title, xlabel="batch", ylabel="step, ms")


def tables_by_batch(axes) -> None:
    """Computed, as benchmarks.pages' table of them."""
    groups: dict[str, list] = {}
    for model in MODELS:
        for bs in (32, 64, 128, 256):
            held = table_memory.total(table_memory.tables(model.context, bs, model.draft_tokens))
            groups.setdefault(model.name, []).append((bs, {side: getattr(held, side) / 2**30 for side in SIDES}))
    draw(axes, groups, "Page tables of the graphs, a GPU", "graphs up to batch", "GiB")


def main(folder: Path = DOCS) -> None:
    for release in REPLAYS:
        gpu = of_metric(replays := load("replay", release), "gpu_us")
        save(replays, folder / f"gpu-{release}.png", *(partial(gpu_by_batch, gpu, kind) for kind in KINDS))
    servers = load("server", SMALL)
    steps = of_metric(servers, "decode_step_ms")
    save(servers, folder / f"step-{SMALL}.png", *(panel for of in DIMENSIONS if (panel := step_along(steps, of))))
    full = [pooled(name) for name in FULL]
    save(full[0], folder / "gain-h200-0.5.23.png", tables_by_batch, *map(full_depth, full))


if __name__ == "__main__":
    main()
