"""The page's tables are those of the committed results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_table_is_stale():
    check = subprocess.run([sys.executable, "-m", "benchmarks.pages", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_servers_that_differ_in_a_flag_alone_come_one_after_the_other(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # last: the installed package stays the one under test
    from benchmarks.pages import size
    from benchmarks.server import Configuration

    of = [Configuration(4, cache, layers, one_core, False) for cache in ("bf16", "fp8") for layers in (3, 8) for one_core in (False, True)]
    names = [one.named(f"bs{bs}-len64-") for one in of for bs in (1, 16)]
    assert names[:4] == ["n4-bs1-len64-bf16", "n4-bs16-len64-bf16", "n4-bs1-len64-bf16-1core", "n4-bs16-len64-bf16-1core"]
    assert sorted(reversed(names), key=lambda name: size({"name": name})) == names
