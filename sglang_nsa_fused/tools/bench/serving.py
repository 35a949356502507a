"""Results of sglang's own bench_serving, off and on, as cases of ours."""

import json
from pathlib import Path

from sglang_nsa_fused.tools.bench import compare
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM
from sglang_nsa_fused.tools.bench.servers import Failed

# Our metric -> the field of a result. bench_serving has no inter-token p90.
FIELDS = {
    "tokens_per_s": "output_throughput",
    "accept_length": "accept_length",
    "tpot_ms": "median_tpot_ms",
    "itl_p50_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "ttft_ms": "median_ttft_ms",
}


def read(paths: list[Path]) -> list[dict]:
    """The results in these files, in order; there is one in each line. Raises Failed."""
    found = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "no text"
            raise Failed(f"{path}: {why}; expected a file that bench_serving wrote (--output-file)") from error
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                missing = [
                    field
                    for field in FIELDS.values()
                    if field != "accept_length" and not isinstance(result.get(field), (int, float))
                ]
            except (ValueError, TypeError, AttributeError):
                missing = ["JSON"]
            if missing:
                raise Failed(f"{path}:{number}: expected a result of bench_serving, and it has no {missing[0]}")
            found.append(result)
    if not found:
        raise Failed(f"{', '.join(map(str, paths))}: expected results of bench_serving, and there are none")
    return found


def settings(result: dict) -> tuple[str, dict]:
    """(name, concurrency and input tokens) of the case that this is a result of."""
    of_random = str(result.get("dataset_name", "")).startswith("random")
    length = result.get("random_input_len") if of_random else None
    parts = [result.get("dataset_name"), ("bs", result.get("max_concurrency")), ("len", length)]
    parts += [("out", result.get("random_output_len") if of_random else None)]
    parts += [("rate", rate) for rate in [result.get("request_rate")] if rate != float("inf")]
    texts = [part if isinstance(part, str) else f"{part[0]}{part[1]}" for part in parts if part and part[1] is not None]
    return "-".join(texts), {"concurrency": result.get("max_concurrency"), "input_tokens": length}


def rows(off: list[dict], on: list[dict]) -> list[dict]:
    """Cases of a result file. The results of a case are paired in their order. Raises Failed where they do not pair."""
    cases: dict[str, tuple[dict, dict[str, list]]] = {}
    for side, results in ((UPSTREAM, off), (OURS, on)):
        for result in results:
            name, more = settings(result)
            cases.setdefault(name, (more, {side: [] for side in SIDES}))[1][side].append(result)
    found = []
    for name, (more, sides) in cases.items():
        if len(sides[UPSTREAM]) != len(sides[OURS]):
            counts = f"{len(sides[UPSTREAM])} of --read-off and {len(sides[OURS])} of --read-on"
            raise Failed(f"{name}: expected as many results of both sides, got {counts}")
        rounds = [dict(zip(SIDES, map(metrics, pair))) for pair in zip(sides[UPSTREAM], sides[OURS])]
        found += compare.rows(name, rounds, **more)
    return found


def metrics(result: dict) -> dict[tuple[str, str], float]:
    return {("", metric): result[field] for metric, field in FIELDS.items() if result.get(field) is not None}
