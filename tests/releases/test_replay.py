"""Upstream's real classes, capture then replays, plugin off against plugin on, field by field."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

from sglang_nsa_fused import backends, bare, plugin
from sglang_nsa_fused.settings import Settings

SETTINGS = Settings(enabled=True, required=False, allowlist=None)
CAPTURE_BS = [1, 2, 4, 8]
LONGEST = 3000


class Upstream:
    def __init__(self, device):
        self.release, self.version = plugin.find_release()
        self.module = bare.import_upstream(self.release, device)
        plugin.import_backend(self.release)
        self.classes = getattr(self.module, self.release.backend), getattr(self.module, self.release.multi_step)
        self.device = device

    def fused(self, settings=SETTINGS):
        return backends.subclasses(self.release, self.module, self.version, settings)

    def multi(self, classes, draft_steps, flashmla=False):
        width = LONGEST + draft_steps + 1
        table = torch.randperm(17 * width, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(17, width)
        args = (self.release, self.device, table.to(self.device), draft_steps, CAPTURE_BS, flashmla)
        return bare.multi_step_backend(classes, *args)


@pytest.fixture
def upstream(device):
    return Upstream(device)


@pytest.fixture
def deep_gemm(upstream, monkeypatch):
    """A stand-in that gives the CPU the schedule branches of a GPU: its numbers depend on every length."""
    if upstream.device == "cuda":
        import deep_gemm

        return deep_gemm

    def get_paged_mqa_logits_metadata(context_lens, block, num_sms):
        assert context_lens.shape[1] == 1 and block == 64
        return (context_lens.sum() * 1000 + torch.arange((num_sms + 1) * 2)).to(torch.int32).view(-1, 2)

    stand_in = SimpleNamespace(get_paged_mqa_logits_metadata=get_paged_mqa_logits_metadata, get_num_sms=lambda: 132)
    monkeypatch.setitem(__import__("sys").modules, "deep_gemm", stand_in)
    monkeypatch.setattr(upstream.module, "is_cuda", lambda: True)
    return stand_in


def steps(upstream, off, on, count=40):
    """Replays the same requests on both sides; yields (bs, live lengths) after each."""
    for slots, lengths in bare.requests(count, most=CAPTURE_BS[-1], longest=LONGEST):
        bs = next(size for size in CAPTURE_BS if size >= len(slots))
        for multi in (off, on):
            bare.replay(multi, bare.forward_batch(multi, slots, lengths, bs))
        yield bs, torch.tensor(lengths + [1] * (bs - len(lengths)), device=upstream.device)


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("draft_steps", [2, 3, 4, 5, 8])
def test_every_field_of_every_backend(upstream, deep_gemm, draft_steps, flashmla):
    off, on = upstream.multi(upstream.classes, draft_steps, flashmla), upstream.multi(upstream.fused(), draft_steps, flashmla)
    for bs, live in steps(upstream, off, on):
        for number, (left, right) in enumerate(zip(off.attn_backends, on.attn_backends)):
            expected, found = (bare.fields(b.decode_cuda_graph_metadata[bs], live) for b in (left, right))
            if draft_steps > 3 and number < 3:
                del expected["paged_mqa_schedule_metadata"]  # upstream's is stale: the next test has the oracle
            for name, tensor in expected.items():
                assert torch.equal(tensor, found[name]), f"{name} of backend {number}, batch {bs}"
            assert right.forward_metadata is right.decode_cuda_graph_metadata[bs]


@pytest.mark.parametrize("draft_steps", [3, 4, 5])
def test_the_schedule_is_that_of_this_replays_lengths(upstream, deep_gemm, draft_steps):
    on = upstream.multi(upstream.fused(), draft_steps)
    off = upstream.multi(upstream.classes, draft_steps)
    stale = 0
    for bs, live in steps(upstream, off, on):
        right = deep_gemm.get_paged_mqa_logits_metadata(live.to(torch.int32).view(-1, 1), 64, deep_gemm.get_num_sms())
        for backend in on.attn_backends:
            assert torch.equal(backend.decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata, right)
        stale += not torch.equal(off.attn_backends[0].decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata, right)
    # Upstream's multi-backend path, above three steps, forgets it; on the CPU that path is not reached.
    assert (stale > 0) == (draft_steps > 3 and upstream.device == "cuda")


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


def test_one_native_call_serves_all_backends(upstream, deep_gemm, monkeypatch):
    on = upstream.multi(upstream.fused(), 6)
    calls = []
    for replay in on._replays.values():
        copy_once = replay.plan.copy
        replay.plan = SimpleNamespace(copy=lambda *args, copy_once=copy_once: calls.append(1) or copy_once(*args))
    for _ in steps(upstream, upstream.multi(upstream.classes, 6), on, count=5):
        pass
    assert len(calls) == 5


def forward_mode(upstream, name):
    return upstream.module.ForwardMode[name]


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("name", ["DECODE", "TARGET_VERIFY", "DRAFT_EXTEND"])
def test_a_single_backend_in_each_mode(upstream, deep_gemm, name, flashmla):
    """The method that the plugin overrides, as upstream's own precomputation calls for it."""
    mode, draft_tokens, device = forward_mode(upstream, name), 3, upstream.device
    table = torch.randperm(9 * LONGEST).to(torch.int32).view(9, LONGEST).to(device)
    seq_lens = torch.tensor([64, 2049, 7, 1], device=device)
    accepted = SimpleNamespace(num_accept_tokens=torch.tensor([1, 3, 2, 1], device=device))
    found = []
    for cls in (upstream.classes[0], upstream.fused()[0]):
        backend = bare.step_backend(cls, upstream.release, device, table, draft_tokens, flashmla)
        backend.init_cuda_graph_state(4, 4 * draft_tokens)
        ones = torch.ones(4, dtype=torch.int32, device=device)
        rows = 4 if name == "DECODE" else 4 * draft_tokens
        backend.init_forward_metadata_capture_cuda_graph(4, rows, ones.long(), ones, None, mode, None)
        precomputed = backend._precompute_replay_metadata(
            4, torch.tensor([3, 1, 8, 2], device=device), seq_lens, seq_lens.cpu(), mode, accepted
        )
        backend.init_forward_metadata_replay_cuda_graph_from_precomputed(bs=4, precomputed=precomputed, forward_mode=mode)
        assert backend.forward_metadata is backend.decode_cuda_graph_metadata[4]
        live = precomputed.seqlens_expanded.to(device)
        fields = bare.fields(backend.forward_metadata, live)
        if name == "DRAFT_EXTEND":  # rows behind the accepted ones hold whatever the capture left
            size = precomputed.seqlens_expanded_size
            fields = {key: t if "table" in key or "metadata" in key else t[: size + 1] for key, t in fields.items()}
        found.append(fields)
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key]), key


def test_a_replay_in_another_mode_than_captured_is_refused(upstream):
    on = upstream.multi(upstream.fused(), 3)
    precomputed = SimpleNamespace()
    with pytest.raises(ValueError, match="forward_mode: expected that of the capture, 0, got .*TARGET_VERIFY"):
        on.attn_backends[0].init_forward_metadata_replay_cuda_graph_from_precomputed(
            bs=4, precomputed=precomputed, forward_mode=forward_mode(upstream, "TARGET_VERIFY")
        )


def test_a_batch_size_that_cannot_be_planned_keeps_upstreams_replay(upstream, deep_gemm, monkeypatch, caplog):
    def refuse(*args):
        raise ValueError("page_table_1_dst: expected what this test wants")

    monkeypatch.setattr(backends, "ReplayPlan", refuse)
    backends._refuse.cache_clear()
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


def test_without_a_kernel_the_reference_copies_and_says_so_once(upstream, deep_gemm, monkeypatch, caplog):
    from sglang_nsa_fused import kernels, reference

    engine = kernels.Engine("reference", reference.copy_plan, "native: gone")
    monkeypatch.setattr(backends, "select", lambda device_type: engine)
    backends._refuse.cache_clear()
    on, off = upstream.multi(upstream.fused(), 3), upstream.multi(upstream.classes, 3)
    assert caplog.text.count("metadata is copied tensor by tensor") == 1
    for bs, live in steps(upstream, off, on, count=5):
        assert_same_fields(off, on, bs, live)
    with pytest.raises(SystemExit, match="no kernel for"):
        upstream.multi(upstream.fused(Settings(True, True, None)), 3)


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
    before = [(backend.use_mha, backend.nsa_prefill_impl) for backend in on.attn_backends]
    for backend in on.attn_backends:  # as an eager batch between two replays leaves it
        backend.use_mha, backend.nsa_prefill_impl, backend.forward_metadata = True, "other", None
    bare.replay(on, bare.forward_batch(on, [1, 2], [5, 70], 2))
    assert [(backend.use_mha, backend.nsa_prefill_impl) for backend in on.attn_backends] == before
    assert all(b.forward_metadata is b.decode_cuda_graph_metadata[2] for b in on.attn_backends)


def assert_same_fields(off, on, bs, live):
    for number, (left, right) in enumerate(zip(off.attn_backends, on.attn_backends)):
        expected, found = (bare.fields(backend.decode_cuda_graph_metadata[bs], live) for backend in (left, right))
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), f"{name} of backend {number}, batch {bs}"


def test_a_sources_state_is_not_changed(upstream, deep_gemm):
    on = upstream.multi(upstream.fused(), 3)
    batch = bare.forward_batch(on, [1, 2, 3], [5, 70, 2050], 4)
    before = copy.deepcopy(vars(batch))
    bare.replay(on, batch)
    for name, value in vars(batch).items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
