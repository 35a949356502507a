"""One step backend in each mode, with a graph and without, plugin off against plugin on."""

import random
from types import SimpleNamespace

import pytest
import torch
from upstream import CAPTURE_BS, LONGEST, WIDE, after, assert_equal_fields, batches, stale_fields

from sglang_nsa_fused.draft_extend import DraftExtend
from sglang_nsa_fused.replay import PrecomputedCopy
from sglang_nsa_fused.tools import bare

GRAPH_MODES = ["DECODE", "TARGET_VERIFY", "DRAFT_EXTEND", "DRAFT_EXTEND_V2"]


def accepted_by(slots, draft_tokens, seed):
    draw = random.Random(seed)
    return [draw.randint(1, draft_tokens) for _ in slots]


def row_lengths(upstream, mode, lengths, accepted, draft_tokens):
    """The live tokens of each row."""
    if mode == "DECODE":
        return torch.tensor(lengths, device=upstream.device)
    if mode == "TARGET_VERIFY":
        ranges = [range(length + 1, length + draft_tokens + 1) for length in lengths]
    else:
        ranges = [range(length - rows + 1, length + 1) for length, rows in zip(lengths, accepted)]
    return torch.tensor([length for one in ranges for length in one], device=upstream.device)


def used_rows(fields, rows, bs):
    """Without what lies behind the rows of this batch, which a draft extend leaves as it was."""
    per_request = ("cache_seqlens_int32", "cu_seqlens_k")
    whole = ("paged_mqa_schedule_metadata", "flashmla_metadata")
    return {
        name: tensor if name in whole else tensor[: (bs if name in per_request else rows) + ("cu" in name or "splits" in name)]
        for name, tensor in fields.items()
    }


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("draft_tokens", [2, 4, 6])
@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_replays_with_a_graph(upstream, deep_gemm, mode, draft_tokens, flashmla):
    extend = mode.startswith("DRAFT_EXTEND")
    if extend and mode not in upstream.release.draft_extend:
        pytest.skip(f"sglang {upstream.version} captures no graph in this mode")
    off, on = upstream.graphs(mode, draft_tokens, flashmla)
    fixed = upstream.release.accepted is None
    for step, (slots, lengths, bs) in enumerate(batches(25)):
        accepted = accepted_by(slots, draft_tokens, step) if extend else []
        if extend:
            lengths = [max(length, draft_tokens) for length in lengths]
        for backend in (off, on):
            # Upstream counts again, in int64, when a request finishes; its buffer of int32 serves padded batches alone.
            dtype = torch.int64 if step % 3 == 2 and bs == len(slots) else torch.int32
            bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, mode, slots, lengths, bs, accepted, dtype))
        pad = bs - len(slots)
        if extend and fixed:
            accepted = [draft_tokens] * len(slots)
        live = row_lengths(upstream, mode, lengths + [1] * pad, accepted + [draft_tokens] * pad, draft_tokens)
        both = bare.both_fields(off.forward_metadata, on.forward_metadata, live)
        expected, found = (used_rows(fields, len(live), bs) for fields in both)
        assert_equal_fields(expected, found)
        assert on.forward_metadata is on.decode_cuda_graph_metadata[bs]


@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY"])
def test_nothing_follows_the_one_launch(upstream, deep_gemm, mode):
    off, on = upstream.graphs(mode, 4, flashmla=True)
    assert not any(after(on._replays[bs]) for bs in CAPTURE_BS)


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("mode", ["DRAFT_EXTEND", "DRAFT_EXTEND_V2"])
def test_draft_extend_without_a_graph(upstream, deep_gemm, mode, flashmla):
    if not hasattr(upstream.module.ForwardMode, mode):
        pytest.skip(f"sglang {upstream.version} has no such mode")
    draft_tokens, names = 4, upstream.release.names
    off, on = upstream.graphs("TARGET_VERIFY", draft_tokens, flashmla)
    for step, (slots, lengths, _) in enumerate(batches(25)):
        lengths = [max(length, draft_tokens) for length in lengths]
        accepted = accepted_by(slots, draft_tokens, step) if mode == "DRAFT_EXTEND" else [draft_tokens] * len(slots)
        live = row_lengths(upstream, mode, lengths, accepted, draft_tokens)
        for backend in (off, on):
            backend.use_mha = True  # as a prefill before it may leave it
            backend.init_forward_metadata(bare.draft_extend_batch(backend, upstream.module, mode, slots, lengths, accepted))
        expected, found = off.forward_metadata, on.forward_metadata
        assert_equal_fields(bare.fields(expected, live), bare.fields(found, live))
        assert vars(expected).keys() == vars(found).keys()
        for name, value in vars(expected).items():
            other = getattr(found, name)
            if isinstance(value, torch.Tensor):
                assert (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride()), name
            elif name != "flashmla_metadata":
                assert value == other, name
        assert torch.equal(expected.cu_seqlens_q, found.cu_seqlens_q)
        assert torch.equal(getattr(expected, f"{names}_cu_seqlens_q"), getattr(found, f"{names}_cu_seqlens_q"))
        assert isinstance(on._draft_extend, DraftExtend)
        assert on.use_mha is off.use_mha is False


def test_other_batches_without_a_graph_stay_upstreams(upstream, deep_gemm, monkeypatch):
    off, on = upstream.graphs("DECODE", 4)
    batch = bare.draft_extend_batch(on, upstream.module, "DRAFT_EXTEND_V2", [1, 2], [100, 200])
    seen = []
    monkeypatch.setattr(upstream.classes[0], "init_forward_metadata", lambda self, batch: seen.append(batch))
    batch.global_num_tokens_cpu = [8]  # data-parallel attention pads
    on.init_forward_metadata(batch)
    batch.global_num_tokens_cpu, batch.forward_mode = None, upstream.module.ForwardMode.TARGET_VERIFY
    on.init_forward_metadata(batch)
    assert seen == [batch, batch]


def test_a_batch_size_that_was_not_captured_is_refused(upstream):
    if upstream.release.out_graph:
        pytest.skip("captured then, as upstream does")
    off, on = upstream.graphs("TARGET_VERIFY", 4)
    batch = bare.graph_batch(on, upstream.module, "TARGET_VERIFY", [1, 2, 3], [5, 6, 7], 3)
    with pytest.raises(ValueError, match=r"bs: expected a captured batch size, one of \[1, 2, 4, 8\], got 3"):
        on.init_forward_metadata_replay_cuda_graph(**batch)


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("name", ["DECODE", "TARGET_VERIFY", "DRAFT_EXTEND"])
def test_copies_in_each_mode(upstream, deep_gemm, name, flashmla):
    """The method that the plugin overrides, as upstream's own precomputation calls for it."""
    if name != "DECODE" and upstream.release.captured_lens_2d is not None:
        pytest.skip(f"in sglang {upstream.version} upstream's, which nothing calls")
    mode, draft_tokens, device = upstream.module.ForwardMode[name], 3, upstream.device
    table = torch.randperm(9 * LONGEST).to(torch.int32).view(9, LONGEST).to(device)
    seq_lens = torch.tensor([64, 2049, 7, 1], device=device)
    accepted = SimpleNamespace(**{upstream.release.accepted or "": torch.tensor([1, 3, 2, 1], device=device)})
    takes = upstream.release.signatures[f"{upstream.release.backend}._precompute_replay_metadata"]
    spec_info = [accepted] if "spec_info" in takes else []
    found = []
    for cls in (upstream.classes[0], upstream.fused(WIDE)[0]):
        backend = bare.step_backend(cls, upstream.release, device, table, draft_tokens, flashmla)
        backend.init_cuda_graph_state(4, 4 * draft_tokens)
        backend.graph_lens = torch.ones(4, dtype=torch.int32, device=device)
        backend.graph_slots = torch.zeros(4, dtype=torch.int64, device=device)
        bare.capture(backend, upstream.module, upstream.release, name, 4)
        precomputed = backend._precompute_replay_metadata(
            4, torch.tensor([3, 1, 8, 2], device=device), seq_lens, seq_lens.cpu(), mode, *spec_info
        )
        backend.init_forward_metadata_replay_cuda_graph_from_precomputed(bs=4, precomputed=precomputed, forward_mode=mode)
        assert backend.forward_metadata is backend.decode_cuda_graph_metadata[4]
        copies = list(getattr(backend, "_copies", {}).values())  # made at the first call
        assert [type(copy) for copy in copies] == [PrecomputedCopy] * (cls is not upstream.classes[0])
        live = precomputed.seqlens_expanded.to(device)
        fields = bare.fields(backend.forward_metadata, live)
        if name == "DRAFT_EXTEND":  # rows behind the accepted ones hold whatever the capture left
            fields = used_rows(fields, precomputed.seqlens_expanded_size, 4)
        found.append(fields)
    if "paged_mqa_schedule_metadata" in stale_fields(upstream.release, 0, 0):
        expanded = precomputed.seqlens_expanded[: precomputed.seqlens_expanded_size]
        lengths = seq_lens if name == "DECODE" else expanded
        assert torch.equal(found[1].pop("paged_mqa_schedule_metadata"), upstream.schedule(lengths))
        del found[0]["paged_mqa_schedule_metadata"]
    assert_equal_fields(*found)
