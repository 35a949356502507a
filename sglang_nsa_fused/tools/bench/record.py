"""Result files: what was measured, on what, and of which commit."""

import json
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Iterable

SIDES = UPSTREAM, OURS = "upstream", "ours"


def case(name: str, metric: str, upstream: float, ours: float, samples: int, **more) -> dict:
    """metric: one of host_us, gpu_us, launches, syncs, step_ms, decode_step_ms, gpu_draft_us, table_bytes, bytes, of
    compare.METRICS, or what benchmarks.graphs and benchmarks.speeds measure of a profile."""
    ratio = round(upstream / ours, 3) if ours else None
    return {
        "name": name,
        "metric": metric,
        "upstream": round(upstream, 3),
        "ours": round(ours, 3),
        "ratio": ratio,
        "samples": samples,
        **more,
    }


def spread(values: list[float]) -> list[float]:
    """Their 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return [round(tenths[0], 3), round(tenths[-1], 3)]


def head(what: str, commit: str | None, machine: dict | None = None, **more) -> dict:
    """commit: of this project, None for an installed release of it. machine: gpu, sglang and torch; None: of this process."""
    from sglang_nsa_fused import __version__

    machine = machine or this_machine()
    return {"schema": 1, "what": what, **machine, "plugin": __version__, "commit": commit, **more}


def this_machine() -> dict:
    import torch

    return {"gpu": torch.cuda.get_device_name(), "sglang": version("sglang"), "torch": torch.__version__}


def write(path: Path, head: dict, **lists: Iterable[dict]) -> None:
    """lists: cases, and what there is besides; one entry a line, so that a diff shows which moved."""
    texts = [f'"{name}": [\n' + ",\n".join("  " + json.dumps(one) for one in entries) + "\n]" for name, entries in lists.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # an interrupted write leaves the file before it
    partial.write_text(", ".join([json.dumps(head)[:-1], *texts]) + "}\n")
    partial.replace(path)
