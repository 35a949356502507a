import os
import random

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def count():
    """count(default): how many cases or replays."""
    return lambda default: int(os.environ.get("SGLANG_NSA_FUSED_TEST_COUNT", default))


@pytest.fixture
def seed(request) -> int:
    found = int(os.environ.get("SGLANG_NSA_FUSED_TEST_SEED", random.randrange(1 << 32)))
    print(f"{request.node.name}: SGLANG_NSA_FUSED_TEST_SEED={found}")
    return found
