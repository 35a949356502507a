import pytest
import torch


@pytest.fixture
def device() -> str:
    """One device for a process: without a GPU upstream's module is imported with stand-ins that would stay."""
    return "cuda" if torch.cuda.is_available() else "cpu"
