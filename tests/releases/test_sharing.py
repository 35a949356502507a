"""Draft steps share one set of buffers where nothing that they read tells them apart."""

import logging

import torch
from upstream import assert_same_fields, steps

from sglang_nsa_fused import buffers
from sglang_nsa_fused.tools import bare


def storages(backend):
    return {
        (bs, name): tensor.data_ptr()
        for bs, metadata in backend.decode_cuda_graph_metadata.items()
        if isinstance(bs, int)
        for name, tensor in vars(metadata).items()
        if isinstance(tensor, torch.Tensor)
    }


def test_all_steps_have_the_first_ones_tensors(upstream, deep_gemm, caplog):
    caplog.set_level(logging.INFO, "sglang_nsa_fused")
    on, off = upstream.multi(upstream.fused(), 5), upstream.multi(upstream.classes, 5)
    first, *others = on.attn_backends
    count = len(off.attn_backends)
    assert len(others) == count - 1 >= 3 and all(storages(backend) == storages(first) for backend in others)
    assert all(backend.forward_metadata is first.forward_metadata for backend in others)
    assert all(len(replay._metadatas) == 1 for replay in on._replays.values())
    tables = [backend.decode_cuda_graph_metadata["page_table"] for backend in off.attn_backends]
    assert len({table.data_ptr() for table in tables}) == count
    reported = float(caplog.text.split("not allocated: draft steps ")[1].split(" GiB")[0]) * 2**30
    assert reported >= (count - 1) * tables[0].numel() * 4 * 0.99 - 2**20


def test_steps_that_read_their_number_keep_their_own(upstream, deep_gemm, monkeypatch):
    """As a release would that gives each step a length of its own."""

    def reads_its_number(self):
        return self.speculative_step_id

    monkeypatch.setattr(upstream.classes[0], "reads_its_number", reads_its_number, raising=False)
    step_backend, count = bare.step_backend, iter(range(100))

    def numbered(*args, **kwargs):
        backend = step_backend(*args, **kwargs)
        backend.speculative_step_id = next(count)
        return backend

    monkeypatch.setattr(bare, "step_backend", numbered)
    on, off = upstream.multi(upstream.fused(), 5), upstream.multi(upstream.classes, 5)
    assert len({storages(backend)[8, "real_page_table"] for backend in on.attn_backends}) == len(off.attn_backends)
    assert all(len(replay._metadatas) == len(off.attn_backends) for replay in on._replays.values())
    for bs, live in steps(upstream, off, on, count=10):
        for backend in off.attn_backends[:3]:  # upstream's schedule is stale there
            object.__setattr__(backend.decode_cuda_graph_metadata[bs], "paged_mqa_schedule_metadata", None)
        for backend in on.attn_backends[:3]:
            assert backend.decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata is not None
        assert_same_fields(off, on, bs, live)


def test_a_number_that_is_only_stored_does_not_count(upstream):
    on = upstream.multi(upstream.fused(), 4)
    for number, backend in enumerate(on.attn_backends):
        backend.speculative_step_id = number
    assert buffers.steps_are_alike(on.attn_backends)
    setattr(on.attn_backends[2], upstream.release.index_topk, 1024)
    assert not buffers.steps_are_alike(on.attn_backends)


def test_steps_have_all_that_the_first_ones_preparation_sets(upstream):
    on, off = upstream.multi(upstream.fused(), 4), upstream.multi(upstream.classes, 4)
    for ours, theirs in zip(on.attn_backends, off.attn_backends):
        assert vars(theirs).keys() <= vars(ours).keys()


def test_metadata_of_a_batch_without_a_graph_tells_no_step_apart(upstream, deep_gemm):
    on = upstream.multi(upstream.fused(), 4)
    for number, backend in enumerate(on.attn_backends):
        batch = bare.draft_extend_batch(backend, upstream.module, "DRAFT_EXTEND_V2", [1, 2], [100 + number, 200])
        backend.init_forward_metadata(batch)
    assert buffers.steps_are_alike(on.attn_backends)
    on.attn_backends[1].req_to_token_pool = on.attn_backends[0].forward_metadata  # any two dataclasses of tensors
    on.attn_backends[0].req_to_token_pool = on.attn_backends[2].forward_metadata
    assert not buffers.steps_are_alike(on.attn_backends)


def test_another_table_of_slots_is_not_shared(upstream):
    on = upstream.multi(upstream.fused(), 3)
    on.attn_backends[1].req_to_token = on.attn_backends[0].req_to_token + 1
    assert not buffers.steps_are_alike(on.attn_backends)
