"""What a benchmark's results are of, and where they go."""

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.tools.bench import servers
from sglang_nsa_fused.tools.bench.process import Failed
from sglang_nsa_fused.tools.bench.signals import interrupt_on_signals

HERE = Path(__file__).parent


def machine() -> tuple[dict, Release, bool]:
    """As `servers.machine`; ends the script where servers would not run. From here on a signal interrupts it."""
    interrupt_on_signals()
    try:
        return servers.machine()
    except Failed as error:
        raise SystemExit(str(error)) from None


def default_path(what: str, gpu: str, sglang: str | None = None) -> Path:
    name = re.search(r"[A-Z]+\d+", gpu)
    return HERE / "results" / f"{what}-{name[0].lower() if name else 'gpu'}-{sglang or version('sglang')}.json"


def commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        raise SystemExit("not in a git repository: give --commit") from None
