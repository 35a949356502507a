"""An sgl-kernel that has the kernel stands in where the plugin's own library is missing."""

import sys
import types

import pytest
from cases import make

from sglang_nsa_fused import ReplayPlan, fused_metadata_copy_cuda, kernels
from sglang_nsa_fused.reference import DECODE


@pytest.fixture
def sgl_kernel(monkeypatch):
    module = types.ModuleType("sgl_kernel")
    module.fused_metadata_copy_cuda = fused_metadata_copy_cuda
    monkeypatch.setitem(sys.modules, "sgl_kernel", module)
    return kernels.Engine("sgl_kernel", kernels._sgl_kernel_plan)


def test_copies_to_every_destination(device, sgl_kernel):
    case = make(device, num_dst=3, flashmla=True, schedule=True)
    expected = case.expected()
    ReplayPlan(DECODE, case.destinations, sgl_kernel).copy(*case.sources, *case.sizes)
    case.check(expected)


def test_chosen_on_cuda_where_the_library_is_missing(monkeypatch):
    tried = []

    def fails(copy_plan, device_type):
        tried.append(copy_plan)
        if copy_plan is kernels._native_plan:
            raise RuntimeError("missing")

    monkeypatch.setattr(kernels.self_check, "copy", fails)
    kernels.select.cache_clear()
    engine = kernels.select("cuda")
    kernels.select.cache_clear()
    assert engine.name == "sgl_kernel" and engine.reason == "native: missing"
    assert tried == [kernels._native_plan, kernels._sgl_kernel_plan]


def test_a_library_that_generates_wrongly_is_not_chosen(monkeypatch):
    """As one that was built from other sources than the Python around it."""
    right = kernels._native_generate_plan

    def off_by_one(mode, values, destinations):
        generate = right(mode, values, destinations)

        def run(*args):
            generate(*args)
            destinations[0][3][-1] += 1

        return run

    monkeypatch.setattr(kernels, "_native_generate_plan", off_by_one)
    kernels.select.cache_clear()
    engine = kernels.select("cpu")
    kernels.select.cache_clear()
    assert engine.name == "none"
    assert "its self-check of the generation does not match the reference" in engine.reason
