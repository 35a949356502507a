"""Draft extends without a graph: what is left to upstream, and what a batch waits for."""

import pytest
from upstream import CAPTURE_BS

from sglang_nsa_fused.draft_extend import DraftExtend
from sglang_nsa_fused.planners import Planners
from sglang_nsa_fused.tools import bare

pytestmark = pytest.mark.compares

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


@pytest.mark.parametrize(
    "of, value, why", [("seq_lens_cpu", None, "are on the GPU alone"), ("global_num_tokens_cpu", [8, 8], "attention pads it")]
)
def test_what_is_upstreams_is_said_once(upstream, deep_gemm, monkeypatch, caplog, of, value, why):
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)
    batch, seen = bare.draft_extend_batch(on, upstream.module, "DRAFT_EXTEND_V2", [1, 2], [100, 100]), []
    setattr(batch, of, value)
    monkeypatch.setattr(upstream.classes[0], "init_forward_metadata", lambda self, batch: seen.append(batch))
    with caplog.at_level("INFO", "sglang_nsa_fused"):
        for _ in range(2):
            on.init_forward_metadata(batch)
    assert seen == [batch, batch]
    [said] = [record.message for record in caplog.records if "draft extend without a graph is sglang's own" in record.message]
    assert why in said


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What is asked of the installed planners."""
    found = []
    for name in ("schedule_of", "flashmla_of"):
        of = getattr(Planners, name)
        monkeypatch.setattr(Planners, name, lambda self, *args, of=of, name=name: found.append(name) or of(self, *args))
    return found


def extend(upstream, backend, requests: int) -> None:
    slots = [1 + number % 15 for number in range(requests)]
    backend.init_forward_metadata(bare.draft_extend_batch(backend, upstream.module, "DRAFT_EXTEND_V2", slots, [100] * requests))


def test_no_batch_waits_for_a_comparison(upstream, deep_gemm, asked):
    """What the captures found holds for row counts between theirs."""
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS, flashmla=True)
    asked.clear()
    for requests in (1, 3, CAPTURE_BS[-1]):
        extend(upstream, on, requests)
        assert asked in ([], ["flashmla_of"])  # for a number of rows that was not captured
        asked.clear()
        extend(upstream, on, requests)
        assert asked == []
    extend(upstream, on, 129)  # 516 rows
    assert sorted(asked) == (["flashmla_of", "schedule_of"] if upstream.release.v2_schedule else ["flashmla_of"])


def test_without_any_graph_the_planners_are_asked_for_each_batch(upstream, deep_gemm, asked):
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS, flashmla=True)
    backend = bare.step_backend(upstream.fused()[0], upstream.release, upstream.device, on.req_to_token, DRAFT_TOKENS, True)
    asked.clear()
    for _ in range(2):
        extend(upstream, backend, 3)
        assert sorted(asked) == (["flashmla_of", "schedule_of"] if upstream.release.v2_schedule else ["flashmla_of"])
        asked.clear()
