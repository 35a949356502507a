"""The reproducers of docs/upstream.md still show what it says, in each release that it names."""

import os
import re
from pathlib import Path

import pytest
from packaging.version import Version

REPORTS = Path(__file__).parents[2] / "docs/upstream"


def printed(start, name: str) -> str:
    ran = start((REPORTS / f"{name}.py").read_text(), dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_stale_schedule(start, upstream):
    if not upstream.release.draft_schedule:
        pytest.skip(f"sglang {upstream.version} refreshes no schedule at all")
    lines = [line for line in printed(start, "stale_schedule").splitlines() if line.startswith("batch")]
    assert len(lines) == 3 * 4  # batches, step backends
    for line in lines:
        found = re.findall(r"(schedule|top-k plan) (STALE|fresh)", line)
        plan = "batch 40" in line and upstream.release.topk_v2_plan is not None
        expected = "fresh" if "step 3" in line else "STALE"
        assert found == [(what, expected) for what in ("schedule", "top-k plan")[: 1 + plan]], line


def test_wide_table(start, upstream):
    if upstream.release.drop_wide_table is None:
        pytest.skip("the top-k of this release reads the wide table")
    assert "together: 17.18 GB as it is, 0.27 GB with speculation hidden" in printed(start, "wide_table")


def test_many_rows(start, upstream):
    if not (folder := Path(upstream.module.__file__).parent / "dsa").exists():
        pytest.skip(f"sglang {upstream.version} has no DSA indexer")
    pieces = "_chunked_fp8_paged_mqa_logits" in (folder / "dsa_indexer.py").read_text()
    assert pieces == (Version(upstream.version) >= Version("0.5.20")) == (upstream.release.indexer is not None)
    lines = [line for line in printed(start, "many_rows").splitlines() if " rows, " in line]
    found = [tuple(map(int, re.findall(r"(\d+) (?:rows|as it is|in one call)", line))) for line in lines]
    assert found == ([(384, 3, 1), (256, 2, 1), (384, 3, 1)] if pieces else [(384, 1, 1), (256, 1, 1), (384, 1, 1)])
    assert not any("NOT THE SAME" in line for line in lines)


def test_tree_mask(start, upstream):
    if Version(upstream.version) < Version("0.5.17"):
        pytest.skip(f"sglang {upstream.version} makes the mask elsewhere")
    lines = [line for line in printed(start, "tree_mask").splitlines() if "bytes" in line]
    found = [re.findall(r"([\d,]+) bytes", line) for line in lines]
    assert found == [["402,655,488", "2,304"], ["41,944,064", "1,024"]]
