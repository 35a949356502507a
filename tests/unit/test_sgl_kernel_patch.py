"""patches/sgl-kernel: its generated source follows csrc/, and it adds lines only."""

import subprocess
import sys
from pathlib import Path

PATCH = Path(__file__).parents[2] / "patches/sgl-kernel"


def test_the_generated_source_is_current():
    subprocess.run([sys.executable, PATCH / "generate.py", "--check"], check=True)


def test_the_patch_has_added_lines_alone():
    lines = (PATCH / "sgl-kernel.patch").read_text().splitlines()
    assert any(line.startswith("+") for line in lines)
    for line in lines:
        assert not line.startswith(" ") and not (line.startswith("-") and not line.startswith("--- ")), line
        assert not line.startswith("@@") or line.endswith("@@"), line
