"""The benchmark's probe reads this release's classes."""

from functools import partialmethod

import pytest
import torch
from upstream import assert_equal_fields, assert_same_fields, live_bytes, page_tables, steps

from sglang_nsa_fused.draft_extend import DraftExtend
from sglang_nsa_fused.replay import Replay
from sglang_nsa_fused.tools import bare
from sglang_nsa_fused.tools.bench import probe


def test_kinds_of_forward_modes(upstream):
    modes = upstream.module.ForwardMode
    assert probe.kind_of(modes.DECODE) == "decode" and probe.kind_of(modes.TARGET_VERIFY) == "verify"
    extend = {mode.name for mode in modes if mode.name.startswith("DRAFT_EXTEND")}
    assert extend == {mode.name for mode in modes if probe.kind_of(mode) == "extend"} != set()
    assert probe.kind_of(modes.EXTEND) == "other"


def test_toggled_backends_refresh_as_upstream_does(upstream, deep_gemm, monkeypatch):
    class Ours(Exception):
        pass

    def ours(*_):
        raise Ours

    off, on = upstream.multi(upstream.classes, 3), upstream.multi(upstream.fused(), 3)
    step_off, step_on = upstream.graphs("TARGET_VERIFY", 4)
    extend = "DRAFT_EXTEND_V2" if hasattr(upstream.module.ForwardMode, "DRAFT_EXTEND_V2") else "DRAFT_EXTEND"

    def extends(backend):
        backend.init_forward_metadata(bare.draft_extend_batch(backend, upstream.module, extend, [3, 1], [70, 9]))

    def verifies(backend):
        bare.replay_graph(backend, bare.graph_batch(backend, upstream.module, "TARGET_VERIFY", [3, 1], [70, 9], 2))

    extends(step_on)
    for cls in (Replay, DraftExtend):
        for name in {"generate", "copy", "__call__"} & vars(cls).keys():
            monkeypatch.setattr(cls, name, ours)
    with probe.upstreams(on), probe.upstreams(step_on):
        for bs, live in steps(upstream, off, on, count=5):
            assert_same_fields(off, on, bs, live)
        for backend in (step_off, step_on):
            verifies(backend)
        live = torch.tensor([n - 3 + k for n in (74, 13) for k in range(4)], device=upstream.device)
        assert_equal_fields(*bare.both_fields(step_off.forward_metadata, step_on.forward_metadata, live))
        extends(step_on)
    for call in (lambda: next(steps(upstream, on, on, count=1)), lambda: verifies(step_on), lambda: extends(step_on)):
        with pytest.raises(Ours):
            call()


@pytest.mark.filterwarnings("ignore")  # of objects of torch that are looked at
@pytest.mark.parametrize("side", ["off", "on"])
def test_bytes_of_tables_are_counted_once(upstream, deep_gemm, side, monkeypatch):
    release = upstream.release
    if upstream.device == "cpu":
        monkeypatch.setattr(torch.cuda, "memory_allocated", live_bytes)
    monkeypatch.setattr(probe, "_start_writer", lambda: None)
    monkeypatch.setattr(probe, "_table_bytes", 0)
    capture = "init_forward_metadata_out_graph" if release.out_graph else "init_forward_metadata_capture_cuda_graph"
    around = (probe.out_graph, probe.draft_out_graph) if release.out_graph else (probe.tables, probe.tables)
    classes = upstream.classes if side == "off" else upstream.fused()
    for cls, hook in zip(classes, around):
        for name, call in (("init_cuda_graph_state", probe.tables), (capture, hook)):
            monkeypatch.setattr(cls, name, partialmethod(of, call, getattr(cls, name)))
    probe._samples.clear()
    multi = upstream.multi(classes, 4)
    counted = probe._samples[-1]["table_bytes"]
    probe._samples.clear()
    assert 0 <= counted - sum(page_tables(multi).values()) < 100_000


def of(backend, hook, original, *args, **kwargs):
    """As the hook registry calls it."""
    return hook(original, backend, *args, **kwargs)
