import gc
import subprocess
import sys

import pytest
import torch
import triton_kernels
from forked import Parent

from sglang_nsa_fused import plugin
from sglang_nsa_fused.tools import bare, torch_forms

PARENT = None
if not torch.cuda.is_available():
    torch.set_num_threads(1)  # small tensors, and a fork has no threads
    triton_kernels.prepare()
    bare.import_upstream(plugin.find_release()[0], "cpu")
    if "sglang_nsa_fused.backends" not in sys.modules:  # else tests of other folders run in this process too
        PARENT = Parent()  # before anything else of the plugin is imported

from upstream import Upstream  # noqa: E402

from sglang_nsa_fused import planners  # noqa: E402

gc.collect()
gc.freeze()  # millions of objects of the imports, which tests that count live tensors would look at each time


def pytest_unconfigure():
    gc.unfreeze()  # else extensions report at the end of the process what they made there as leaks


@pytest.fixture(scope="session")
def parent():
    """With upstream's backend module imported, and of the plugin what that takes; None where a fork would not do."""
    yield PARENT
    if PARENT is not None:
        PARENT.close()


@pytest.fixture(scope="session")
def start(parent):
    """start(code, env) -> CompletedProcess"""
    return parent.run if parent is not None else in_a_new_process


def in_a_new_process(code: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)


FOUND: dict[str, dict] = {}  # by the planners' attribute


def pytest_configure(config):
    config.addinivalue_line("markers", "compares: changes what planners are compared with, so nothing found before holds")


@pytest.fixture(autouse=True)
def compared_once(request, monkeypatch):
    """What one test has found out about planners that nobody changed holds for the next: half of all time went there."""
    if request.node.get_closest_marker("compares"):
        return
    init = planners.Planners.__init__

    def with_findings(self, *args):
        init(self, *args)
        for name in ("_schedule_forms", "_flashmla", "_topk_buckets"):
            setattr(self, name, FOUND.setdefault(name, {}))

    monkeypatch.setattr(planners.Planners, "__init__", with_findings)


@pytest.fixture
def device() -> str:
    """One device for a process: without a GPU upstream's module is imported with stand-ins that would stay."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def upstream(device, monkeypatch):
    if device == "cpu":  # with thresholds that the lengths of these tests reach
        monkeypatch.setattr(torch_forms, "TOPK_BUCKETS", ((63, 0), (64, 2), (1000, 3), (2048, 1)))
        monkeypatch.setattr(planners, "TOPK_BUCKETS", (*planners.TOPK_BUCKETS, torch_forms.TOPK_BUCKETS))
    upstream = Upstream(device)
    with upstream.gpu():
        yield upstream


@pytest.fixture
def deep_gemm(upstream):
    """On a CPU the stand-in."""
    import deep_gemm

    return deep_gemm
