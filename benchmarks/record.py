"""Result files: what was measured, where, and of which commit."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def case(name: str, metric: str, upstream: float, ours: float, samples: int, **more) -> dict:
    ratio = round(upstream / ours, 2) if ours else None
    return {"name": name, "metric": metric, "upstream": round(upstream, 3), "ours": round(ours, 3), "ratio": ratio,
            "samples": samples, **more}  # fmt: skip


def default_path(what: str) -> Path:
    gpu = next((g for g in ("H100", "H200", "B200", "A100") if g in torch.cuda.get_device_name()), "gpu")
    return RESULTS / f"{what}-{gpu.lower()}-{version('sglang')}.json"


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write(path: Path, what: str, cases: list[dict], commit: str, **more) -> None:
    """One case a line, so that a diff shows which moved."""
    head = {"schema": 1, "what": what, "gpu": torch.cuda.get_device_name(), "sglang": version("sglang"),
            "torch": torch.__version__, "commit": commit, **more}  # fmt: skip
    lines = ",\n".join("  " + json.dumps(one) for one in cases)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n")
