import sys
from types import SimpleNamespace

import pytest
import torch
from upstream import Upstream

from sglang_nsa_fused import reference


@pytest.fixture
def device() -> str:
    """One device for a process: without a GPU upstream's module is imported with stand-ins that would stay."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def upstream(device):
    return Upstream(device)


@pytest.fixture
def deep_gemm(upstream, monkeypatch):
    """A stand-in that gives the CPU the schedule branches of a GPU."""
    if upstream.device == "cuda":
        import deep_gemm

        return deep_gemm

    def get_paged_mqa_logits_metadata(context_lens, block, num_sms):
        assert context_lens.shape[1] == 1 and block == 64
        return reference.paged_mqa_schedule(context_lens.view(-1), 256, num_sms)

    stand_in = SimpleNamespace(get_paged_mqa_logits_metadata=get_paged_mqa_logits_metadata, get_num_sms=lambda: 132)
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    monkeypatch.setattr(upstream.module, "is_cuda", lambda: True)
    return stand_in
