"""Upstream's indexer gives DeepGEMM all rows of a verify in one call."""

import os
from pathlib import Path

import pytest

REPORTS = Path(__file__).parents[2] / "docs/upstream"
CODE = f"""
import sys
sys.path.insert(0, {str(REPORTS)!r})
import many_rows
from sglang_nsa_fused.indexer import give_all_rows

indexer, deep_gemm = many_rows.imported()
sms = deep_gemm.get_num_sms()
verify = many_rows.Verify(indexer, 65_536, 6, 32)
indexer.get_token_to_kv_pool = lambda: verify.pool
before = verify.logits(sms)
print("before", many_rows.calls(deep_gemm, verify, sms))
give_all_rows(indexer.Indexer)
print("after", many_rows.calls(deep_gemm, verify, sms), verify.one.sm_count == sms)
after = verify.logits(sms)
length = slice(many_rows.LENGTH)
print("shape", after.shape == before.shape, not many_rows.GPU or many_rows.torch.equal(after[:, length], before[:, length]))

def fails(logits, topk):
    raise ValueError("of the top-k")

transform, verify.metadata.topk_transform = verify.metadata.topk_transform, fails
try:
    verify.logits(sms)
except ValueError as error:
    print("raises", error, verify.one.sm_count == sms)
verify.metadata.topk_transform = transform

seen, plan = [], deep_gemm.get_paged_mqa_logits_metadata
def planned(lengths, page, num_sms):
    seen.append(num_sms)
    return plan(lengths, page, num_sms)
for module in (deep_gemm, indexer):
    for name in ("get_paged_mqa_logits_metadata", "resolve_paged_mqa_logits_metadata_fn"):
        if hasattr(module, name):
            setattr(module, name, planned if name.startswith("get") else lambda: planned)
verify.metadata.paged_mqa_schedule_metadata = None
print("no schedule", many_rows.calls(deep_gemm, verify, sms), set(seen) == {{sms}})
"""


def test_all_rows_in_one_call(start, upstream):
    if upstream.release.indexer is None:
        pytest.skip(f"sglang {upstream.version} gives DeepGEMM all rows by itself")
    ran = start(CODE, dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("before", "after", "shape", "raises", "no schedule"))]
    assert lines == [
        "before 3",
        "after 1 True",
        "shape True True",
        "raises of the top-k True",
        "no schedule 3 True",
    ]
