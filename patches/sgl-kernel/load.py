"""Builds the in-tree kernel alone, without the rest of sgl-kernel: for tests and benchmarks."""

import functools
import hashlib
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.cpp_extension import load

HERE = Path(__file__).resolve().parent
NAME = "nsa_fused_sgl_kernel"  # as in torch_extension.cu


@functools.lru_cache(None)
def load_extension(verbose: bool = False) -> SimpleNamespace:
    """fused_metadata_copy_cuda and fused_metadata_copy_multi_cuda, with sglang's positional arguments.

    Built by nvcc on the first call, for TORCH_CUDA_ARCH_LIST, or for sm_90 where that is not set.
    """
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    # The build follows no includes: a kernel that changed must change the command line.
    kernel = hashlib.sha256(runpy.run_path(str(HERE / "generate.py"))["write"]().read_bytes()).hexdigest()
    flags = ["-O3", f"-DNSA_FUSED_KERNEL={kernel}"]
    load(NAME, [str(HERE / "torch_extension.cu")], extra_cuda_cflags=flags, is_python_module=False, verbose=verbose)
    ops = getattr(torch.ops, NAME)
    return SimpleNamespace(
        fused_metadata_copy_cuda=ops.fused_metadata_copy_cuda.default,
        fused_metadata_copy_multi_cuda=ops.fused_metadata_copy_multi_cuda.default,
    )
