"""The random cases of tests/unit/test_properties.py on CUDA, more of them and others in each run.

SGLANG_NSA_FUSED_TEST_COUNT=20000 pytest -s tests/gpu/test_properties.py
"""

import properties
import pytest

from sglang_nsa_fused.kernels import select


@pytest.mark.parametrize("operation", properties.OPERATIONS)
def test_any_case(operation, count, seed):
    assert select("cuda").name == "native", select("cuda").reason
    properties.search(operation, "cuda", count(1000), seed)
