"""Upstream's real classes, capture then replays, plugin off against plugin on, field by field."""

import copy
import logging

import pytest
import torch
from upstream import CAPTURE_BS, assert_same_fields, stale_fields, steps

from sglang_nsa_fused import hooks, kernels, replay
from sglang_nsa_fused.settings import Settings
from sglang_nsa_fused.tools import bare


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("draft_steps", [2, 3, 4, 5, 8])
def test_every_field_of_every_backend(upstream, deep_gemm, draft_steps, flashmla):
    off, on = upstream.multi(upstream.classes, draft_steps, flashmla), upstream.multi(upstream.fused(), draft_steps, flashmla)
    for bs, live in steps(upstream, off, on):
        for number, (left, right) in enumerate(zip(off.attn_backends, on.attn_backends)):
            expected, found = bare.both_fields(*(b.decode_cuda_graph_metadata[bs] for b in (left, right)), live)
            assert expected.keys() == found.keys()
            # The next test has the oracle of what is stale in upstream.
            for name in expected.keys() - stale_fields(upstream.release, draft_steps, number):
                assert torch.equal(expected[name], found[name]), f"{name} of backend {number}, batch {bs}"
            assert right.forward_metadata is right.decode_cuda_graph_metadata[bs]


@pytest.mark.parametrize("draft_steps", [3, 4, 5])
def test_the_schedule_is_that_of_this_replays_lengths(upstream, deep_gemm, draft_steps):
    on = upstream.multi(upstream.fused(), draft_steps)
    off = upstream.multi(upstream.classes, draft_steps)
    stale = 0
    for bs, live in steps(upstream, off, on):
        right = upstream.schedule(live)
        for backend in on.attn_backends:
            assert torch.equal(backend.decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata, right)
        stale += not torch.equal(off.attn_backends[0].decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata, right)
    # Upstream's multi-backend path, above three steps, forgets it; on the CPU that path is not reached.
    forgets = draft_steps > 3 and upstream.device == "cuda"
    assert (stale > 0) == (forgets or not upstream.release.draft_schedule)


def test_captured_tensors_keep_their_addresses(upstream, deep_gemm):
    on = upstream.multi(upstream.fused(), 4, flashmla=True)

    def addresses():
        return [
            tensor.data_ptr()
            for backend in on.attn_backends
            for bs in CAPTURE_BS
            for tensor in vars(backend.decode_cuda_graph_metadata[bs]).values()
            if isinstance(tensor, torch.Tensor)
        ]

    before = addresses()
    for _ in steps(upstream, upstream.multi(upstream.classes, 4, flashmla=True), on, count=10):
        pass
    assert addresses() == before


def test_one_native_call_serves_all_backends(upstream, deep_gemm):
    on = upstream.multi(upstream.fused(), 6)
    calls = []
    for one in on._replays.values():
        generate = one._generate
        one._generate = lambda *args, generate=generate: calls.append(1) or generate(*args)
    for _ in steps(upstream, upstream.multi(upstream.classes, 6), on, count=5):
        pass
    assert len(calls) == 5


def test_a_batch_size_that_cannot_be_planned_keeps_upstreams_replay(upstream, deep_gemm, monkeypatch, caplog):
    def refuse(*args):
        raise ValueError("page_table_1_dst: expected what this test wants")

    monkeypatch.setattr(replay, "ReplayPlan", refuse)
    hooks._refuse.cache_clear()
    on, off = upstream.multi(upstream.fused(), 3), upstream.multi(upstream.classes, 3)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sorted(warnings) == [
        f"sglang-nsa-fused: batch size {bs} keeps upstream's replay: page_table_1_dst: expected what this test wants"
        for bs in CAPTURE_BS
    ]
    for bs, live in steps(upstream, off, on, count=5):
        assert_same_fields(off, on, bs, live)
    with pytest.raises(SystemExit, match="keeps upstream's replay"):
        upstream.multi(upstream.fused(Settings(True, True, None)), 3)


@pytest.mark.parametrize("draft_steps", [3, 5])
@pytest.mark.parametrize("name", ["none", "sgl_kernel"])
def test_without_the_library_the_refreshes_are_upstreams(upstream, deep_gemm, monkeypatch, caplog, name, draft_steps):
    """An sgl_kernel that has the copy makes that of each step which upstream's own three-way kernel does not."""
    copy_plan = kernels.select(upstream.device).copy_plan if name == "sgl_kernel" else None
    monkeypatch.setattr(hooks, "select", lambda device_type: kernels.Engine(name, copy_plan, "native: gone"))
    hooks._refuse.cache_clear()
    on, off = upstream.multi(upstream.fused(), draft_steps), upstream.multi(upstream.classes, draft_steps)
    left = {"none": "sglang runs unchanged", "sgl_kernel": "copies of the draft steps are sgl_kernel's, the rest sglang's"}[name]
    assert caplog.text.count(f"no native library for {upstream.device} (native: gone); {left}") == 1
    assert "active: sglang" not in caplog.text and set(on._replays.values()) == {None}
    for bs, live in steps(upstream, off, on, count=5):
        assert_same_fields(off, on, bs, live)
    copies = [copy for backend in on.attn_backends for copy in backend._copies.values()]
    assert copies and all((copy is None) == (name == "none") for copy in copies)
    with pytest.raises(SystemExit, match="no native library for"):
        upstream.multi(upstream.fused(Settings(True, True, None)), 3)


def test_each_replay_can_be_compared_with_the_reference(upstream, deep_gemm, caplog):
    classes = upstream.fused(Settings(True, True, None, verify=True))
    on = upstream.multi(classes, 4, flashmla=True)
    assert caplog.text.count("each replay is compared with the reference and waits for the GPU") == 1
    for _ in steps(upstream, upstream.multi(upstream.classes, 4, flashmla=True), on, count=10):
        pass
    step = on.attn_backends[0]
    batch = bare.draft_extend_batch(step, upstream.module, "DRAFT_EXTEND_V2", [1, 2], [70, 2100])
    step.init_forward_metadata(batch)


def test_several_graph_runners_do_not_share_plans(upstream, deep_gemm):
    """Adaptive speculation builds several multi-step backends, with batch sizes and steps of their own."""
    classes = upstream.fused()
    first, second = upstream.multi(classes, 3), upstream.multi(classes, 5)
    off = upstream.multi(upstream.classes, 3)
    for _ in steps(upstream, second, first, count=3):
        pass
    for bs, live in steps(upstream, off, first, count=10):
        assert_same_fields(off, first, bs, live)


def test_a_replay_sets_what_upstreams_prefill_choice_sets(upstream):
    """The plan repeats the state of the capture: true while the method, without a batch, sets these attributes alone."""
    import ast
    import inspect
    import textwrap

    method = getattr(upstream.classes[0], upstream.release.set_prefill_impl)
    assigned = {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    assert assigned == set(upstream.release.prefill_impl_state)
    on = upstream.multi(upstream.fused(), 3)
    names = upstream.release.prefill_impl_state
    before = [[getattr(backend, name) for name in names] for backend in on.attn_backends]
    for backend in on.attn_backends:  # as an eager batch between two replays leaves it
        vars(backend).update(dict.fromkeys(names, "other"), forward_metadata=None)
    bare.replay(on, bare.forward_batch(on, [1, 2], [5, 70], 2))
    assert [[getattr(backend, name) for name in names] for backend in on.attn_backends] == before
    assert all(b.forward_metadata is b.decode_cuda_graph_metadata[2] for b in on.attn_backends)


def test_a_sources_state_is_not_changed(upstream, deep_gemm):
    on = upstream.multi(upstream.fused(), 3)
    batch = bare.forward_batch(on, [1, 2, 3], [5, 70, 2050], 4)
    before = copy.deepcopy(vars(batch))
    bare.replay(on, batch)
    for name, value in vars(batch).items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
