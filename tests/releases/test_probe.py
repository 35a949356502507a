"""The benchmark's probe reads this release's classes."""

import pytest
import torch
from upstream import assert_equal_fields, assert_same_fields, steps

from sglang_nsa_fused import bare
from sglang_nsa_fused.bench import probe
from sglang_nsa_fused.draft_extend import DraftExtend
from sglang_nsa_fused.replay import Replay


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
