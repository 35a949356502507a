import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of that name can be imported from."""
    root = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "path", [*sys.path, str(root)])  # last: the installed package stays the one under test
