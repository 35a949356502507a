"""What the benchmark of the replays calls, in each release."""

import io
import json

import pytest
import torch
from rich.console import Console
from upstream import assert_equal_fields, live_bytes, page_tables

from sglang_nsa_fused.tools import bare
from sglang_nsa_fused.tools.bench import refreshes
from sglang_nsa_fused.tools.bench.refreshes import Case, Classes, Results, backend_of, held, refresh_of
from sglang_nsa_fused.tools.bench.replay import KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_both_sides_refresh_the_same(upstream, deep_gemm, kind, cache):
    classes, case = Classes(upstream.device), Case(kind, 3, 2, 200, 300, cache)
    pool = torch.arange(3 * case.columns, dtype=torch.int32, device=upstream.device).view(3, case.columns)
    found = []
    for side in ("upstream", "ours"):
        made = backend_of(classes, side, pool, case)
        assert isinstance(made, classes.of[side][kind == "draft"])
        refresh_of(classes, made, case)()
        backend = made.attn_backends[-1] if kind == "draft" else made
        lengths = {"draft": [200] * 2, "verify": [201, 202, 203, 204] * 2, "extend": [201, 202, 203, 204] * 2}[kind]
        found.append(bare.fields(backend.forward_metadata, torch.tensor(lengths, device=upstream.device)))
    if kind == "draft" and not upstream.release.draft_schedule:
        for fields in found:
            fields.pop("paged_mqa_schedule_metadata")  # upstream leaves it as it was captured
    if upstream.release.drop_wide_table is not None:
        assert "page_table_1" not in found[1]
        found[0].pop("page_table_1")
    assert_equal_fields(*found)


@pytest.mark.filterwarnings("ignore")  # of objects of torch that are looked at
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_held_are_those_of_the_tables_and_little_else(upstream, deep_gemm, kind, monkeypatch):
    if upstream.device == "cpu":
        monkeypatch.setattr(refreshes, "allocated", live_bytes)
    classes, case = Classes(upstream.device), Case(kind, 3, 8, 200, 50_000, "bf16")
    pool = torch.zeros(9, case.columns, dtype=torch.int32, device=upstream.device)
    for side in ("upstream", "ours"):
        backend, table_bytes = held(classes, side, pool, case)
        if kind == "extend" and not classes.has_graph(kind):
            assert table_bytes == 0
            continue
        most = sum(page_tables(backend).values())
        assert most <= table_bytes < most + 32_768 * len(getattr(backend, "attn_backends", [1]))
        if side == "upstream":
            assert most > 4 * case.bs * case.width * (2 if kind == "draft" else 4)
        refresh = refresh_of(classes, backend, case)
        refresh()
        del backend, refresh


def test_results_are_written_as_they_come(tmp_path):
    path = tmp_path / "replay.json"
    results = Results(path, {"schema": 1, "what": "replay"})
    timed = {"upstream": [100.0, 200.0, 300.0], "ours": [10.0, 20.0, 30.0]}
    once = {"upstream": [16], "ours": [1]}
    for bs in (1, 64):
        found = {"host_us": timed, "gpu_us": timed, "launches": once, "syncs": {"upstream": [1], "ours": [0]}}
        found["table_bytes"] = {"upstream": [3 << 20], "ours": [1 << 19]}
        results.add(Case("verify", 4, bs, 131072, 163840, "bf16"), found, lambda moved: moved / 40)
        assert len(json.loads(path.read_text())["cases"]) == len(results.cases)
    cases = {(case["name"], case["metric"]): case for case in json.loads(path.read_text())["cases"]}
    host = cases["verify-n4-bs64-len131072-width163840", "host_us"]
    assert (host["upstream"], host["ours"], host["ratio"], host["spread"]["ours"]) == (200, 20, 10, [12, 28])
    assert cases["verify-n4-bs64-len131072-width163840", "gpu_us"]["share_of_copy_rate"] == 2
    assert "share_of_copy_rate" not in cases["verify-n4-bs1-len131072-width163840", "gpu_us"]
    assert cases["verify-n4-bs1-len131072-width163840", "syncs"]["ratio"] is None
    held = cases["verify-n4-bs64-len131072-width163840", "table_bytes"]
    assert (held["upstream"], held["ours"], held["ratio"]) == (3 << 20, 1 << 19, 6)
    console = Console(width=150, file=io.StringIO())
    console.print(results.table)
    last = next(line for line in console.file.getvalue().splitlines() if "bs64" in line)
    row = "verify-n4-bs64-len131072-width163840 200.0 → 20.0 10.0 200.0 → 20.0 16 → 1 1 → 0 3.0 → 0.5 203.96 200%"
    assert last.split() == row.split()
    # 131,077 columns read, and written with their pages to five rows
    assert cases["verify-n4-bs1-len131072-width163840", "gpu_us"]["bytes"] == 4 * (131077 + 5 * (131077 + 2049))
    narrow = Case("verify", 4, 1, 131072, 163840, "bf16").moved_bytes(wide=False)
    assert narrow == 2049 * (32 + 5 * 4)  # a sector of each page read, and five rows of pages written
