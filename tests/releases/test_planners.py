"""Our schedule and FlashMLA's constants stand in for the installed planners only while they give the same."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from upstream import CAPTURE_BS, after, assert_equal_fields, assert_same_fields, batches, steps

from sglang_nsa_fused import planners, reference
from sglang_nsa_fused.tools import bare

pytestmark = pytest.mark.compares


@pytest.fixture
def planner(upstream, deep_gemm, monkeypatch):
    """Lets a test change what the installed deep_gemm gives: change(schedule, lengths) -> schedule."""
    theirs = deep_gemm.get_paged_mqa_logits_metadata

    def forget():
        if upstream.release.schedule_function is not None:  # it remembers DeepGEMM's
            getattr(upstream.module, upstream.release.schedule_function).cache_clear()

    def install(change):
        def changed(context_lens, block, num_sms):
            return change(theirs(context_lens, block, num_sms), context_lens.view(-1))

        monkeypatch.setattr(deep_gemm, "get_paged_mqa_logits_metadata", changed)
        forget()

    yield install
    forget()


def replay_both(upstream, off, on, mode, draft_tokens=4):
    for slots, lengths, bs in batches(10):
        for backend in (off, on):
            bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, mode, slots, lengths, bs))
        live = torch.ones(bs * (1 if mode == "DECODE" else draft_tokens), dtype=torch.int64, device=upstream.device)
        assert_equal_fields(*bare.both_fields(off.forward_metadata, on.forward_metadata, live))


@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY"])
def test_a_schedule_of_unknown_form_is_deep_gemms(upstream, planner, mode, caplog):
    planner(lambda schedule, lengths: schedule.flip(0))
    off, on = upstream.graphs(mode, 4)
    assert all(after(on._replays[bs]) == ["_refresh_schedule"] for bs in CAPTURE_BS)
    assert caplog.text.count("deep_gemm is called for it") == 1
    replay_both(upstream, off, on, mode)


def test_one_differing_vector_is_enough(upstream, planner):
    planner(lambda schedule, lengths: schedule + int((lengths == 2048).all()))
    off, on = upstream.graphs("DECODE", 4)
    assert all(after(on._replays[bs]) == ["_refresh_schedule"] for bs in CAPTURE_BS)


@pytest.mark.parametrize("form", [(128, False), (512, False), (256, True)])
def test_other_schedules_are_found(upstream, planner, form):
    planner(lambda schedule, lengths: reference.paged_mqa_schedule(lengths, form[0], len(schedule) - 1, form[1]))
    off, on = upstream.graphs("TARGET_VERIFY", 4)
    assert not any(after(on._replays[bs]) for bs in CAPTURE_BS)
    replay_both(upstream, off, on, "TARGET_VERIFY")


def depends_on_lengths(upstream):
    cls = getattr(upstream.module, f"{upstream.release.names.upper()}FlashMLAMetadata")

    def compute(cache_seqlens, seq_len_q):
        splits = torch.nn.functional.pad(torch.cumsum(cache_seqlens // 64 + 1, 0, dtype=torch.int32), (1, 0))
        tiles = torch.full((132, 8), int(cache_seqlens.sum()), dtype=torch.int32, device=cache_seqlens.device)
        return cls(flashmla_metadata=tiles, num_splits=splits)

    return compute


@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY"])
def test_flashmla_metadata_that_depends_on_lengths_is_flash_mlas(upstream, deep_gemm, monkeypatch, caplog, mode):
    made = bare.step_backend

    def step_backend(*args, **kwargs):
        backend = made(*args, **kwargs)
        backend._compute_flashmla_metadata = depends_on_lengths(upstream)
        return backend

    monkeypatch.setattr(bare, "step_backend", step_backend)
    off, on = upstream.graphs(mode, 4, flashmla=True)
    assert all(after(on._replays[bs]) == ["_refresh_flashmla"] for bs in CAPTURE_BS)
    assert caplog.text.count("flash_mla is called for it") == 1
    replay_both(upstream, off, on, mode)


def test_a_draft_extend_graph_that_needs_a_planner_stays_upstreams(upstream, planner):
    if "DRAFT_EXTEND" not in upstream.release.draft_extend:
        pytest.skip(f"sglang {upstream.version} captures no graph whose number of rows varies")
    planner(lambda schedule, lengths: schedule.flip(0))
    off, on = upstream.graphs("DRAFT_EXTEND", 4)
    assert set(on._replays.values()) == {None}


def test_steps_get_deep_gemms_schedule_too(upstream, planner):
    planner(lambda schedule, lengths: schedule.flip(0))
    off, on = upstream.multi(upstream.classes, 3), upstream.multi(upstream.fused(), 3)
    for bs, live in steps(upstream, off, on, count=5):
        assert_same_fields(off, on, bs, live)


def test_enough_vectors_are_compared():
    vectors = planners.length_vectors(7, "cpu")
    assert len(vectors) >= 64
    values = {int(n) for vector in vectors for n in vector}
    assert {0, 1, 63, 65, 127, 129, 255, 257, 1 << 18} <= values
    assert sum(len(vector.unique()) > 3 for vector in vectors) > 20
    assert all(vector.any() for rows in (1, 7, 32) for vector in planners.length_vectors(rows, "cpu"))


def test_what_is_recorded_on_a_gpu(upstream, monkeypatch):
    """Over the stand-ins, so that the script works when there is a GPU."""
    if upstream.device == "cuda":
        pytest.skip("the script itself compiles kernels for other numbers of SMs")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "golden"), *sys.path])
    record = importlib.import_module("record")
    arrays, failed = record.everything(upstream.release, upstream.module, upstream.device)
    assert not failed
    kinds = ["flashmla", "schedule"] + ["topk"] * (upstream.release.build_topk_v2_plan is not None)
    assert sorted({name.partition("/")[0] for name in arrays}) == kinds
    for name in (name for name in arrays if name.endswith("plans")):
        lengths, plans = arrays[name.replace("plans", "lengths")], arrays[name]
        assert len(lengths) == len(plans) >= 8 and plans.any()
