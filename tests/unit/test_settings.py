import pytest

from sglang_nsa_fused.settings import BEFORE_GRAPH, GATE, GATE_DSA, KEEP_CHUNKS, KEEP_WIDE_TABLE, REQUIRED, VERIFY, Settings


@pytest.mark.parametrize("name", [GATE, GATE_DSA])
@pytest.mark.parametrize(
    "value, enabled", [("1", True), ("true", True), ("YES", True), ("0", False), ("False", False), ("", False)]
)
def test_gate(name, value, enabled):
    assert Settings.from_env({name: value}).enabled is enabled


def test_unset_is_off():
    assert Settings.from_env({}) == Settings(enabled=False, required=False, allowlist=None)


def test_required_and_allowlist():
    assert Settings.from_env({REQUIRED: "1", "SGLANG_PLUGINS": "a, nsa_fused,"}) == Settings(False, True, ("a", "nsa_fused"))


@pytest.mark.parametrize(
    "name, field",
    [
        (VERIFY, "verify"),
        (KEEP_WIDE_TABLE, "keep_wide_table"),
        (KEEP_CHUNKS, "keep_chunks"),
        (BEFORE_GRAPH, "before_graph"),
    ],
)
def test_each_variable_has_its_setting(name, field):
    assert Settings.from_env({name: "1"}) == Settings(False, False, None, **{field: True})


@pytest.mark.parametrize("name", [GATE, GATE_DSA, REQUIRED, VERIFY, KEEP_WIDE_TABLE, KEEP_CHUNKS, BEFORE_GRAPH])
def test_neither_true_nor_false(name):
    with pytest.raises(ValueError, match=f"{name}: expected one of true, .*got 'maybe'"):
        Settings.from_env({name: "maybe"})
