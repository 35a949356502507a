"""The launch as a node of the graph, as upstream's graph runners capture and replay it, plugin off against plugin on."""

import dataclasses
import logging

import pytest
import torch
from upstream import CAPTURE_BS, SETTINGS, assert_equal_fields, assert_same_fields, batches, steps

from sglang_nsa_fused import planners, replay
from sglang_nsa_fused.tools import bare

DRAFT_TOKENS = 5


@pytest.fixture(autouse=True)
def has_graphs_to_enter(upstream):
    if not upstream.release.out_graph:
        pytest.skip(f"sglang {upstream.version} calls nothing of a backend inside a graph")


@pytest.fixture
def runner(upstream, monkeypatch):
    """Captures what a graph runner does inside a region: on a CPU the graph is the list of what was called."""

    def run(backend, batch):
        region = lambda: backend.init_forward_metadata_in_graph(batch)  # noqa: E731
        region(), region()  # upstream warms up twice
        if upstream.device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                region()
            return graph.replay
        with monkeypatch.context() as patch:
            patch.setattr(replay, "is_capturing", lambda: True)
            region()
        return region if any(one is not None and one.in_graph for one in backend._replays.values()) else lambda: None

    return run


def captured(upstream, runner, backend, mode):
    return {bs: runner(backend, bare.static_batch(backend, upstream.module, mode, bs)) for bs in CAPTURE_BS}


def poison(metadata):
    for name, value in vars(metadata).items():
        if isinstance(value, torch.Tensor) and "cu_seqlens" not in name:  # element 0 of those is written once
            value.fill_(-7)


def is_poisoned(metadata) -> bool:
    return bool((metadata.real_page_table == -7).all()) and bool((metadata.cache_seqlens_int32 == -7).all())


def graph_mode(upstream, mode) -> str:
    if mode == "DRAFT_EXTEND_V2" and not upstream.release.draft_extend:
        pytest.skip(f"sglang {upstream.version} captures no draft extend")
    return mode


def replays(upstream, off, on, graphs, mode, flashmla, count=25):
    """Of both sides, `on` with the region of its graph; asserts that the call outside writes nothing."""
    for slots, lengths, bs in batches(count):
        lengths = [max(length, DRAFT_TOKENS) for length in lengths]
        bare.replay_graph(off, bare.graph_batch(off, upstream.module, mode, slots, lengths, bs))
        metadata = on.decode_cuda_graph_metadata[bs]
        batch = bare.graph_batch(on, upstream.module, mode, slots, lengths, bs)
        flashmla or poison(metadata)
        bare.replay_graph(on, batch)
        assert flashmla or is_poisoned(metadata)
        assert on.forward_metadata is metadata
        graphs[bs]()
        rows = range(DRAFT_TOKENS)
        first = 1 if mode == "TARGET_VERIFY" else 1 - DRAFT_TOKENS
        live = [max(length + first + row, 0) for length in lengths + [1] * (bs - len(slots)) for row in rows]
        live = torch.tensor(live, device=upstream.device)
        assert_equal_fields(*bare.both_fields(off.forward_metadata, metadata, live))


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2"])
def test_a_replay_launches_nothing(upstream, deep_gemm, runner, mode, flashmla):
    off, on = upstream.graphs(graph_mode(upstream, mode), DRAFT_TOKENS, flashmla)
    graphs = captured(upstream, runner, on, mode)
    inside = mode == "TARGET_VERIFY" or upstream.release.draft_extend_reads
    assert all(one.in_graph == inside for one in on._replays.values())
    if inside:
        replays(upstream, off, on, graphs, mode, flashmla)
        # A runner that captures again does so over the same metadata.
        replays(upstream, off, on, captured(upstream, runner, on, mode), mode, flashmla, 5)


def test_draft_extend_stays_before_a_graph_that_the_scheduler_does_not_wait_for(upstream, deep_gemm, runner):
    if upstream.release.draft_extend_reads or not upstream.release.draft_extend:
        pytest.skip(f"sglang {upstream.version} has no such graph")
    import inspect

    from sglang.srt.speculative import eagle_draft_extend_cuda_graph_runner as upstreams

    text = inspect.getsource(upstreams)
    assert text.index("read_done.record()") < text.rindex("self._replay_graph(")
    off, on = upstream.graphs("DRAFT_EXTEND_V2", DRAFT_TOKENS)
    captured(upstream, runner, on, "DRAFT_EXTEND_V2")
    slots, lengths, bs = [1, 2], [700, 2100], 2
    for backend in (off, on):
        bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, "DRAFT_EXTEND_V2", slots, lengths, bs))
    live = torch.tensor([n - DRAFT_TOKENS + 1 + i for n in lengths for i in range(DRAFT_TOKENS)], device=upstream.device)
    assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


def test_the_scheduler_waits_for_a_draft_extend_graph_that_reads(upstream):
    """What it waits for then is named by a method of the backend, which says nothing of draft extend: it waits for all."""
    if not upstream.release.draft_extend_reads:
        pytest.skip(f"sglang {upstream.version} waits for what comes before the graph")
    base = upstream.classes[0].shared_read_ends
    modes = upstream.module.ForwardMode
    ends = {name: base(None, modes[name]).name for name in ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")}
    assert ends == {"DECODE": "IN_REPLAY", "TARGET_VERIFY": "IN_REPLAY", "DRAFT_EXTEND_V2": "UNKNOWN"}


@pytest.mark.parametrize("draft_steps", [2, 4, 6])
def test_draft_steps_launch_nothing(upstream, deep_gemm, runner, caplog, draft_steps):
    caplog.set_level(logging.INFO)
    off, on = upstream.multi(upstream.classes, draft_steps), upstream.multi(upstream.fused(), draft_steps)
    graphs = captured(upstream, runner, on, "DECODE")
    assert all(one.in_graph for one in on._replays.values())
    for slots, lengths, bs in batches(20):
        bare.replay(off, bare.forward_batch(off, slots, lengths, bs))
        for backend in on.attn_backends:
            poison(backend.decode_cuda_graph_metadata[bs])
        batch = bare.forward_batch(on, slots, lengths, bs)
        written_by_upstream = on.attn_backends[0].decode_cuda_graph_metadata[bs].cache_seqlens_int32.data_ptr()
        bare.replay(on, batch)
        shared = written_by_upstream == on.seq_lens.data_ptr()  # in 0.5.13, where the lengths are the runner's buffer
        assert shared or all(is_poisoned(backend.decode_cuda_graph_metadata[bs]) for backend in on.attn_backends)
        graphs[bs]()
        live = torch.tensor(lengths + [1] * (bs - len(slots)), device=upstream.device)
        assert_same_fields(off, on, bs, live)
    assert caplog.text.count("draft steps: the launch is in the graphs of 4 batch sizes, before those of 0; 0 keep sglang's") == 1


def test_two_runners_in_one_process(upstream, deep_gemm, runner):
    classes = upstream.fused()
    first, second, off = upstream.multi(classes, 3), upstream.multi(classes, 5), upstream.multi(upstream.classes, 3)
    graphs = [captured(upstream, runner, one, "DECODE") for one in (first, second)]
    for slots, lengths, bs in batches(10):
        for multi in (off, second, first):
            bare.replay(multi, bare.forward_batch(multi, slots, lengths, bs))
        for one in graphs:
            one[bs]()
        assert_same_fields(off, first, bs, torch.tensor(lengths + [1] * (bs - len(slots)), device=upstream.device))


def test_an_idle_batch_is_what_the_graph_was_captured_for(upstream, deep_gemm, runner):
    """A rank without requests replays with padded rows alone."""
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)
    graphs = captured(upstream, runner, on, "TARGET_VERIFY")
    for backend in (off, on):
        bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, "TARGET_VERIFY", [], [], 4))
    graphs[4]()
    live = torch.arange(2, 2 + DRAFT_TOKENS, device=upstream.device).repeat(4)
    assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


def stays(upstream, runner, settings=SETTINGS, mode="TARGET_VERIFY", **of_batch):
    _, on = upstream.graphs(mode, DRAFT_TOKENS, settings=settings)
    for bs in CAPTURE_BS:
        batch = bare.static_batch(on, upstream.module, mode, bs)
        vars(batch).update(of_batch)
        runner(on, batch)
    return not any(one is not None and one.in_graph for one in on._replays.values())


@pytest.mark.parametrize("name", ["before_graph", "verify"])
def test_a_setting_keeps_it_before_the_graph(upstream, deep_gemm, runner, name):
    assert stays(upstream, runner, dataclasses.replace(SETTINGS, **{name: True}))


def test_half_a_batch_and_decode_without_speculation_stay_before(upstream, deep_gemm, runner):
    assert stays(upstream, runner, tbo_parent_token_range=(0, 4))
    assert stays(upstream, runner, mode="DECODE")


@pytest.mark.compares
def test_a_launch_that_something_follows_stays_before(upstream, deep_gemm, runner, monkeypatch):
    monkeypatch.setattr(planners, "SCHEDULE_FORMS", ())
    off, on = upstream.multi(upstream.classes, 3), upstream.multi(upstream.fused(), 3)
    captured(upstream, runner, on, "DECODE")
    assert not any(one.in_graph for one in on._replays.values())
    for bs, live in steps(upstream, off, on, count=5):
        assert_same_fields(off, on, bs, live)


def test_a_warm_up_without_a_capture_leaves_it_before(upstream, deep_gemm):
    off, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)
    on.init_forward_metadata_in_graph(bare.static_batch(on, upstream.module, "TARGET_VERIFY", 2))
    assert not on._replays[2].in_graph
    for backend in (off, on):
        bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, "TARGET_VERIFY", [1, 2], [5, 2100], 2))
    live = torch.tensor([n + 1 + i for n in (5, 2100) for i in range(DRAFT_TOKENS)], device=upstream.device)
    assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


def test_an_error_inside_keeps_it_before_and_is_said(upstream, deep_gemm, monkeypatch, caplog):
    _, on = upstream.graphs("TARGET_VERIFY", DRAFT_TOKENS)
    batch = bare.static_batch(on, upstream.module, "TARGET_VERIFY", 2)
    batch.seq_lens = batch.seq_lens[:1]
    monkeypatch.setattr(replay, "is_capturing", lambda: True)
    on.init_forward_metadata_in_graph(batch)
    assert not on._replays[2].in_graph and "a launch stays before its graph: seq_lens" in caplog.text
