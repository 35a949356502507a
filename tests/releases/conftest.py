import importlib.metadata
from pathlib import Path

import pytest
import torch
from upstream import Upstream

from sglang_nsa_fused import releases

# Tests of upstream's classes by themselves; the others need a release that the plugin supports.
UPSTREAM = "test_upstream_classes.py"


@pytest.fixture
def device() -> str:
    """One device for a process: without a GPU upstream's module is imported with stand-ins that would stay."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def upstream(device):
    upstream = Upstream(device)
    with upstream.gpu():
        yield upstream


@pytest.fixture
def deep_gemm(upstream):
    """On a CPU the stand-in."""
    import deep_gemm

    return deep_gemm


def pytest_collection_modifyitems(items) -> None:
    version = importlib.metadata.version("sglang")
    if releases.find(version) is None:
        for item in items:
            if item.path.parent == Path(__file__).parent and item.path.name != UPSTREAM:
                item.add_marker(pytest.mark.skip(reason=f"unsupported: sglang {version}"))
