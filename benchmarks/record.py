"""Where the results of this repository's commit go."""

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent


def default_path(what: str, gpu: str, sglang: str | None = None) -> Path:
    name = re.search(r"[A-Z]+\d+", gpu)
    return HERE / "results" / f"{what}-{name[0].lower() if name else 'gpu'}-{sglang or version('sglang')}.json"


def commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        raise SystemExit("not in a git repository: give --commit") from None
