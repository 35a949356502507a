"""What the benchmark of the replays calls, in each release."""

import io
import json

import pytest
import torch
from rich.console import Console
from upstream import assert_equal_fields

from sglang_nsa_fused import bare
from sglang_nsa_fused.bench.refreshes import REFRESHES, Case, Classes, Results


@pytest.mark.parametrize("kind", REFRESHES)
@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_both_sides_refresh_the_same(upstream, deep_gemm, kind, cache, monkeypatch):
    classes, case = Classes(upstream.device), Case(kind, 3, 2, 200, cache)
    pool = torch.arange(3 * 300, dtype=torch.int32, device=upstream.device).view(3, 300)
    made = []
    for name in ("step_backend", "multi_step_backend"):
        make = getattr(bare, name)
        monkeypatch.setattr(bare, name, lambda *args, make=make: made.append(make(*args)) or made[-1])
    found = []
    for side in ("upstream", "ours"):
        REFRESHES[kind](classes, side, pool, case)()
        backend = made[-1].attn_backends[-1] if kind == "draft" else made[-1]
        assert isinstance(made[-1], classes.of[side][kind == "draft"])
        lengths = {"draft": [200] * 2, "verify": [201, 202, 203, 204] * 2, "extend": [201, 202, 203, 204] * 2}[kind]
        found.append(bare.fields(backend.forward_metadata, torch.tensor(lengths, device=upstream.device)))
    if kind == "draft" and not upstream.release.draft_schedule:
        for fields in found:
            fields.pop("paged_mqa_schedule_metadata")  # upstream leaves it as it was captured
    assert_equal_fields(*found)


def test_results_are_written_as_they_come(tmp_path):
    path = tmp_path / "replay.json"
    results = Results(path, {"schema": 1, "what": "replay"})
    timed = {"upstream": [100.0, 200.0, 300.0], "ours": [10.0, 20.0, 30.0]}
    once = {"upstream": [16], "ours": [1]}
    for bs in (1, 64):
        found = {"host_us": timed, "gpu_us": timed, "launches": once, "syncs": {"upstream": [1], "ours": [0]}}
        results.add(Case("verify", 4, bs, 131072, "bf16"), found, lambda moved: moved / 40)
        assert len(json.loads(path.read_text())["cases"]) == len(results.cases)
    cases = {(case["name"], case["metric"]): case for case in json.loads(path.read_text())["cases"]}
    host = cases["verify-n4-bs64-len131072", "host_us"]
    assert (host["upstream"], host["ours"], host["ratio"], host["spread"]["ours"]) == (200, 20, 10, [12, 28])
    assert cases["verify-n4-bs64-len131072", "gpu_us"]["share_of_copy_rate"] == 2
    assert "share_of_copy_rate" not in cases["verify-n4-bs1-len131072", "gpu_us"]
    assert cases["verify-n4-bs1-len131072", "syncs"]["ratio"] is None
    console = Console(width=120, file=io.StringIO())
    console.print(results.table)
    last = next(line for line in console.file.getvalue().splitlines() if "bs64" in line)
    assert last.split() == "verify-n4-bs64-len131072 200.0 → 20.0 10.0 200.0 → 20.0 16 → 1 1 → 0 203.96 200%".split()
    # 131,077 columns read, and written with their pages to five rows
    assert cases["verify-n4-bs1-len131072", "gpu_us"]["bytes"] == 4 * (131077 + 5 * (131077 + 2048))
