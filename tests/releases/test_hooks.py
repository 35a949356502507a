"""Each way in which sglang comes to load the plugin, each time in a process of its own."""

import ast
import importlib.util
import os
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest

from sglang_nsa_fused import __version__, plugin, releases
from sglang_nsa_fused.settings import ALLOWLIST, GATE, REQUIRED
from sglang_nsa_fused.tools.patch import TARGET, Installed

RELEASE, VERSION = plugin.find_release()
PLUGINS = Path(importlib.util.find_spec("sglang").origin).parent / "srt/plugins"  # found without an import
WAYS = {
    "loader": "from sglang.srt.plugins import load_plugins; load_plugins()",
    "patch": """
import os, textwrap
from sglang_nsa_fused.tools.patch import Installed
lines = textwrap.dedent(b"".join(Installed().patch().lines).decode())
exec(lines, {"os": os, "logger": logging.getLogger("scheduler")})
""",
    "external": "import sglang_nsa_fused.external",
}
LOADER = "loader" if PLUGINS.exists() else "patch"
LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from sglang_nsa_fused import __version__, plugin
from sglang_nsa_fused.tools import bare
release, version = plugin.find_release()
{before}
print("loading")
{load}
module = sys.modules.get(release.module)
print("backends imported:", "sglang_nsa_fused.backends" in sys.modules)
"""
CLASSES = """
classes = getattr(module, release.backend), getattr(module, release.multi_step)
print(*(cls.__name__ for cls in classes))
print(*(next(base.__name__ for base in cls.__mro__[1:] if base.__module__ == release.module) for cls in classes))
"""
IMPORT = "import torch; bare.import_upstream(release, 'cuda' if torch.cuda.is_available() else 'cpu')"


def loading(start, way):
    """load(*parts, before=IMPORT, **env) -> CompletedProcess of LOAD and then the parts."""

    def load(*parts: str, before: str = IMPORT, **env: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name not in (GATE, REQUIRED, ALLOWLIST)} | env
        return start(LOAD.format(before=before, load=WAYS[way]) + "".join(parts), env)

    return load


def warnings(result: subprocess.CompletedProcess) -> list[str]:
    """Since the load began: on a GPU sglang's imports may warn of their own."""
    return [line for line in result.stdout.partition("loading\n")[2].splitlines() if line.startswith("WARNING")]


@pytest.fixture(params=[LOADER] + ["external"] * (LOADER == "patch"))
def load(start, request):
    """Where sglang has a loader, a model package is for what never calls that, and two tests are enough."""
    return loading(start, request.param)


@pytest.fixture(params=[LOADER, "external"])
def load_in_each_way(start, request):
    return loading(start, request.param)


def test_replaces_both_classes(load_in_each_way):
    result = load_in_each_way(CLASSES, **{GATE: "1"})
    assert f"Fused{RELEASE.backend} Fused{RELEASE.multi_step}" in result.stdout, result.stderr
    assert f"\n{RELEASE.backend} {RELEASE.multi_step}" in result.stdout


def test_upstream_builds_our_step_backends(load):
    """The multi-step constructor is upstream's, and finds our step backend under upstream's name."""
    result = load(
        """
getattr(module, release.backend).__init__ = lambda self, runner, **kwargs: None
multi = getattr(module, release.multi_step)(None, 1, 4)
print({type(backend).__name__ for backend in multi.attn_backends})
""",
        **{GATE: "1"},
    )
    assert str({f"Fused{RELEASE.backend}"}) in result.stdout, result.stderr


def test_without_the_gate_nothing_is_replaced_or_imported(load):
    for env in ({}, {GATE: "0"}):
        result = load(CLASSES, **env)
        assert f"\n{RELEASE.backend} {RELEASE.multi_step}\n" in result.stdout, result.stderr
        assert "backends imported: False" in result.stdout


def test_an_allowlist_without_it_keeps_it_out(start):
    result = loading(start, LOADER)(CLASSES, **{GATE: "1", ALLOWLIST: "other"})
    assert "backends imported: False" in result.stdout, result.stderr
    assert LOADER == "patch" or "Skipping plugin nsa_fused (not in SGLANG_PLUGINS)" in result.stdout


OTHER = """
import sys
import sglang.srt.plugins as plugins
found = plugins.load_plugins_by_group

def other():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    {hooks}

def with_other(*args, **kwargs):
    ours, theirs = found(*args, **kwargs), {{"other": (other, None)}}
    return {order}

plugins.load_plugins_by_group = with_other
"""
AFTER, BEFORE = "{**ours, **theirs}", "{**theirs, **ours}"
CLASS = """
    for name in {names}:
        cls = type("Other", (getattr(sys.modules[release.module], name),), {{"__module__": "them"}})
        HookRegistry.register(f"{{release.module}}.{{name}}", cls, HookType.REPLACE)
"""
METHOD = """
    def theirs(*args):
        print("theirs")
        {calls}
    HookRegistry.register(f"{{release.module}}.{{release.{cls}}}.init_cuda_graph_state", theirs, HookType.{kind})
"""
SERVE = """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
table = torch.zeros(9, 200, dtype=torch.int32, device=device)
for steps in (3, 5):
    with bare.gpu(release, device):
        classes = getattr(module, release.backend), getattr(module, release.multi_step)
        multi = bare.multi_step_backend(classes, release, device, table, steps, [1, 2])
"""


@pytest.fixture
def load_with_another(start):
    """load_with_another(hooks, order, *parts, **env) -> CompletedProcess"""
    if LOADER == "patch":
        pytest.skip("this release has no hook registry")
    load = loading(start, LOADER)
    return lambda hooks, order, *parts, **env: load(
        *parts, before=f"{IMPORT}\n{OTHER.format(hooks=hooks, order=order)}", **{GATE: "1"}, **env
    )


@pytest.mark.parametrize("names", [[RELEASE.backend], [RELEASE.multi_step], [RELEASE.backend, RELEASE.multi_step]])
def test_another_plugin_that_replaces_a_class_after_ours(load_with_another, names):
    """sglang takes the last: ours goes whole, and says so."""
    hooks = CLASS.format(names=names)
    result = load_with_another(hooks, AFTER, CLASSES)
    kept = ["Other" if name in names else name for name in (RELEASE.backend, RELEASE.multi_step)]
    assert f"\n{' '.join(kept)}\n" in result.stdout, result.stdout + result.stderr
    others = ", ".join(f"{name} with them.Other" for name in (RELEASE.backend, RELEASE.multi_step) if name in names)
    assert f"WARNING sglang-nsa-fused: not active: another plugin replaces {others}, and sglang takes the last" in result.stdout
    result = load_with_another(hooks, AFTER, **{REQUIRED: "1"})
    assert result.returncode == 1 and "sglang-nsa-fused: not active: another plugin replaces" in result.stderr


def test_another_plugin_that_replaces_a_class_before_ours(load_with_another):
    """sglang takes ours, and says so."""
    result = load_with_another(CLASS.format(names=[RELEASE.backend]), BEFORE, CLASSES)
    assert f"\nFused{RELEASE.backend} Fused{RELEASE.multi_step}\n" in result.stdout, result.stdout + result.stderr
    assert f"WARNING Multiple REPLACE hooks on '{RELEASE.module}.{RELEASE.backend}'" in result.stdout


@pytest.mark.parametrize("order", [AFTER, BEFORE])
@pytest.mark.parametrize("cls", ["backend", "multi_step"])
def test_another_plugin_that_wraps_a_method_of_ours(load_with_another, cls, order):
    result = load_with_another(METHOD.format(cls=cls, kind="AROUND", calls="args[0](*args[1:])"), order, SERVE)
    assert "theirs" in result.stdout and f"INFO sglang-nsa-fused {__version__} active" in result.stdout, (
        result.stdout + result.stderr
    )
    assert "WARNING sglang-nsa-fused" not in result.stdout


@pytest.mark.parametrize("order", [AFTER, BEFORE])
@pytest.mark.parametrize("cls", ["backend", "multi_step"])
def test_another_plugin_that_replaces_a_method_of_ours(load_with_another, cls, order):
    """Without it the rest of ours would not do: theirs is sglang's method then."""
    hooks = METHOD.format(cls=cls, kind="REPLACE", calls="")
    call = f"module.{getattr(RELEASE, cls)}.init_cuda_graph_state(None, 1, 4)"
    result = load_with_another(hooks, order, call, CLASSES)
    assert f"\n{RELEASE.backend} {RELEASE.multi_step}\n" in result.stdout and "theirs" in result.stdout, (
        result.stdout + result.stderr
    )
    finding = f"not active: another plugin replaces {getattr(RELEASE, cls)}.init_cuda_graph_state, and sglang takes the last"
    assert f"WARNING sglang-nsa-fused: {finding}; leave one of them out of SGLANG_PLUGINS" in result.stdout
    result = load_with_another(hooks, order, **{REQUIRED: "1"})
    assert result.returncode == 1 and f"sglang-nsa-fused: {finding}" in result.stderr


def test_two_entry_points_are_one(load_with_another):
    result = load_with_another("plugin.activate()", AFTER, CLASSES, SERVE)
    assert f"\nFused{RELEASE.backend} Fused{RELEASE.multi_step}\n{RELEASE.backend} {RELEASE.multi_step}\n" in result.stdout
    assert result.stdout.count("active") == 1 and warnings(result) == [], result.stdout + result.stderr


def test_two_installations_in_the_path_are_one(start, tmp_path):
    files = distribution("sglang-nsa-fused")
    shutil.copytree(
        files.locate_file("").joinpath(f"sglang_nsa_fused-{files.version}.dist-info"),
        tmp_path / f"sglang_nsa_fused-{files.version}.dist-info",
    )
    result = loading(start, LOADER)(
        CLASSES, SERVE, before=f"{IMPORT}\nimport sys; sys.path.insert(0, {str(tmp_path)!r})", **{GATE: "1"}
    )
    assert f"\nFused{RELEASE.backend} Fused{RELEASE.multi_step}\n{RELEASE.backend} {RELEASE.multi_step}\n" in result.stdout
    assert result.stdout.count("active") == 1 and warnings(result) == [], result.stdout + result.stderr


def test_a_changed_sglang_is_left_alone(load):
    rename = IMPORT + "\nimport sys; del getattr(sys.modules[release.module], release.backend)._compute_flashmla_metadata"
    result = load(CLASSES, before=rename, **{GATE: "1"})
    assert "WARNING sglang-nsa-fused: not active, sglang runs unchanged: sglang was changed" in result.stdout, result.stderr
    assert result.stdout.count("WARNING sglang-nsa-fused") == 1
    assert f"lacks {RELEASE.backend}._compute_flashmla_metadata; reinstall sglang" in result.stdout
    assert f"\n{RELEASE.backend} {RELEASE.multi_step}\n" in result.stdout

    result = load(before=rename, **{GATE: "1", REQUIRED: "1"})
    assert result.returncode == 1 and "sglang-nsa-fused: not active: sglang was changed" in result.stderr


def test_the_loader_fits_the_real_scheduler(tmp_path):
    sglang = Installed()
    if sglang.has_loader:
        pytest.skip("it has a loader")
    (tmp_path / TARGET).parent.mkdir(parents=True)
    original = sglang.file.read_bytes()
    sglang.file = shutil.copy(sglang.file, tmp_path / TARGET)
    sglang.change(apply=True)
    assert sglang.state() == "patched"
    patched = sglang.file.read_bytes()
    compile(patched, TARGET, "exec")
    (function,) = [node for node in ast.parse(patched).body if getattr(node, "name", "") == "run_scheduler_process"]
    assert ast.unparse(function.body[0]) == "from importlib.metadata import entry_points"
    sglang.change(apply=False)
    assert sglang.file.read_bytes() == original


def test_one_line_says_that_it_is_active(load_in_each_way):
    result = load_in_each_way(SERVE, **{GATE: "1"})
    lines = [line for line in result.stdout.splitlines() if "active" in line]
    assert len(lines) == 1, result.stdout + result.stderr
    assert lines[0].startswith(f"INFO sglang-nsa-fused {__version__} active: sglang {VERSION}")
    assert lines[0].endswith(f"replaces {RELEASE.backend} and {RELEASE.multi_step}")


def test_nothing_is_written_where_it_is_installed(load):
    """Site-packages may be read-only."""
    watch = """
import os, sys
written = []
def note(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) or event in ("os.mkdir", "os.rename"):
        if "site-packages" in str(args[0]) and "__pycache__" not in str(args[0]):
            written.append(args)
            raise PermissionError(30, "Read-only file system")
sys.addaudithook(note)
"""
    result = load(SERVE, "print('written:', written)", before=IMPORT + watch, **{GATE: "1"})
    assert "written: []" in result.stdout and warnings(result) == [], result.stdout + result.stderr


NEWER = """
import dataclasses, importlib.metadata, inspect, linecache, sys, textwrap
installed, upstream = importlib.metadata.version, sys.modules[release.module]
importlib.metadata.version = lambda name: "0.5.24" if name == "sglang" else installed(name)
"""
ANOTHER_FIELD = """
metadata = getattr(upstream, release.metadata)
more = dataclasses.make_dataclass(release.metadata, [("new_plan", int, 0)], bases=(metadata,), frozen=True)
setattr(upstream, release.metadata, more)
"""
ANOTHER_CONDITION = """
cls, term = getattr(upstream, release.backend), f"not self.{release.draft_tokens}"
text = textwrap.dedent(inspect.getsource(cls.init_cuda_graph_state))
text = text.replace(term, f"({term} or self.{release.draft_tokens} == 1)")
linecache.cache["<newer>"] = len(text), None, text.splitlines(True), "<newer>"
exec(compile(text, "<newer>", "exec"), names := dict(vars(upstream)))
cls.init_cuda_graph_state = names["init_cuda_graph_state"]
"""
WIDE = "print('wide:', all(backend.decode_cuda_graph_metadata['page_table'] is not None for backend in multi.attn_backends))"


@pytest.fixture
def newest():
    if RELEASE is not releases.RELEASES[-1]:
        pytest.skip("for the newest release")


def test_an_sglang_one_release_newer_is_tried(newest, load):
    result = load(CLASSES, SERVE, WIDE, before=f"{IMPORT}\n{NEWER}", **{GATE: "1"})
    assert f"\nFused{RELEASE.backend} Fused{RELEASE.multi_step}\n" in result.stdout, result.stdout + result.stderr
    assert "active: sglang 0.5.24" in result.stdout and "wide: False" in result.stdout
    assert warnings(result) == [
        f"WARNING sglang-nsa-fused: sglang 0.5.24 is untested; what the plugin relies on is as in {VERSION}"
    ]


def test_a_newer_sglang_with_more_to_refresh_is_left_alone(newest, load):
    before = f"{IMPORT}\n{NEWER}\n{ANOTHER_FIELD}"
    result = load(CLASSES, before=before, **{GATE: "1"})
    assert f"\n{RELEASE.backend} {RELEASE.multi_step}\n" in result.stdout, result.stdout + result.stderr
    finding = f"in {RELEASE.module} {RELEASE.metadata}.new_plan is new"
    assert (
        "WARNING sglang-nsa-fused: not active, sglang runs unchanged: sglang 0.5.24" in result.stdout and finding in result.stdout
    )
    result = load(before=before, **{GATE: "1", REQUIRED: "1"})
    assert result.returncode == 1 and finding in result.stderr


def test_a_newer_sglang_with_another_condition_keeps_its_wide_tables(newest, load):
    result = load(CLASSES, SERVE, WIDE, before=f"{IMPORT}\n{NEWER}\n{ANOTHER_CONDITION}", **{GATE: "1"})
    assert "active: sglang 0.5.24" in result.stdout and "wide: True" in result.stdout, result.stdout + result.stderr
    assert result.stdout.count("WARNING sglang-nsa-fused: the wide page tables stay: ") == 1
