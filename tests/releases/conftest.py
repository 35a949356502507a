import pytest
import torch
from upstream import Upstream

from sglang_nsa_fused import planners
from sglang_nsa_fused.tools import torch_forms


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
