"""Draft extends without a graph: what is left to upstream, and what a batch waits for."""

import pytest
from upstream import CAPTURE_BS

from sglang_nsa_fused import bare
from sglang_nsa_fused.draft_extend import DraftExtend

DRAFT_TOKENS = 4


@pytest.mark.parametrize("counts", [[4, 3], [5, 3], [2, 2], [4, 4, 4]])
def test_counts_that_are_not_all_draft_tokens_are_upstreams(upstream, deep_gemm, monkeypatch, counts):
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)
    slots, lengths = list(range(1, len(counts) + 1)), [100] * len(counts)
    batch = bare.draft_extend_batch(on, upstream.module, "DRAFT_EXTEND_V2", slots, lengths, counts)
    seen = []
    monkeypatch.setattr(upstream.classes[0], "init_forward_metadata", lambda self, batch: seen.append(batch))
    on.init_forward_metadata(batch)
    assert isinstance(on._draft_extend, DraftExtend)
    assert seen == ([] if set(counts) == {DRAFT_TOKENS} else [batch])
