"""After a draft no mask as wide as the context is filled: with the plugin a verify says that it reads none."""

import importlib
import os
from pathlib import Path

import pytest

from sglang_nsa_fused import hooks

REPORTS = Path(__file__).parents[2] / "docs/upstream"
CODE = f"""
import sys
sys.path[:0] = [{str(REPORTS)!r}, {str(Path(__file__).parents[1])!r}]
import tree_mask
from upstream import Upstream

worker = tree_mask.imported()
upstream = Upstream(tree_mask.DEVICE if tree_mask.GPU else "cpu")
with upstream.gpu():
    draft = tree_mask.Draft(worker, 3_110, 6)
    for backend in upstream.graphs("TARGET_VERIFY", 6):
        mask = draft.verify_input(backend).custom_mask
        print("mask", mask.numel(), mask.dtype)
"""


@pytest.fixture
def module(upstream):
    if upstream.release.verify_mask is None:
        pytest.skip(f"in sglang {upstream.version} a backend does not say what it reads")
    return importlib.import_module(upstream.release.verify_mask)


def test_a_verify_reads_none(start, module):
    ran = start(CODE, dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    requests, tokens, context = 64, 6, 3_110
    sizes = [requests * tokens * (context + tokens), requests * tokens * tokens]
    assert [line for line in ran.stdout.splitlines() if line.startswith("mask")] == [f"mask {size} torch.bool" for size in sizes]


def test_in_a_newer_sglang_it_stays(upstream, module, monkeypatch):
    monkeypatch.setattr(upstream, "version", "0.5.99")
    assert upstream.graphs("TARGET_VERIFY", 6)[1].verify_mask is None


def test_in_a_changed_sglang_it_stays(upstream, module, monkeypatch, caplog):
    monkeypatch.setattr(module, "maybe_create_verify_mask", lambda max_bs: pytest.fail("called"))
    hooks._refuse.cache_clear()
    assert upstream.graphs("TARGET_VERIFY", 6)[1].verify_mask is None
    assert len([record for record in caplog.records if "maybe_create_verify_mask" in record.getMessage()]) == 1
