"""What the starts of both sides come to: the cases of a result file, and whether the tokens are the same."""

import hashlib
import itertools
import json
import statistics
from collections import Counter

from sglang_nsa_fused.tools.bench import record
from sglang_nsa_fused.tools.bench.measure import Case, Run, Start
from sglang_nsa_fused.tools.bench.process import drafts
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM

# Metric -> what it is, in a table. Of the first two more is better.
METRICS = {
    "tokens_per_s": "output tokens/s (+)",
    "accept_length": "accepted length (+)",
    "step_ms": "call by its verify steps, ms",
    "decode_step_ms": "step, draft to draft, ms",
    "host_us": "refresh, host us",
    "gpu_draft_us": "draft graph, GPU us",
    "sm_mhz": "clock of the SMs, MHz",
    "watts": "power, W",
    "table_bytes": "tables of the graphs, MiB",
}
GRAPH = "draft graph"  # seen while observed alone
# The probe's kind of sample -> (part of a case's name, metric).
KINDS = {
    "draft": ("-draft", "host_us"),
    "verify": ("-verify", "host_us"),
    "extend": ("-extend", "host_us"),
    GRAPH: ("", "gpu_draft_us"),
}


def by_side(starts: list[Start], values) -> dict[str, list]:
    """values: of a start."""
    return {side: [values(start) for start in starts if start.side == side] for side in SIDES}


def full_batches(samples: list[dict], run: Run, bs: int, kind: str) -> list[dict]:
    """While requests come and go there are other batches."""
    return [one for one in samples if one.get("kind") == kind and run.start <= one["at"] <= run.end and one["bs"] >= bs]


def decode_steps(samples: list[dict], runs: list[Run], bs: int) -> list[float]:
    """Milliseconds from one refresh for the draft steps to the next, of full batches within a run."""
    at = [sorted(one["at"] for one in full_batches(samples, run, bs, "draft")) for run in runs]
    return [(one - before) / 1e6 for of in at for before, one in itertools.pairwise(of)]


def table_bytes(starts: list[Start]) -> dict[str, int]:
    """That the graphs hold, of the scheduler process that holds most; empty where no probe told."""
    found = by_side(
        starts, lambda start: max((one["table_bytes"] for one in start.samples if "table_bytes" in one), default=None)
    )
    return {side: max(of) for side, of in found.items() if of and None not in of}


def result(name: str, metric: str, values: dict[str, list[list[float]]], **more) -> dict:
    """Of all samples of a side; processes: the median of each of its starts, which tells how much they differ."""
    pooled = {side: list(itertools.chain(*of)) for side, of in values.items()}
    upstream, ours = (statistics.median(pooled[side]) for side in SIDES)
    spread = {side: record.spread(of) for side, of in pooled.items()}
    processes = {side: [round(statistics.median(one), 3) for one in of] for side, of in values.items()}
    return record.case(name, metric, upstream, ours, min(map(len, pooled.values())), spread=spread, processes=processes, **more)


def cases(name: str, case: Case, starts: list[Start]) -> tuple[list[dict], list[str], list[str]]:
    """All metrics of a case, how its tokens differ, and what the probe did not see; nothing until there is a start of each
    side."""
    if {start.side for start in starts} != set(SIDES):
        return [], [], []
    same, wrong = tokens(name, case, starts)
    drafted = by_side(starts, lambda start: any("drafts" in one for one in start.samples) or not start.samples)
    unseen = [f"{name}: the probe saw no draft tokens of {side}" for side, of in drafted.items() if not all(of)]
    steps = by_side(starts, lambda start: [run.steps for run in start.runs[case]])
    more = same | {"verify_steps": {side: statistics.median(itertools.chain(*of)) for side, of in steps.items()}}
    metrics = {
        "step_ms": lambda start: [run.step_ms for run in start.runs[case]],
        "decode_step_ms": lambda start: decode_steps(start.samples, start.runs[case], case.batch),
        "tokens_per_s": lambda start: [run.tokens / (run.end - run.start) * 1e9 for run in start.runs[case]],
        "accept_length": lambda start: [run.accepted for run in start.runs[case]],
        "sm_mhz": lambda start: [mhz for mhz, _ in start.clocks.get(case, [])],
        "watts": lambda start: [watts for _, watts in start.clocks.get(case, [])],
    }
    found = [(name, metric, by_side(starts, values)) for metric, values in metrics.items()]
    for kind, (part, metric) in KINDS.items():

        def us(start: Start, kind=kind) -> list[float]:
            runs = (start.observed if kind == GRAPH else start.runs)[case]
            return [one["ns"] / 1e3 for run in runs for one in full_batches(start.samples, run, case.batch, kind)]

        found.append((name + part, metric, by_side(starts, us)))
        if starts[0].samples and not all(itertools.chain(*found[-1][2].values())):
            unseen.append(f"{name}: the probe saw no {kind} of a full batch")
    return [result(*one, **more) for one in found if all(itertools.chain(*one[2].values()))], wrong, unseen


def most_alike(batches: list[list[tuple]]) -> tuple[tuple, list[int]]:
    """batches: of each side, how the scheduler put together the requests of each repeat of one call: how many have come when it
    looks is chance, and other batches round otherwise. The way that both sides took most often, and how often each did."""
    times = [Counter(of) for of in batches]
    found = max(times[0], key=lambda one: min(side[one] for side in times))
    return found, [side[found] for side in times]


def tokens(name: str, case: Case, starts: list[Start]) -> tuple[dict, list[str]]:
    """Hashes of the output ids and draft tokens of each side, where the scheduler put the requests together alike, and what is
    wrong with them. Where upstream does not repeat itself (its top-k takes tokens in any order, which shows beyond index_topk
    tokens), or nothing was put together alike, there is nothing to compare with."""
    runs = by_side(starts, lambda start: [(run, start) for of in (start.runs, start.observed) for run in of[case]])
    runs = {side: list(itertools.chain(*of)) for side, of in runs.items()}
    batches, times = most_alike([[run.batches for run, _ in runs[side]] for side in SIDES])
    alike = {side: [one for one in runs[side] if one[0].batches == batches or not min(times)] for side in SIDES}
    outputs = {side: sorted({run.output_ids for run, _ in of}) for side, of in alike.items()}
    seen = {side: [drafts(start.samples, run.start, run.end) for run, start in of] for side, of in alike.items()}
    rows = {side: [one for one in of if one] for side, of in seen.items()}
    problems = []
    compared = min(times) > 0 and len(outputs[UPSTREAM]) == 1
    if compared and outputs[OURS] != outputs[UPSTREAM]:
        problems.append(f"{name}: the output ids differ: {first_difference(outputs[UPSTREAM][0], outputs[OURS])}")
    if compared and rows[UPSTREAM] and (wrong := [one for one in rows[OURS] if one != rows[UPSTREAM][0]]):
        apart = sum(left != right for left, right in zip(rows[UPSTREAM][0], wrong[0]))
        problems.append(f"{name}: the draft tokens differ in {apart} of {len(rows[UPSTREAM][0])} and {len(wrong[0])} rows")
    return {
        "output_sha": {side: sha("\n".join(map(json.dumps, of))) for side, of in outputs.items()},
        "draft_sha": {side: sha(json.dumps(of[:1])) for side, of in rows.items()},
        "distinct_outputs": {side: len(of) for side, of in outputs.items()},
        "alike": times,
    }, problems


def first_difference(upstream: tuple, ours: list[tuple]) -> str:
    """Of the output ids of the same requests."""
    other = next(one for one in ours if one != upstream)
    number, left, right = next((number, *pair) for number, pair in enumerate(zip(upstream, other)) if pair[0] != pair[1])
    at = next(at for at, pair in enumerate(zip(left, right)) if pair[0] != pair[1])
    return f"request {number}, token {at}: {left[at]} and {right[at]}"


def same_tokens(case: dict) -> str:
    """In words, of a case of a result file."""
    if not min(case.get("alike", [1])):
        return "no call was put together alike"
    if case["distinct_outputs"][UPSTREAM] > 1:
        return "sglang's own differ"
    return "yes" if all(len(set(case[sha].values())) == 1 for sha in ("output_sha", "draft_sha")) else "NO"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
