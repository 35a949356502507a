"""The benchmark's probe reads this release's classes."""

from sglang_nsa_fused.bench import probe


def test_kinds_of_forward_modes(upstream):
    modes = upstream.module.ForwardMode
    assert probe.kind_of(modes.DECODE) == "decode" and probe.kind_of(modes.TARGET_VERIFY) == "verify"
    extend = {mode.name for mode in modes if mode.name.startswith("DRAFT_EXTEND")}
    assert extend == {mode.name for mode in modes if probe.kind_of(mode) == "extend"} != set()
    assert probe.kind_of(modes.EXTEND) == "other"
