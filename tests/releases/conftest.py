import pytest
import torch
from upstream import Upstream


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
