"""What upstream does that a faster replay trips over; each test first shows that the hazard is there."""

import dataclasses

import pytest
import torch
from upstream import CAPTURE_BS, WIDE, assert_equal_fields, assert_same_fields, batches, steps

from sglang_nsa_fused.tools import bare


def test_lengths_that_are_the_runners_own(upstream, deep_gemm):
    """Up to 0.5.13 all steps' cache_seqlens_int32 is the runner's seq_lens: source and destination at once."""
    off, on = upstream.multi(upstream.classes, 4), upstream.multi(upstream.fused(), 4)
    for multi in (off, on):
        aliased = {backend.decode_cuda_graph_metadata[8].cache_seqlens_int32.data_ptr() for backend in multi.attn_backends}
        assert (aliased == {multi.seq_lens.data_ptr()}) == (multi.seq_lens.dtype == torch.int32)
    for bs, live in steps(upstream, off, on, count=10):
        assert_same_fields(off, on, bs, live)
        assert torch.equal(on.attn_backends[-1].decode_cuda_graph_metadata[bs].cache_seqlens_int32, live.to(torch.int32))


def test_element_0_of_cumulative_lengths(upstream, deep_gemm):
    """It is zero since the capture, and a decode copies all but it."""
    on = upstream.multi(upstream.fused(WIDE), 3)
    backend, release = on.attn_backends[0], upstream.release
    cu_lens, nsa_cu_lens = release.captured[1], release.captured[5]
    metadata = backend.decode_cuda_graph_metadata[4]
    lengths = torch.tensor([5, 64, 65, 2049], device=upstream.device)
    precomputed = backend._precompute_replay_metadata(
        *(4, torch.tensor([1, 2, 3, 4], device=upstream.device), lengths, lengths.cpu(), upstream.module.ForwardMode.DECODE),
        **({"spec_info": None} if "spec_info" in release.signatures[f"{release.backend}._precompute_replay_metadata"] else {}),
    )
    source = getattr(precomputed, release.precomputed[1])
    source[:1] = 99 if source.shape == (5,) else source[:1]  # from 0.5.15 on there is none: [1:] is what comes
    backend.init_forward_metadata_replay_cuda_graph_from_precomputed(4, precomputed, upstream.module.ForwardMode.DECODE)
    assert getattr(metadata, cu_lens).tolist() == [0, *lengths.cumsum(0).tolist()]
    assert getattr(metadata, nsa_cu_lens).tolist() == [0, *lengths.clamp(max=2048).cumsum(0).tolist()]


def test_pitches_that_no_wide_access_divides(upstream, deep_gemm):
    off, on = upstream.graphs("TARGET_VERIFY", 4, settings=WIDE)
    table, pages = (getattr(on.decode_cuda_graph_metadata[4], name) for name in ("page_table_1", "real_page_table"))
    assert table.stride(0) % 4 and pages.stride(0) % 4
    for slots, lengths, bs in batches(10):
        for backend in (off, on):
            bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, "TARGET_VERIFY", slots, lengths, bs))
        live = torch.tensor([n + i for n in lengths + [1] * (bs - len(lengths)) for i in range(1, 5)], device=upstream.device)
        assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


@pytest.mark.parametrize("on_host", [None, torch.ones(8, dtype=torch.int32)])
def test_no_lengths_on_the_host(upstream, deep_gemm, on_host):
    """From 0.5.15 on seq_lens_cpu may be None; ours never looks at it, nor at what it says."""
    off, on = upstream.multi(upstream.classes, 4), upstream.multi(upstream.fused(), 4)
    for slots, lengths, bs in batches(10):
        bare.replay(off, bare.forward_batch(off, slots, lengths, bs))
        batch = bare.forward_batch(on, slots, lengths, bs)
        batch.seq_lens_cpu, batch.seq_lens_sum = on_host, None
        bare.replay(on, batch)
        assert_same_fields(off, on, bs, torch.tensor(lengths + [1] * (bs - len(lengths)), device=upstream.device))


def test_frozen_metadata(upstream, deep_gemm):
    """What a graph reads cannot be assigned to: the objects of the capture stay, and so do all their attributes."""
    on = upstream.multi(upstream.fused(), 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        on.attn_backends[0].decode_cuda_graph_metadata[4].cache_seqlens_int32 = None

    def held():
        metadata = [backend.decode_cuda_graph_metadata[bs] for backend in on.attn_backends for bs in CAPTURE_BS]
        return [id(held) for one in metadata for held in (one, *vars(one).values())]

    before = held()
    for _ in steps(upstream, upstream.multi(upstream.classes, 4), on, count=5):
        pass
    assert held() == before
