"""What stands in for a GPU when upstream's backend modules run on a CPU: for the demo and the tests, never in a server.

`install` before the import, then `with cuda(...)`: upstream takes its CUDA branches, over torch forms of the kernels that
they launch (torch_forms.py). `attributes` is what upstream's metadata path reads from a step backend.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import re
import sys
import types
from unittest import mock

import torch

from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.tools import torch_forms, versions
from sglang_nsa_fused.tools.torch_forms import as_kernel, deep_gemm

# The fused copy compiles CUDA at its first call; without the module upstream copies tensor by tensor.
FUSED_COPY = (
    "sglang.jit_kernel.fused_metadata_copy",
    "sglang.kernels.ops.attention.fused_metadata_copy",
    "sglang.kernels.ops.attention.dsa.fused_metadata_copy",
)
# Where the torch forms go, by the name that upstream calls: the modules that define or import it, in any release.
KERNELS = {
    "seqlens_expand_triton": ("backend", "precompute"),
    "fused_dsa_decode_metadata": ("generator", "manager"),
    "fused_dsa_target_verify_metadata": ("generator", "manager"),
    "fused_dsa_draft_extend_metadata": ("generator", "manager"),
    "plan_topk_v2": ("topk",),
}
MODULES = {
    "precompute": ("sglang.srt.layers.attention.{n}.{n}_backend_mtp_precompute",),
    "manager": ("sglang.srt.layers.attention.dsa.dsa_metadata_manager",),
    "generator": (
        "sglang.srt.layers.attention.triton_ops.dsa_metadata",
        "sglang.kernels.ops.attention.dsa_metadata",
        "sglang.kernels.ops.attention.dsa.metadata",
    ),
    "topk": ("sglang.jit_kernel.dsv4.topk", "sglang.kernels.ops.attention.dsv4.topk"),
}


def install(version: str) -> None:
    """Call before the import of upstream's backend module, with sglang's version."""
    # torchvision registers shape functions for operators that a CPU-only installation may lack; none is called.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    for name in FUSED_COPY:
        sys.modules[name] = None
    if versions.of(version).packages:
        sys.meta_path.insert(0, _Finder(versions.of(version).packages))


@contextlib.contextmanager
def cuda(release: Release, backend: types.ModuleType, sm100: bool = False):
    """Inside, the imported backend module behaves as on a CUDA GPU, over CPU tensors.

    sm100: as on a Blackwell GPU, whose target verify schedule has a column for each draft token.
    """
    modules = {"backend": [backend]}
    for key, paths in MODULES.items():
        modules[key] = [module for module in (_import(path.format(n=release.names)) for path in paths) if module is not None]
    forms = {name: as_kernel(getattr(torch_forms, name)) for name in KERNELS}
    forms["seqlens_expand_triton"] = as_kernel(functools.partial(torch_forms.seqlens_expand_triton, floor=release.floor))
    facts = {
        "is_cuda": lambda: True,
        "_is_cuda": True,
        "is_sm100_supported": lambda: sm100,
        "get_platform": lambda: types.SimpleNamespace(is_sm100=sm100),
    }
    with contextlib.ExitStack() as stack:
        for name, places in KERNELS.items():
            for module in (module for place in places for module in modules[place] if hasattr(module, name)):
                stack.enter_context(mock.patch.object(module, name, forms[name]))
        for module in (backend, *modules["precompute"], *modules["manager"]):
            for name in (name for name in facts if hasattr(module, name)):
                stack.enter_context(mock.patch.object(module, name, facts[name]))
        # From 0.5.13 to 0.5.21 the module imports it where there is a GPU, in other releases each method does.
        stack.enter_context(mock.patch.object(backend, "deep_gemm", deep_gemm, create=True))
        found = sys.modules.get("deep_gemm")
        sys.modules["deep_gemm"] = deep_gemm
        stack.callback(lambda: sys.modules.pop("deep_gemm") if found is None else sys.modules.update(deep_gemm=found))
        for name in filter(None, (release.schedule_function, release.num_sms)):  # they remember DeepGEMM's functions
            getattr(backend, name).cache_clear()
            stack.callback(getattr(backend, name).cache_clear)
        yield


def _import(path: str):
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:  # of another release
        return None


def attributes(
    release: Release,
    version: str,
    module: types.ModuleType,
    device: str,
    req_to_token: torch.Tensor,
    draft_tokens: int,
    flashmla: bool,
) -> dict:
    """What the metadata path of this version reads from a step backend and its constructor would have set.

    req_to_token: int32 [slots, columns]. flashmla: whether captured metadata holds FlashMLA's tile metadata.
    """
    impl = "flashmla_kv" if flashmla else "flashmla_sparse"
    use_mha, prefill_impl = release.prefill_impl_state
    of_release = {
        release.page_size: 64,
        release.req_to_token: req_to_token,
        release.draft_tokens: draft_tokens,
        release.index_topk: 2048,
        release.decode_impl: impl,
        release.kpool: 1,
        release.flashmla_heads: 128,
        release.kv_shard_pool: None,
        use_mha: False,
        prefill_impl: impl,
        f"{release.names}_kv_cache_store_fp8": flashmla,
    }
    topk_backend = getattr(module, "DSATopKBackend", None)
    others = {
        "device": device,
        "max_context_len": req_to_token.shape[1],
        "enable_auto_select_prefill_impl": False,
        "num_q_heads": 128,
        "_arange_buf": _arange(device),
        "_force_attn_forward_mla": False,
        "hisparse_coordinator": None,
        "token_to_kv_pool": None,
        "req_to_token_pool": types.SimpleNamespace(req_to_token=req_to_token),
        "use_fused_topk": True,
        "dsa_topk_backend": topk_backend and topk_backend.SGL_KERNEL,
        "supports_mha_one_shot": True,
        "_get_device_sm": _sm,
        "_is_blackwell": _no,
        "_is_in_breakable_cuda_graph": _no,
        "_is_in_tc_piecewise_cuda_graph": _no,
        "_memory_saver_adapter": _MemorySaver(),
        "_multi_ctas_kv_counter_buffer": None,
        "num_dcp_q_heads": 128,
    }
    of_release.pop(None, None)  # what this release does not have
    return {**of_release, **{name: others[name] for name in versions.of(version).attributes}}


@functools.lru_cache(None)
def _arange(device: str) -> torch.Tensor:
    """One for all backends, so that what a benchmark finds a backend to hold is what it captured. Nobody writes to it."""
    return torch.arange(16384, dtype=torch.int32, device=device)


def _no() -> bool:
    return False


def _sm() -> int:
    return 90


class _MemorySaver:
    """As upstream's where the feature is off: one for each backend, without a state."""

    def region(self, tag):
        return contextlib.nullcontext()


class _StandIn(types.ModuleType):
    """A module in which every name exists: a class where it is capitalised, else something to call or to decorate with."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__getattr__": lambda self, key: self}) if re.match("[A-Z]", name) else _StandIn(name)

    def __call__(self, *args, **kwargs):
        return args[0] if args and callable(args[0]) else self


class _Finder:
    def __init__(self, packages: frozenset[str]):
        self.packages = packages

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module) -> None:
        pass
