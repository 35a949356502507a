"""The page table with one column per token: not allocated where upstream's condition holds apart from speculation."""

import contextlib
import dataclasses
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from upstream import CAPTURE_BS, SETTINGS, WIDE, assert_equal_fields, assert_same_fields, batches, steps

from sglang_nsa_fused import buffers, hooks, kernels, releases, replay
from sglang_nsa_fused.tools import bare, versions

DRAFT_TOKENS = 4
MODES = ["TARGET_VERIFY", "DRAFT_EXTEND_V2"]
ALWAYS = {
    "is_cuda()",
    "not _is_hip",
    "self.real_page_size > 1",
    "self.hisparse_coordinator is None",
    "not self.speculative_num_draft_tokens",
    "self.dsa_index_topk is not None",
}
V2, UP_TO = "envs.SGLANG_OPT_USE_TOPK_V2.get()", "self.dsa_index_topk <= 2048"
BY_BACKEND = {"self.use_fused_topk", "self.dsa_topk_backend.should_use_topk_v2()", f"0 < {UP_TO}"}
TERMS = {  # release -> what its condition asks besides, and that of those after it
    "0.5.15": {"envs.SGLANG_DSA_FUSE_TOPK.get()", V2, UP_TO},
    "0.5.15.post1": {"self.use_fused_topk", V2, UP_TO},
    "0.5.17": BY_BACKEND,
    "0.5.20": {*BY_BACKEND, "self.dsa_index_kpool <= 1"},
}


@pytest.fixture(autouse=True)
def of_this_release(upstream):
    if upstream.release.drop_wide_table is None:
        pytest.skip("the top-k of this release reads the wide table")
    hooks._refuse.cache_clear()


def live_rows(lengths, device):
    return torch.tensor([n + i for n in lengths for i in range(1, DRAFT_TOKENS + 1)], device=device)


def replayed(upstream, off, on, mode, count=12):
    """Replays the same batches on both; yields the live tokens of each row."""
    for slots, lengths, bs in batches(count):
        grown = [n + DRAFT_TOKENS * (mode != "TARGET_VERIFY") for n in lengths]
        for backend in (off, on):
            bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, mode, slots, grown, bs))
        padded = lengths + [1 - DRAFT_TOKENS * (mode != "TARGET_VERIFY")] * (bs - len(lengths))
        yield live_rows(padded, upstream.device).clamp(min=0)


def tables(backend):
    return [backend.decode_cuda_graph_metadata[bs].page_table_1 for bs in CAPTURE_BS]


def test_the_condition_is_as_known(upstream):
    terms = buffers.drop_terms(upstream.classes[0], upstream.release.drop_wide_table, upstream.release.draft_tokens)
    of_all = [version for release in releases.RELEASES for version in release.versions]
    known = [TERMS[version] for version in of_all[: of_all.index(upstream.version) + 1] if version in TERMS][-1]
    assert {term.replace("physical_page_size", "real_page_size") for term in terms} == ALWAYS | known


@pytest.mark.parametrize("flashmla", [False, True])
def test_draft_steps_have_none(upstream, deep_gemm, flashmla):
    off, on = upstream.multi(upstream.classes, 5, flashmla), upstream.multi(upstream.fused(), 5, flashmla)
    for theirs, ours in zip(off.attn_backends, on.attn_backends):
        assert ours.decode_cuda_graph_metadata["page_table"] is None and tables(ours) == [None] * len(CAPTURE_BS)
        assert all(table is not None for table in tables(theirs))
        assert ours.speculative_num_draft_tokens == theirs.speculative_num_draft_tokens == 6
    for bs, live in steps(upstream, off, on):
        assert_same_fields(off, on, bs, live)


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_has_none(upstream, deep_gemm, mode, flashmla):
    off, on = upstream.graphs(mode, DRAFT_TOKENS, flashmla)
    assert on.decode_cuda_graph_metadata["page_table"] is None and tables(on) == [None] * len(CAPTURE_BS)
    assert all(table is not None for table in tables(off))
    for live in replayed(upstream, off, on, mode):
        assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


@pytest.fixture
def without_plans(monkeypatch):
    """Each batch size keeps upstream's replay."""

    def refuse(*_):
        raise ValueError("page_table_1_dst: expected what this test wants")

    monkeypatch.setattr(replay, "ReplayPlan", refuse)


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_upstreams_replay_of_a_graph_works_without(upstream, deep_gemm, without_plans, mode, flashmla):
    off, on = upstream.graphs(mode, DRAFT_TOKENS, flashmla)
    assert set(on._replays.values()) == {None} and tables(on) == [None] * len(CAPTURE_BS)
    for live in replayed(upstream, off, on, mode):
        assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


@pytest.mark.parametrize("flashmla", [False, True])
def test_upstreams_replays_of_draft_steps_work_without(upstream, deep_gemm, without_plans, flashmla):
    off, on = upstream.multi(upstream.classes, 5, flashmla), upstream.multi(upstream.fused(), 5, flashmla)
    assert set(on._replays.values()) == {None} and tables(on.attn_backends[0]) == [None] * len(CAPTURE_BS)
    for bs, live in steps(upstream, off, on):
        assert_same_fields(off, on, bs, live)
        assert all(backend.forward_metadata is backend.decode_cuda_graph_metadata[bs] for backend in on.attn_backends)


CONSUMERS = {
    "hisparse": lambda upstream: {"hisparse_coordinator": object()},
    "unfused top-k": lambda upstream: {"use_fused_topk": False},
    "another top-k": lambda upstream: {"dsa_topk_backend": upstream.module.DSATopKBackend.TORCH},
    "a larger top-k": lambda upstream: {upstream.release.index_topk: 4096},
    "pages of one token": lambda upstream: {upstream.release.page_size: 1},
    "pooled keys": lambda upstream: {upstream.release.kpool: 2},
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_it_is_there_where_somebody_reads_it(upstream, deep_gemm, monkeypatch, consumer):
    attributes = versions.of(upstream.version).attributes
    if consumer == "pooled keys" and upstream.release.kpool is None:
        pytest.skip("this release has no such consumer")
    if consumer == "another top-k" and "dsa_topk_backend" not in attributes:
        pytest.skip("this release has no such consumer")
    if consumer == "unfused top-k" and "use_fused_topk" not in attributes:
        monkeypatch.setenv("SGLANG_DSA_FUSE_TOPK", "0")
    if consumer == "pages of one token" and upstream.device == "cuda":
        pytest.skip("a GPU's indexer has pages of 64 tokens")
    made = bare.step_backend

    def with_consumer(*args):
        backend = made(*args)
        vars(backend).update(CONSUMERS[consumer](upstream))
        return backend

    monkeypatch.setattr(bare, "step_backend", with_consumer)
    if consumer == "pooled keys":  # upstream's pooled metadata needs its kernels: what is allocated alone
        on = bare.step_backend(upstream.fused()[0], upstream.release, upstream.device, torch.zeros(9, 300).int(), 4, False)
        on.init_cuda_graph_state(8, 32)
        assert on.decode_cuda_graph_metadata["page_table"] is not None
        return
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)
    assert all(table is not None for table in tables(on))
    for live in replayed(upstream, off, on, "TARGET_VERIFY"):
        expected, found = (bare.fields(backend.forward_metadata, live) for backend in (off, on))
        if consumer == "pages of one token":
            expected.pop("real_page_table"), found.pop("real_page_table")  # the same tensor, compared with pages of 64
        assert "page_table_1" in found
        assert_equal_fields(expected, found)


def test_a_top_k_that_is_switched_off_reads_it(upstream, deep_gemm, monkeypatch):
    monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", "0")
    on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)[1]
    assert all(table is not None for table in tables(on))


def test_the_user_may_keep_it(upstream, deep_gemm):
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS, settings=WIDE)
    for live in replayed(upstream, off, on, "TARGET_VERIFY"):
        expected, found = (bare.fields(backend.forward_metadata, live) for backend in (off, on))
        assert "page_table_1" in found
        assert_equal_fields(expected, found)
    multi = upstream.multi(upstream.fused(WIDE), 4)
    assert all(table is not None for backend in multi.attn_backends for table in tables(backend))


def test_it_is_there_where_upstreams_copies_stay(upstream, monkeypatch):
    monkeypatch.setattr(hooks, "select", lambda device_type: kernels.Engine("none", reason="native: gone"))
    on = upstream.multi(upstream.fused(), 4)
    assert all(table is not None for backend in on.attn_backends for table in tables(backend))


@pytest.mark.parametrize("form", ["another operator", "asked elsewhere"])
def test_a_condition_of_another_form_keeps_it(upstream, deep_gemm, monkeypatch, caplog, form):
    """As of a release that asks about speculation in another way."""
    flag, made = upstream.release.drop_wide_table, upstream.classes[0].init_cuda_graph_state

    def another_operator(self, max_bs, max_num_tokens):
        made(self, max_bs, max_num_tokens)
        self.dsa_drop_wide_page_table = (
            self.dsa_drop_wide_page_table and not self.speculative_num_draft_tokens or self.speculative_num_draft_tokens == 1
        )

    def asked_elsewhere(self, max_bs, max_num_tokens):
        made(self, max_bs, max_num_tokens)
        self.dsa_drop_wide_page_table = self.dsa_drop_wide_page_table and not self.speculative_num_draft_tokens
        self.reads_it = self.speculative_num_draft_tokens

    init_cuda_graph_state = another_operator if form == "another operator" else asked_elsewhere
    monkeypatch.setattr(upstream.classes[0], "init_cuda_graph_state", init_cuda_graph_state)
    assert buffers.drop_terms(upstream.classes[0], flag, upstream.release.draft_tokens) == ()
    on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)[1]
    assert all(table is not None for table in tables(on))
    assert caplog.text.count("the wide page tables stay") == 1


class Regions(TorchDispatchMode):
    """In place of upstream's memory saver: remembers what was allocated inside its regions."""

    def __init__(self):
        super().__init__()
        self.inside, self.made = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.inside and isinstance(out, torch.Tensor):
            self.made.append(out)
        return out

    @contextlib.contextmanager
    def region(self, tag):
        self.inside += 1
        try:
            with self:
                yield
        finally:
            self.inside -= 1


@pytest.mark.parametrize("settings", [SETTINGS, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("mode", ["DECODE", *MODES])
def test_what_a_memory_saver_zeroes_is_written_by_each_replay(upstream, deep_gemm, monkeypatch, mode, settings):
    """After release and resume all of a region's memory is zero."""
    if "_memory_saver_adapter" not in versions.of(upstream.version).attributes:
        pytest.skip("graphs of this release have no region")
    regions, step_backend = Regions(), bare.step_backend

    def with_regions(*args):
        backend = step_backend(*args)
        backend._memory_saver_adapter = regions
        if args[5] and upstream.device == "cpu":  # made of torch operations inside the region, as on a GPU
            compute = backend._compute_flashmla_metadata
            backend._compute_flashmla_metadata = lambda **kwargs: regions_own(compute(**kwargs))
        return backend

    def regions_own(made):
        regions.made += [made.num_splits, made.flashmla_metadata] if regions.inside else []
        return made

    monkeypatch.setattr(bare, "step_backend", with_regions)
    off, on = (
        upstream.multi((upstream.classes, upstream.fused(settings))[side], 4, flashmla=True)
        if mode == "DECODE"
        else upstream.graphs(mode, DRAFT_TOKENS, True, settings)[side]
        for side in (0, 1)
    )
    assert regions.made
    for tensor in regions.made:
        tensor.zero_()
    if mode == "DECODE":
        for bs, live in steps(upstream, off, on, count=10):
            assert_same_fields(off, on, bs, live)
    else:
        for live in replayed(upstream, off, on, mode):
            assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


def test_graphs_may_be_captured_anew(upstream, deep_gemm):
    """As after a change of the hidden-state mode, or with adaptive speculation."""
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)
    on.init_cuda_graph_state(8, 8 * DRAFT_TOKENS)
    for bs in CAPTURE_BS:
        bare.capture(on, upstream.module, upstream.release, "TARGET_VERIFY", bs)
    assert tables(on) == [None] * len(CAPTURE_BS)
    for live in replayed(upstream, off, on, "TARGET_VERIFY"):
        assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


def test_the_log_says_what_is_not_allocated(upstream, deep_gemm, caplog):
    """Of each runner, and summed."""
    caplog.set_level(logging.INFO, "sglang_nsa_fused")
    classes = upstream.fused(dataclasses.replace(SETTINGS))
    table = torch.zeros(17, 100_000, dtype=torch.int32, device=upstream.device)
    args = (upstream.module, upstream.release, upstream.device, table, DRAFT_TOKENS)
    for mode in MODES:
        bare.graph_backend(classes[0], *args, mode, [1, 8])
    bare.multi_step_backend(classes, upstream.release, upstream.device, table, DRAFT_TOKENS - 1, [1, 8])
    lines = [r.getMessage() for r in caplog.records if "not allocated" in r.getMessage()]
    wide = 8 * 100_000 * 4
    each = DRAFT_TOKENS * (wide - wide / 64) / 2**30
    steps = (2 * wide - wide / 64) / 2**30  # of two steps, with one narrow table
    expected = (
        f"target verify {each:.3f} GiB, draft extend {each:.3f} GiB, draft steps {steps:.3f} GiB; {2 * each + steps:.3f} GiB"
    )
    assert len(lines) == 3 and lines[-1] == f"sglang-nsa-fused: not allocated: {expected} in all"
