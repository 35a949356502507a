"""What the runs of both sides come to: the values of each round, a paired test over the rounds, and whether the tokens
are the same."""

import statistics
from collections import Counter

import numpy

from sglang_nsa_fused.tools.bench import record
from sglang_nsa_fused.tools.bench.drive import Run
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM

LEVEL = 0.05  # of p, below which a difference is called one
LEAST_ROUNDS = 6  # with fewer no p is below it
GAIN, LOSS, NONE, FEW = "gain", "loss", "no difference shown", "too few rounds"
# metric -> what it is, in a table. All but the first two are better when smaller.
METRICS = {
    "tokens_per_s": "output tokens/s",
    "accept_length": "accepted length",
    "tpot_ms": "time per output token, ms",
    "itl_p50_ms": "inter-token latency p50, ms",
    "itl_p90_ms": "inter-token latency p90, ms",
    "itl_p99_ms": "inter-token latency p99, ms",
    "ttft_ms": "time to first token, ms",
    "step_ms": "speculative step, ms",
    "host_us": "refresh, host us",
    "gpu_draft_us": "draft graph, GPU us",
    "peak_mib": "peak memory, MiB",
    "table_bytes": "tables of the graphs, MiB",
}
PARTS = ("", "draft", "verify", "extend")
BETTER_LARGER = ("tokens_per_s", "accept_length")


def latencies(runs: list[Run]) -> dict[str, float]:
    """metric -> value, over all requests of these runs; medians, unless the metric's name says otherwise."""
    answers = [answer for run in runs for answer in run.answers]
    tokens, steps = (sum(of) for of in ([a.tokens[-1] for a in answers], [a.verify_steps for a in answers]))
    found = {
        "tokens_per_s": tokens / sum((run.end - run.start) / 1e9 for run in runs),
        "ttft_ms": statistics.median(answer.ttft_ms for answer in answers),
    }
    if gaps := [gap for answer in answers for gap in answer.itl_ms]:
        found |= {f"itl_p{part}_ms": percentile(gaps, part) for part in (50, 90, 99)}
    for metric in ("tpot_ms", "step_ms"):
        if values := [value for answer in answers if (value := getattr(answer, metric)) is not None]:
            found[metric] = statistics.median(values)
    return found | ({"accept_length": tokens / steps} if steps else {})


def percentile(values: list[float], part: float) -> float:
    return float(numpy.percentile(values, part))


def paired_p(upstream: list[float], ours: list[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test over the rounds, exact; 1 where no round differs."""
    from scipy import stats  # takes most of a second

    differences = [one - other for one, other in zip(upstream, ours, strict=True) if one != other]
    return float(stats.wilcoxon(differences, method="exact").pvalue) if differences else 1.0


def verdict(metric: str, upstream: list[float], ours: list[float], p: float) -> str:
    if p >= LEVEL:
        return NONE if len(upstream) >= LEAST_ROUNDS else FEW
    larger = statistics.median(one - other for one, other in zip(ours, upstream)) > 0
    return GAIN if larger == (metric in BETTER_LARGER) else LOSS


def row(name: str, metric: str, rounds: dict[str, list], **more) -> dict:
    """A case of a result file. rounds: side -> a value of each round, None where a round has none."""
    whole = [pair for pair in zip(*(rounds[side] for side in SIDES)) if None not in pair]
    upstream, ours = map(list, zip(*whole))
    p, values = paired_p(upstream, ours), dict(zip(SIDES, (upstream, ours)))
    return record.case(
        name,
        metric,
        statistics.median(upstream),
        statistics.median(ours),
        len(whole),
        **more,
        spread={side: record.spread(values[side]) for side in SIDES},
        ratio_spread=record.spread([one / other for one, other in whole if other]) if any(ours) else None,
        p=round(p, 6),
        verdict=verdict(metric, upstream, ours, p),
        rounds={side: [round(value, 4) for value in values[side]] for side in SIDES},
    )


def rows(name: str, rounds: list[dict[str, dict]], **more) -> list[dict]:
    """rounds: side -> (part, metric) -> value, for each round; part: of the case, for its name, or "". What no round has on
    both sides is left out."""
    found, seen = [], {key for one in rounds for side in SIDES for key in one[side]}
    for part, metric in sorted(seen, key=lambda key: (list(METRICS).index(key[1]), PARTS.index(key[0]))):
        values = {side: [one[side].get((part, metric)) for one in rounds] for side in SIDES}
        if any(None not in pair for pair in zip(*values.values())):
            found.append(row(f"{name}-{part}" if part else name, metric, values, **more))
    return found


def first_difference(upstream: tuple, ours: tuple) -> str | None:
    """Of the output ids of the same requests; None where there is none."""
    for number, (left, right) in enumerate(zip(upstream, ours, strict=True)):
        if left != right:
            at = next((at for at, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), min(len(left), len(right)))
            pair = (ids[at] if at < len(ids) else "nothing" for ids in (left, right))
            return "request {}, token {}: {} and {}".format(number, at, *pair)
    return None


def most_alike(batches: list[list[tuple]]) -> tuple[tuple, list[int]]:
    """batches: of each side, how the scheduler put together the requests of each repeat of one call: how many have come when it
    looks is chance, and other batches round otherwise. The way that both sides took most often, and how often each did."""
    times = [Counter(of) for of in batches]
    found = max(times[0], key=lambda one: min(side[one] for side in times))
    return found, [side[found] for side in times]


def same_tokens(rounds: list[dict[str, list[Run]]], repeats: dict[str, list[tuple]]) -> tuple[bool | None, str]:
    """(whether they are, None where it cannot be said; why not).

    rounds: those whose batches are the same on both sides. repeats: output ids of one call, each time with an empty prefix
    cache. Where sglang does not repeat itself (its top-k takes tokens in any order, which shows beyond index_topk tokens),
    there is nothing to compare with.
    """
    if any(side not in repeats for side in SIDES):
        return None, "it ended before"
    if len(set(repeats[UPSTREAM])) > 1:
        return None, "sglang's own outputs differ from repeat to repeat"
    pairs = [
        (f"round {number}", upstream.output_ids, ours.output_ids)
        for number, one in enumerate(rounds, 1)
        for upstream, ours in zip(one[UPSTREAM], one[OURS])
    ]
    for name, upstream, ours in [*pairs, *(("repeats", repeats[UPSTREAM][0], ours) for ours in repeats[OURS])]:
        if difference := first_difference(upstream, ours):
            return False, f"{name}, {difference}"
    return True, ""
