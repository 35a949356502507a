"""sglang's own loader with our installed entry point, each time in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from forked import Parent

from sglang_nsa_fused.settings import ALLOWLIST, GATE, REQUIRED

LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from sglang_nsa_fused import bare, releases
release = releases.NSA
{before}
from sglang.srt.plugins import load_plugins
load_plugins()
module = sys.modules.get(release.module)
print("backends imported:", "sglang_nsa_fused.backends" in sys.modules)
"""
CLASSES = """
print(module.NativeSparseAttnBackend.__name__, module.NativeSparseAttnMultiStepBackend.__name__)
upstream = module.NativeSparseAttnBackend.__mro__[1]
print(upstream.__name__, module.NativeSparseAttnMultiStepBackend.__mro__[1].__name__)
"""
IMPORT = "import torch; bare.import_upstream(release, 'cuda' if torch.cuda.is_available() else 'cpu')"


@pytest.fixture(scope="module")
def load():
    """load(*parts, before=IMPORT, **env) -> CompletedProcess of LOAD and then the parts."""
    imports = f"from sglang_nsa_fused import bare, releases; release = releases.NSA; {IMPORT}"
    parent = None if torch.cuda.is_available() else Parent(imports)

    def run(*parts: str, before: str = IMPORT, **env: str) -> subprocess.CompletedProcess:
        code = LOAD.format(before=before) + "".join(parts)
        env = {name: value for name, value in os.environ.items() if name not in (GATE, REQUIRED, ALLOWLIST)} | env
        if parent is not None:
            return parent.run(code, env)
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)

    yield run
    if parent is not None:
        parent.close()


def test_replaces_both_classes(load):
    result = load(CLASSES, **{GATE: "1"})
    assert "FusedNativeSparseAttnBackend FusedNativeSparseAttnMultiStepBackend" in result.stdout, result.stderr
    assert "\nNativeSparseAttnBackend NativeSparseAttnMultiStepBackend" in result.stdout


def test_upstream_builds_our_step_backends(load):
    """The multi-step constructor is upstream's, and finds our step backend under upstream's name."""
    result = load(
        """
module.NativeSparseAttnBackend.__init__ = lambda self, runner, **kwargs: None
multi = module.NativeSparseAttnMultiStepBackend(None, 1, 4)
print([type(backend).__name__ for backend in multi.attn_backends])
""",
        **{GATE: "1"},
    )
    assert str(["FusedNativeSparseAttnBackend"] * 3) in result.stdout, result.stderr


def test_without_the_gate_nothing_is_replaced_or_imported(load):
    for env in ({}, {GATE: "0"}):
        result = load(CLASSES, **env)
        assert "\nNativeSparseAttnBackend NativeSparseAttnMultiStepBackend\n" in result.stdout, result.stderr
        assert "backends imported: False" in result.stdout


def test_an_allowlist_without_it_keeps_it_out(load):
    result = load(CLASSES, **{GATE: "1", ALLOWLIST: "other"})
    assert "backends imported: False" in result.stdout, result.stderr


def test_a_changed_sglang_is_left_alone(load):
    rename = IMPORT + "\nimport sglang.srt.layers.attention.nsa_backend as m; del m._to_2d_context_lens"
    result = load(CLASSES, before=rename, **{GATE: "1"})
    assert "WARNING sglang-nsa-fused: not active, sglang runs unchanged: sglang was changed" in result.stdout, result.stderr
    assert result.stdout.count("WARNING sglang-nsa-fused") == 1
    assert "lacks _to_2d_context_lens; reinstall sglang" in result.stdout
    assert "\nNativeSparseAttnBackend NativeSparseAttnMultiStepBackend\n" in result.stdout

    result = load(before=rename, **{GATE: "1", REQUIRED: "1"})
    assert result.returncode == 1 and "sglang-nsa-fused: not active: sglang was changed" in result.stderr


def test_one_line_says_that_it_is_active(load):
    result = load(
        """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
classes = module.NativeSparseAttnBackend, module.NativeSparseAttnMultiStepBackend
table = torch.zeros(9, 200, dtype=torch.int32, device=device)
for steps in (3, 5):
    bare.multi_step_backend(classes, release, device, table, steps, [1, 2])
""",
        **{GATE: "1"},
    )
    lines = [line for line in result.stdout.splitlines() if "active" in line]
    assert len(lines) == 1, result.stdout + result.stderr
    assert lines[0].startswith("INFO sglang-nsa-fused 0.1.0 active: sglang 0.5.12")
    assert lines[0].endswith("replaces NativeSparseAttnBackend and NativeSparseAttnMultiStepBackend")
