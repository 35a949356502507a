"""Weights that the probe gives to servers under test."""

from types import SimpleNamespace

import pytest
import torch

from sglang_nsa_fused.tools.bench import probe

VOCABULARY, HIDDEN = 640, 512


def vocabulary(tp_size: int = 1, rank: int = 0) -> torch.nn.Module:
    """Has what decisive_weights reads of upstream's VocabParallelEmbedding."""
    rows = VOCABULARY // tp_size
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.empty(rows, HIDDEN))
    module.num_embeddings_padded = VOCABULARY
    module.shard_indices = SimpleNamespace(padded_org_vocab_start_index=rank * rows)
    return module


def model(**sizes) -> torch.nn.Module:
    found = torch.nn.Module()
    found.embed_tokens, found.lm_head, found.o_proj = vocabulary(**sizes), vocabulary(**sizes), torch.nn.Linear(HIDDEN, HIDDEN)
    found.o_proj.input_size, found.o_proj.input_size_per_partition = HIDDEN, HIDDEN // sizes.get("tp_size", 1)
    found.eh_proj = torch.nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
    found.gate = torch.nn.Module()
    found.gate.e_score_correction_bias = torch.nn.Parameter(torch.empty(16))
    probe.decisive_weights(found)
    return found


def test_next_token_has_the_largest_logit():
    found = model()
    logits = found.embed_tokens.weight @ found.lm_head.weight.T
    step = VOCABULARY // probe.JUMPS
    ordinary = [token for token in range(VOCABULARY) if token % step]
    following = torch.arange(1, VOCABULARY + 1) % VOCABULARY
    top = logits[:, ordinary].topk(2).values
    expected = logits[torch.arange(VOCABULARY), following]
    assert expected.mean().item() == pytest.approx(probe.NEXT, rel=0.05)
    keeps = following % step != 0
    assert torch.equal(top[keeps, 0], expected[keeps]) and (top[keeps, 0] - top[keeps, 1]).min() > 1
    # Those that may win instead have the variance that NEXT is in units of.
    jumps = torch.stack([logits[:, token] for token in range(0, VOCABULARY, step)])
    assert jumps[:, keeps].std().item() == pytest.approx(1, rel=0.1)
    assert 0 < (logits.argmax(-1) != following).float().mean() < 0.15


def test_shards_make_up_the_whole():
    whole, shards = model(), [model(tp_size=2, rank=rank) for rank in range(2)]
    for name in ("embed_tokens", "lm_head"):
        assert torch.equal(torch.cat([getattr(shard, name).weight for shard in shards]), getattr(whole, name).weight)
    assert torch.allclose(sum(shard.o_proj.weight for shard in shards), whole.o_proj.weight)


def test_draft_layer_sees_the_embedding_and_experts_are_fixed():
    found = model()
    assert torch.equal(found.eh_proj.weight.diagonal(), torch.ones(HIDDEN))
    assert found.eh_proj.weight[:, HIDDEN:].std().item() == pytest.approx((2 * HIDDEN) ** -0.5, rel=0.05)
    assert found.gate.e_score_correction_bias.tolist() == list(range(16))


def test_tables_of_a_call_within_another_count_once(monkeypatch):
    memory = [100]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory[0])
    monkeypatch.setattr(probe, "_start_writer", lambda: None)
    monkeypatch.setattr(probe, "_table_bytes", 0)
    probe._samples.clear()

    def takes(size: int, *within):
        memory[0] += size
        for more in within:
            probe.tables(takes, more)
        if size == 666:
            raise RuntimeError("no memory")
        return "made"

    assert probe.tables(takes, 10, 20, 30) == "made"
    memory[0] += 5  # of others
    with pytest.raises(RuntimeError):
        probe.tables(takes, 666)
    probe.tables(takes, -6)  # it gives some back
    assert [probe._samples.popleft()["table_bytes"] for _ in range(3)] == [60, 726, 720]
    assert not probe._samples
