"""The loader for releases that have none: into scheduler.py and out again, or not touched at all."""

import importlib.util
import os
import stat
import textwrap
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sglang_nsa_fused.tools import patch
from sglang_nsa_fused.tools.cli import app

PATCHES = sorted((Path(__file__).parents[2] / "patches/sglang").glob("*.patch"))
RELEASES = [path.name.removesuffix("-plugin-loader.patch") for path in PATCHES]
SOURCE = (
    b"import logging\nimport os\n\nlogger = logging.getLogger()\n\n\ndef run_scheduler_process(\n    pipe,\n):\n    return pipe\n"
)


def loader_lines() -> list[bytes]:
    return patch.Patch.parse(PATCHES[0].read_bytes()).lines


@pytest.fixture
def sglang(tmp_path, monkeypatch):
    """An installation of a release with a patch, whose scheduler.py is SOURCE."""
    file = tmp_path / "sglang" / patch.TARGET
    file.parent.mkdir(parents=True)
    file.write_bytes(SOURCE)
    file.chmod(0o640)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "sglang")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.9")
    lines = loader_lines()
    whole = patch.Patch("", "", 9, lines)
    made = patch.Patch(patch.sha256(SOURCE), patch.sha256(whole.apply(SOURCE)), 9, lines)
    monkeypatch.setattr(patch.Installed, "patch", lambda self: made)
    return file


def run(*words):
    return CliRunner().invoke(app, ["patch", *words])


def test_apply_status_revert(sglang):
    assert ": unpatched" in run("status").output
    assert run("apply").exit_code == 0 and sglang.read_bytes() != SOURCE
    assert ": patched" in run("status").output
    assert stat.S_IMODE(sglang.stat().st_mode) == 0o640
    assert "nothing to do" in run("apply").output
    assert run("revert").exit_code == 0 and sglang.read_bytes() == SOURCE
    assert "nothing to do" in run("revert").output
    assert os.listdir(sglang.parent) == ["scheduler.py"]


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_a_modified_file_is_refused_and_untouched(sglang, command):
    modified = SOURCE + b"# mine\n"
    sglang.write_bytes(modified)
    result = run(command)
    assert result.exit_code == 1 and "neither sglang 0.5.9's nor our patched one" in result.output
    assert sglang.read_bytes() == modified


def test_a_crash_leaves_the_file_and_nothing_else(sglang, monkeypatch):
    def crash(*_):
        raise OSError("power gone")

    monkeypatch.setattr(patch.os, "replace", crash)
    with pytest.raises(OSError, match="power gone"):
        patch.Installed().change(apply=True)
    assert sglang.read_bytes() == SOURCE and os.listdir(sglang.parent) == ["scheduler.py"]


def test_a_patch_that_would_make_another_file_changes_nothing(sglang, monkeypatch):
    made = patch.Installed().patch()
    monkeypatch.setattr(patch.Installed, "patch", lambda self: made._replace(after=8))
    with pytest.raises(patch.Refused, match="would not become what it should"):
        patch.Installed().change(apply=True)
    assert sglang.read_bytes() == SOURCE


def test_a_folder_that_cannot_be_written_is_refused(sglang, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(patch.tempfile, "mkstemp", denied)
    result = run("apply")
    assert result.exit_code == 1 and "cannot be written: Permission denied" in result.output
    assert sglang.read_bytes() == SOURCE


def test_a_release_with_a_loader_needs_nothing(sglang):
    loader = sglang.parents[2] / patch.LOADER
    loader.parent.mkdir(parents=True)
    loader.touch()
    result = run("apply")
    assert result.exit_code == 0 and "loads plugins by itself" in result.output
    assert sglang.read_bytes() == SOURCE


def test_no_sglang_and_no_patch(sglang, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in run("status").output
    spec = SimpleNamespace(submodule_search_locations=[str(sglang.parents[2])])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    result = run("apply")
    assert result.exit_code == 1 and "sglang 0.4.0 has no plugin loader, and there is no patch" in result.output


@pytest.mark.parametrize("allowed, loaded", [("", ["one", "broken", "two"]), ("two, one", ["one", "two"]), ("none", [])])
def test_what_the_patched_function_does(sglang, monkeypatch, caplog, allowed, loaded):
    run("apply")
    seen = []

    def entry(name):
        def activate():
            seen.append(name)
            if name == "broken":
                raise RuntimeError("no GPU")

        return SimpleNamespace(name=name, load=lambda: activate)

    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry(name) for name in ("one", "broken", "two")])
    monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    namespace = {}
    exec(sglang.read_text(), namespace)
    assert namespace["run_scheduler_process"]("pipe") == "pipe"
    assert seen == loaded
    assert ("Failed to load plugin broken" in caplog.text) == ("broken" in loaded)


def test_a_plugin_that_is_required_ends_the_process(sglang, monkeypatch):
    run("apply")

    def required():
        raise SystemExit("not active")

    entries = [SimpleNamespace(name="nsa_fused", load=lambda: required)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)
    namespace = {}
    exec(sglang.read_text(), namespace)
    with pytest.raises(SystemExit, match="not active"):
        namespace["run_scheduler_process"]("pipe")


def test_every_release_without_a_loader_has_a_patch():
    assert RELEASES == ["0.5.10", "0.5.10.post1", "0.5.7", "0.5.8", "0.5.8.post1", "0.5.9"]


@pytest.mark.parametrize("path", PATCHES, ids=RELEASES)
def test_patches_only_add(path):
    text = path.read_text()
    body = text[text.index("@@") :].splitlines()[1:]
    assert body and all(line.startswith("+") for line in body)
    assert patch.Patch.parse(path.read_bytes()).lines == loader_lines()
    compile("def f():\n" + textwrap.indent(b"".join(loader_lines()).decode(), ""), "loader", "exec")
