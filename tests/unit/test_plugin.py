"""The entry point: inert without the gate, cheap to import, and one finding where it cannot be active."""

import subprocess
import sys

import pytest

from sglang_nsa_fused import plugin, releases
from sglang_nsa_fused.settings import GATE, REQUIRED


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_import_without_the_gate_is_cheap():
    code = """
import sys, time
start = time.perf_counter()
import sglang_nsa_fused.plugin
sglang_nsa_fused.plugin.activate()
print(time.perf_counter() - start, "torch" in sys.modules or "sglang" in sys.modules)
"""
    runs = [python(code).stdout.split() for _ in range(5)]
    assert all(imported == "False" for _, imported in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.05


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.setenv(GATE, "1")
    monkeypatch.delenv(REQUIRED, raising=False)


def unsupported(version):
    def find_release():
        raise plugin.Unsupported(f"sglang {version} is not supported; supported are {releases.supported_versions()}")

    return find_release


def test_unknown_release_warns_once_and_leaves_sglang_alone(gate, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "find_release", unsupported("9.9.9"))
    plugin.activate()
    assert [record.getMessage() for record in caplog.records] == [
        "sglang-nsa-fused: not active, sglang runs unchanged: sglang 9.9.9 is not supported; "
        "supported are 0.5.12, 0.5.12.post1"
    ]


def test_required_exits_instead(gate, monkeypatch):
    monkeypatch.setattr(plugin, "find_release", unsupported("9.9.9"))
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(SystemExit, match="sglang 9.9.9 is not supported.*SGLANG_NSA_FUSED_REQUIRED is set"):
        plugin.activate()


def test_unexpected_error_is_one_warning(gate, monkeypatch, caplog):
    def broken():
        raise OSError("disk gone")

    monkeypatch.setattr(plugin, "find_release", broken)
    plugin.activate()
    assert "not active, sglang runs unchanged: OSError: disk gone" in caplog.text


def test_gate_that_is_neither_true_nor_false_warns(monkeypatch, caplog):
    monkeypatch.setenv(GATE, "maybe")
    plugin.activate()
    assert f"{GATE}: expected one of" in caplog.text


@pytest.mark.parametrize("version", ["0.5.12", "0.5.12.post1"])
def test_supported(version):
    assert releases.find(version) is releases.NSA


@pytest.mark.parametrize("version", ["0.5.11", "0.5.13", "0.6", ""])
def test_not_supported(version):
    assert releases.find(version) is None


def test_missing_names_are_named():
    class NativeSparseAttnBackend:
        def init_cuda_graph_state(self, max_bs):
            pass

    class module:
        pass

    module.NativeSparseAttnBackend = NativeSparseAttnBackend
    missing = releases.missing_names(releases.NSA, module)
    assert "NativeSparseAttnBackend.init_cuda_graph_state(self, max_bs, max_num_tokens)" in missing
    assert "NativeSparseAttnMultiStepBackend.init_forward_metadata_replay_cuda_graph" in missing
    assert len(missing) == len(releases.NSA.signatures)
