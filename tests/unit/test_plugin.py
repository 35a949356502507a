"""The entry point: inert without the gate, cheap to import, and one finding where it cannot be active."""

import os
import subprocess
import sys

import pytest

from sglang_nsa_fused import plugin, releases, start_check
from sglang_nsa_fused.settings import GATE, REQUIRED
from sglang_nsa_fused.tools import doctor


def test_import_without_the_gate_is_cheap(tmp_path):
    code = """
import sys
before = set(sys.modules)
import sglang_nsa_fused.plugin
sglang_nsa_fused.plugin.activate()
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "sglang_nsa_fused" in imported
    assert imported - sys.stdlib_module_names == {"sglang_nsa_fused"}


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
        "sglang-nsa-fused: not active, sglang runs unchanged: sglang 9.9.9 is not supported; supported are 0.5.7 to 0.5.23"
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


def test_a_bad_gate_exits_where_the_plugin_is_required(monkeypatch):
    monkeypatch.setenv(GATE, "maybe")
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(SystemExit, match=f"{GATE}: expected one of"):
        plugin.activate()


@pytest.mark.parametrize("version", ["0.5.7", "0.5.8.post1", "0.5.12", "0.5.12.post1", "0.5.13", "0.5.18", "0.5.23"])
def test_supported(version):
    assert version in releases.find(version).versions


@pytest.mark.parametrize("version", ["0.5.6.post2", "0.5.12.dev1", "0.5.24", "0.6", ""])
def test_not_supported(version):
    assert releases.find(version) is None


def test_each_version_is_in_one_release():
    versions = [version for release in releases.RELEASES for version in release.versions]
    assert len(versions) == len(set(versions))


@pytest.fixture
def tomorrows(monkeypatch):
    """An sglang newer than all known, with this backend module in its place."""

    def install(version, module):
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
        monkeypatch.setitem(sys.modules, releases.RELEASES[-1].module, module)
        plugin._say_untested.cache_clear()

    return install


@pytest.mark.parametrize("version", ["0.5.23.post1", "0.5.24", "0.6.0rc1", "1.0"])
def test_a_newer_release_with_all_names_is_tried_and_said_once(tomorrows, monkeypatch, caplog, version):
    module = object()
    tomorrows(version, module)
    monkeypatch.setattr(start_check, "missing_names", lambda release, module: [])
    monkeypatch.setattr(start_check, "unknown_names", lambda release, module: [])
    release, found = plugin.find_release()
    assert (release, found) == (releases.RELEASES[-1], version)
    assert plugin.import_backend(release) is plugin.import_backend(release) is module
    assert [r.getMessage() for r in caplog.records] == [
        f"sglang-nsa-fused: sglang {version} is untested; what the plugin relies on is as in 0.5.23"
    ]
    assert "newer than 0.5.23" in doctor._sglang()


def test_a_newer_release_that_lacks_a_name_is_left_alone(tomorrows):
    tomorrows("0.7", object())
    release, _ = plugin.find_release()
    with pytest.raises(plugin.Unsupported, match="sglang 0.7 is not supported; supported are 0.5.7 to 0.5.23; .* lacks"):
        plugin.import_backend(release)


def test_a_newer_release_that_has_more_to_refresh_is_left_alone(tomorrows, monkeypatch):
    tomorrows("0.5.24", object())
    monkeypatch.setattr(start_check, "missing_names", lambda release, module: [])
    monkeypatch.setattr(start_check, "unknown_names", lambda release, module: ["DSAMetadata.new_plan is new"])
    with pytest.raises(plugin.Unsupported, match="0.5.24 is not supported; .*; in .*dsa_backend DSAMetadata.new_plan is new"):
        plugin.import_backend(plugin.find_release()[0])


@pytest.mark.parametrize("version, release", [("0.5.12.post1+cu129", releases.NSA_0_5_12), ("0.5.23+local", releases.DSA_0_5_23)])
def test_a_local_suffix_does_not_matter(monkeypatch, version, release):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert plugin.find_release() == (release, version)
    assert doctor._sglang() == f"{version} is supported"
    monkeypatch.setattr(doctor.bare, "import_upstream", lambda release, device: None)
    monkeypatch.setattr(plugin, "import_backend", lambda release: None)
    assert doctor._upstream() == f"{len(release.signatures)} names of {release.module} are as expected"


@pytest.mark.parametrize("version", ["0.5.6.post2", "0.4.10", "0.5.18.post9", "0.5.23.dev5+gabc", "0.5.23rc1"])
def test_an_unknown_release_that_is_not_newer_is_not_tried(monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(plugin.Unsupported, match="is not supported"):
        plugin.find_release()


def test_missing_names_are_named():
    class NativeSparseAttnBackend:
        def init_cuda_graph_state(self, max_bs):
            pass

    class module:
        pass

    module.NativeSparseAttnBackend = NativeSparseAttnBackend
    release = releases.NSA_0_5_12
    missing = start_check.missing_names(release, module)
    assert "NativeSparseAttnBackend.init_cuda_graph_state(self, max_bs, max_num_tokens)" in missing
    assert "NativeSparseAttnMultiStepBackend.init_forward_metadata_replay_cuda_graph" in missing
    assert "NSAMetadata.real_page_table" in missing
    assert len(missing) == len(release.signatures) + len(release.captured)
