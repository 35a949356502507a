"""Two ways of loading: sglang's hook registry where it exists, else the module's own names, once per process."""

import sys
import types

import pytest

from sglang_nsa_fused import backends, plugin, releases
from sglang_nsa_fused.settings import GATE


class Step:
    pass


class Multi:
    pass


@pytest.fixture
def module(monkeypatch):
    release = releases.find("0.5.9")
    module = types.ModuleType(release.module)
    setattr(module, release.backend, Step)
    setattr(module, release.multi_step, Multi)
    monkeypatch.setattr(plugin, "find_release", lambda: (release, "0.5.9"))
    monkeypatch.setattr(plugin, "import_backend", lambda release: module)
    monkeypatch.setenv(GATE, "1")
    module.release = release
    return module


def names(module):
    return getattr(module, module.release.backend), getattr(module, module.release.multi_step)


def test_the_external_package_replaces_the_classes(module, monkeypatch):
    monkeypatch.delitem(sys.modules, "sglang_nsa_fused.external", raising=False)
    import sglang_nsa_fused.external as external

    step, multi = names(module)
    assert step.__mro__[-2] is Step and issubclass(multi, Multi)
    assert step.__module__ == backends.__name__
    assert external.__path__ and not hasattr(external, "EntryClass")  # what sglang's model registry looks at


def test_without_a_hook_registry_the_loader_does_too(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    plugin.activate()
    assert issubclass(names(module)[0], Step) and names(module)[0] is not Step


def test_twice_is_once(module):
    plugin.activate(direct=True)
    first = names(module)
    plugin.activate(direct=True)
    plugin.activate()
    assert names(module) == first


def test_without_the_gate_nothing_is_replaced(module, monkeypatch):
    monkeypatch.delenv(GATE)
    plugin.activate(direct=True)
    assert names(module) == (Step, Multi)
