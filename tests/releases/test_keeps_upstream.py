"""What differs on some GPUs and servers, and what the plugin leaves to upstream."""

import dataclasses
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from upstream import CAPTURE_BS, SETTINGS, after, assert_equal_fields, batches

from sglang_nsa_fused import buffers, hooks, kernels, planners, releases, start_check
from sglang_nsa_fused.tools import bare, versions

pytestmark = pytest.mark.compares


def replay_both(upstream, off, on, mode, live_rows, count=15):
    for slots, lengths, bs in batches(count):
        for backend in (off, on):
            bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, mode, slots, lengths, bs))
        live = live_rows(lengths + [1] * (bs - len(lengths)))
        assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


@pytest.mark.parametrize("flashmla", [False, True])
def test_blackwell_schedules_target_verify_by_request(upstream, flashmla):
    if upstream.release.captured_lens_2d is None or upstream.device == "cuda":
        pytest.skip("by row in this release" if upstream.device == "cpu" else "the schedule of another GPU")
    with upstream.gpu(sm100=True):
        off, on = upstream.graphs("TARGET_VERIFY", 4, flashmla)
        assert off.decode_cuda_graph_metadata[8].paged_mqa_ctx_lens_2d.shape == (8, 4)
        assert all(after(on._replays[bs]) == ["_refresh_schedule_by_request"] for bs in CAPTURE_BS)

        def rows(lengths):
            return torch.tensor([n + i for n in lengths for i in range(1, 5)])

        replay_both(upstream, off, on, "TARGET_VERIFY", rows)


def test_decode_without_speculation(upstream):
    """From 0.5.15 on it has no wide page table and is upstream's."""
    off, on = upstream.graphs("DECODE", None)
    narrow = off.decode_cuda_graph_metadata[8].page_table_1 is None
    assert all((on._replays[bs] is None) == narrow for bs in CAPTURE_BS)
    replay_both(upstream, off, on, "DECODE", lambda lengths: torch.tensor(lengths, device=upstream.device))


def test_a_replay_in_another_mode_than_captured_is_upstreams(upstream, monkeypatch):
    if not upstream.release.out_graph:
        pytest.skip("refused in this release")
    off, on = upstream.graphs("TARGET_VERIFY", 4)
    seen = []
    monkeypatch.setattr(upstream.classes[0], "_apply_cuda_graph_metadata", lambda *args, **kwargs: seen.append(args[5].name))
    bare.replay_graph(on, bare.graph_batch(on, upstream.module, "IDLE", [1], [5], 1))
    bare.replay_graph(on, bare.graph_batch(on, upstream.module, "TARGET_VERIFY", [1], [5], 1))
    assert seen == ["IDLE"]


def test_a_new_batch_size_is_captured_at_its_first_batch(upstream):
    if not upstream.release.out_graph:
        pytest.skip("refused in this release")
    off, on = upstream.graphs("TARGET_VERIFY", 4)
    for lengths in ([5, 70, 2049], [6, 71, 2050]):
        for backend in (off, on):
            bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, "TARGET_VERIFY", [1, 2, 3], lengths, 3))
    live = torch.tensor([n + i for n in lengths for i in range(1, 5)], device=upstream.device)
    assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))
    assert on._replays[3] is not None


def test_pooled_index_keys_are_upstreams(upstream, caplog):
    if upstream.release.kpool is None:
        pytest.skip("this release has none")
    on = upstream.multi(upstream.fused(), 4)
    decisions = type(on)._hooks
    hooks._refuse.cache_clear()
    for backend in on.attn_backends:
        setattr(backend, upstream.release.kpool, 2)
    assert [decisions.capture(0, on.attn_backends, bs) for bs in CAPTURE_BS] == [None] * len(CAPTURE_BS)
    assert decisions.draft_extend(on.attn_backends[0]) is None
    assert caplog.text.count("an index with pooled keys keeps upstream's replays") == 1
    on.init_cuda_graph_state(8, 8)
    assert not on._share


def test_a_sharded_cache_prepares_its_own_draft_extend(upstream):
    if upstream.release.kv_shard_pool is None:
        pytest.skip("this release has none")
    off, on = upstream.graphs("DECODE", 4)
    decisions = type(on)._hooks
    assert decisions.draft_extend(on) is not None
    setattr(on, upstream.release.kv_shard_pool, object())
    assert decisions.draft_extend(on) is None


def test_a_top_k_plan_of_unknown_form_is_upstreams(upstream, monkeypatch, caplog):
    if upstream.release.topk_v2_plan is None or upstream.device == "cuda":
        pytest.skip("this release has none" if upstream.device == "cpu" else "a GPU's has the known form")
    with monkeypatch.context() as capture:
        capture.setattr(planners, "TOPK_BUCKETS", planners.TOPK_BUCKETS[:-1])
        off, on = upstream.graphs("TARGET_VERIFY", 4)
    assert all(after(on._replays[bs]) == ["_refresh_topk_v2_plan"] for bs in CAPTURE_BS)
    assert caplog.text.count("the plan of the top-k has a form that this plugin does not know") == 1

    def rows(lengths):
        return torch.tensor([n + i for n in lengths for i in range(1, 5)])

    replay_both(upstream, off, on, "TARGET_VERIFY", rows)
    on._replays[4]._after.clear()
    with pytest.raises(AssertionError, match="topk_v2_plan"):  # the other tests see a stale one
        replay_both(upstream, off, on, "TARGET_VERIFY", rows)


def test_a_top_k_plan_that_is_unwritten_is_left_so(upstream, monkeypatch):
    """As upstream's is from 0.5.21 on for so few rows that the top-k does without."""
    if upstream.release.topk_v2_plan is None or upstream.device == "cuda":
        pytest.skip("this release has none" if upstream.device == "cpu" else "stands in for the planner")
    on = upstream.graphs("TARGET_VERIFY", 4)[1]
    found = planners.Planners(upstream.release, upstream.module, None)
    monkeypatch.setattr(planners, "_built_over_poison", lambda build, lengths: torch.full((len(lengths) + 1, 2), -7).int())
    assert found.topk_buckets(on, 32) == ()
    monkeypatch.setattr(planners, "_built_over_poison", lambda build, lengths: torch.full((len(lengths) + 1, 2), -6).int())
    assert found.topk_buckets(on, 64) is None


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("deep_gemm: no"), "deep_gemm: no"),
        (AssertionError(), "AssertionError: "),
        (KeyError("sms"), "KeyError: 'sms'"),
        (OSError("no nvcc"), "OSError: no nvcc"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_a_planner_that_fails_at_capture_leaves_the_batch_size_upstreams(upstream, deep_gemm, monkeypatch, caplog, error, said):
    def fails(*_):
        raise error

    monkeypatch.setattr(planners.Planners, "schedule_form", fails)
    hooks._refuse.cache_clear()
    off, on = upstream.graphs("TARGET_VERIFY", 4)
    assert set(on._replays.values()) == {None}
    assert f"batch size 8 keeps upstream's replay: {said}" in caplog.text


def test_a_signal_in_a_capture_ends_the_process(upstream, deep_gemm, monkeypatch):
    """As any exception that is no Exception."""
    monkeypatch.setattr(planners.Planners, "schedule_form", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        with pytest.raises(SystemExit, match="terminated"):
            upstream.graphs("TARGET_VERIFY", 4)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_out_of_memory_in_upstreams_part_of_a_capture_is_upstreams(upstream, deep_gemm, monkeypatch):
    """It leaves the backends as they were: the draft tokens and all but the first step were hidden from it."""
    on, (_, step) = upstream.multi(upstream.fused(), 4), upstream.graphs("TARGET_VERIFY", 4)
    before = [list(on.attn_backends), on.speculative_num_steps, getattr(step, upstream.release.draft_tokens)]

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(upstream.classes[0], "init_cuda_graph_state", fails)
    for backend in (on, step):
        with pytest.raises(torch.OutOfMemoryError):
            backend.init_cuda_graph_state(8, 8 * 4)
    assert [on.attn_backends, on.speculative_num_steps, getattr(step, upstream.release.draft_tokens)] == before


def test_steps_that_cannot_be_compared_have_buffers_of_their_own(upstream, deep_gemm, monkeypatch, caplog):
    def fails(_):
        raise KeyError("attn_backends")

    monkeypatch.setattr(buffers, "steps_are_alike", fails)
    on = upstream.multi(upstream.fused(), 4)
    assert len({id(backend.decode_cuda_graph_metadata) for backend in on.attn_backends}) == len(on.attn_backends)
    assert "draft steps do not share buffers: KeyError: 'attn_backends'" in caplog.text


def test_a_multi_step_backend_without_steps_is_upstreams(upstream, monkeypatch):
    """As of a server with one draft step, up to 0.5.8 with none."""
    on = object.__new__(upstream.fused()[1])
    on.attn_backends, on.speculative_num_steps = [], int(not versions.of(upstream.version).spare_step)
    on.init_cuda_graph_state(4, 4)
    assert on._replays == {} and not on._share


REQUIRED = dataclasses.replace(SETTINGS, required=True)
PLACES = {  # of the table in docs/hooks.md, "When it stays off" -> what is said
    "library": "no native library for",
    "planner": "batch size 8 keeps upstream's replay: deep_gemm: no",
    "draft extend with FlashMLA": "a draft extend graph whose plan needs the number of rows keeps upstream's replay",
    "pooled keys": "an index with pooled keys keeps upstream's replays",
    "pooled keys, no graph": "an index with pooled keys keeps upstream's draft extend",
    "sharded cache": "a sharded cache keeps upstream's draft extend",
}


@pytest.mark.parametrize("place", PLACES)
def test_required_ends_the_process_where_upstreams_refresh_would_stay(upstream, deep_gemm, monkeypatch, place):
    release = upstream.release
    attribute = {"pooled keys": release.kpool, "pooled keys, no graph": release.kpool, "sharded cache": release.kv_shard_pool}
    extends = place == "draft extend with FlashMLA"
    if attribute.get(place, "") is None or (extends and "DRAFT_EXTEND" not in release.draft_extend):
        pytest.skip("this release has no such place")
    hooks._refuse.cache_clear()
    if place == "library":
        monkeypatch.setattr(hooks, "select", lambda device_type: kernels.Engine("none", reason="gone"))
    elif place == "planner":
        monkeypatch.setattr(planners.Planners, "schedule_form", lambda *_: (_ for _ in ()).throw(RuntimeError("deep_gemm: no")))
    with pytest.raises(SystemExit, match=PLACES[place]):
        on = upstream.graphs("DRAFT_EXTEND" if extends else "TARGET_VERIFY", 4, flashmla=extends, settings=REQUIRED)[1]
        setattr(on, attribute[place], 2)
        decisions = type(on)._hooks
        decisions.draft_extend(on) if place != "pooled keys" else decisions.capture(1, [on], 8)


def test_a_newer_sglang_is_refused_what_is_not_known(upstream):
    newest = releases.RELEASES[-1]
    if upstream.release is not newest:
        pytest.skip("for the newest release")
    assert start_check.unknown_names(newest, upstream.module) == []
    renamed = dataclasses.replace(newest, page_size="paper_size")
    assert start_check.unknown_names(renamed, upstream.module) == [f"{newest.backend}.paper_size is gone"]
    metadata = getattr(upstream.module, newest.metadata)
    more = dataclasses.make_dataclass(newest.metadata, [("new_plan", int, 0)], bases=(metadata,), frozen=True)
    module = SimpleNamespace(**{newest.metadata: more, newest.backend: upstream.classes[0]})
    assert start_check.unknown_names(newest, module) == [f"{newest.metadata}.new_plan is new"]
