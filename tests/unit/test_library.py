"""The native library: what it links, and what happens without it."""

import re
import subprocess

import generated
import pytest
import torch

from sglang_nsa_fused import ReplayPlan, kernels, reference
from sglang_nsa_fused.kernels import library as load_library


def library_path() -> str:
    load_library()
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if line.rstrip().endswith("libnsa_fused.so"))


def test_needs_tvm_ffi_and_the_c_runtime_alone():
    dynamic = subprocess.run(["readelf", "-d", library_path()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", dynamic))
    assert needed <= {"libtvm_ffi", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}, needed


def test_architectures_are_named():
    assert all(re.fullmatch(r"(sm|compute)_\d+", arch) for arch in kernels.cuda_archs())


@pytest.fixture
def no_library(monkeypatch):
    def missing():
        raise RuntimeError("the native library cannot be loaded")

    monkeypatch.setattr(kernels, "library", missing)
    kernels.select.cache_clear()
    yield
    kernels.select.cache_clear()


def test_without_it_the_reference_copies(no_library):
    engine = kernels.select("cpu")
    assert engine.name == "reference" and "cannot be loaded" in engine.reason


def test_without_it_a_plan_says_what_to_do(no_library):
    case = generated.make("cpu")
    with pytest.raises(RuntimeError, match="no native library for cpu .*cannot be loaded.*; reinstall sglang-nsa-fused"):
        case.plan()
    destination = case.destinations[0][:10]
    destination[2] = destination[2].long()  # which plain torch would copy to
    with pytest.raises(RuntimeError, match="no native library for cpu"):
        ReplayPlan(reference.DECODE, [destination])


def test_a_library_that_copies_wrongly_is_not_chosen(monkeypatch):
    def off_by_one(mode, destinations):
        def replay(*args):
            reference.copy(mode, args[:10], destinations, *args[10:])
            destinations[-1][5][-1] += 1

        return replay

    monkeypatch.setattr(kernels, "_native_plan", off_by_one)
    kernels.select.cache_clear()
    engine = kernels.select("cpu")
    kernels.select.cache_clear()
    assert engine.name == "reference" and "self-check" in engine.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_loads_and_copies_without_a_driver():
    assert kernels.select("cpu").name == "native"
