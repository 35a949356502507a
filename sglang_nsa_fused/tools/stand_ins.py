"""What stands in for a GPU when upstream's backend modules run on a CPU: for the demo and the tests, never in a server.

`install` before the import, then `with cuda(...)`: upstream takes its CUDA branches, over torch forms of the kernels that
they launch. `attributes` is what upstream's metadata path reads from a step backend.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import re
import sys
import time
import types
from typing import Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sglang_nsa_fused import planners, reference

# Packages that only a GPU machine has and that the import wants all the same.
PACKAGES = {
    "0.5.7": {"sgl_kernel", "vllm"},
    "0.5.8": {"sgl_kernel"},
    "0.5.9": {"sgl_kernel"},
    "0.5.10": {"sgl_kernel"},
    "0.5.15": {"cutlass", "cuda"},  # 0.5.15.post1 imports its kernels later
}
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
NUM_SMS = 132  # an H100's
NO_CPU_LENGTHS = (0, 5, 15)  # since then they may hand over none on the host
LENGTHS_64 = (0, 5, 14)  # since then the graph runners' lengths are int64
SMALL_PLANS = (0, 5, 21)  # since then a GPU's planner of the top-k writes nothing for up to 30 rows
STEPS_BUT_ONE = (0, 5, 9)  # since then a multi-step backend has one step backend less than draft steps


def base(version: str) -> tuple[int, ...]:
    """(0, 5, 12) of 0.5.12.post1."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def install(version: str) -> None:
    """Call before the import of upstream's backend module, with sglang's version."""
    # torchvision registers shape functions for operators that a CPU-only installation may lack; none is called.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    for name in FUSED_COPY:
        sys.modules[name] = None
    packages = PACKAGES.get(".".join(map(str, base(version))), set())
    if packages:
        sys.meta_path.insert(0, _Finder(packages))


@contextlib.contextmanager
def cuda(version: str, backend: types.ModuleType, sm100: bool = False):
    """Inside, the imported backend module behaves as on a CUDA GPU, over CPU tensors.

    sm100: as on a Blackwell GPU, whose target verify schedule has a column for each draft token.
    """
    n = backend.__name__.rsplit(".", 1)[1][:3]
    modules = {"backend": [backend]}
    for key, paths in MODULES.items():
        modules[key] = [module for module in (_import(path.format(n=n)) for path in paths) if module is not None]
    forms = {name: _kernel(globals()[name]) for name in KERNELS}
    if base(version) < (0, 5, 15):
        forms["seqlens_expand_triton"] = _kernel(functools.partial(seqlens_expand_triton, floor=-(1 << 31)))
    facts = {
        "is_cuda": lambda: True,
        "_is_cuda": True,
        "is_sm100_supported": lambda: sm100,
        "get_platform": lambda: types.SimpleNamespace(is_sm100=sm100),
        # The server's, which no process here has set up: how many ranks share a context.
        "pad_nsa_cache_seqlens": lambda forward_batch, nsa_cache_seqlens: nsa_cache_seqlens,
        "pad_dsa_cache_seqlens": lambda forward_batch, dsa_cache_seqlens: dsa_cache_seqlens,
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
        for name in ("resolve_paged_mqa_logits_metadata_fn", "resolve_num_sms"):
            if hasattr(backend, name):  # they remember DeepGEMM's functions
                getattr(backend, name).cache_clear()
                stack.callback(getattr(backend, name).cache_clear)
        yield


def _import(path: str):
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:  # of another release
        return None


def attributes(
    version: str, module: types.ModuleType, device: str, req_to_token: torch.Tensor, draft_tokens: int, flashmla: bool
) -> dict:
    """What this release's metadata path reads from a step backend and its constructor would have set.

    req_to_token: int32 [slots, columns]. flashmla: whether captured metadata holds FlashMLA's tile metadata.
    """
    impl = "flashmla_kv" if flashmla else "flashmla_sparse"
    n = "nsa" if base(version) < (0, 5, 13) else "dsa"
    topk_backend = getattr(module, "DSATopKBackend", None)
    since = {
        "0.5.7": {
            "device": device,
            "real_page_size": 64,
            "req_to_token": req_to_token,
            "max_context_len": req_to_token.shape[1],
            "speculative_num_draft_tokens": draft_tokens,
            f"{n}_index_topk": 2048,
            f"{n}_decode_impl": impl,
            f"{n}_prefill_impl": impl,
            f"{n}_kv_cache_store_fp8": flashmla,
            "enable_auto_select_prefill_impl": False,
            "num_q_heads": 128,
            "use_mha": False,
            "_arange_buf": _arange(device),
        },
        "0.5.9": {"_force_attn_forward_mla": False},
        "0.5.11": {"flashmla_kv_num_q_heads": 128},
        "0.5.13": {
            "hisparse_coordinator": None,
            "token_to_kv_pool": None,
            "req_to_token_pool": types.SimpleNamespace(req_to_token=req_to_token),
        },
        "0.5.15": {} if version == "0.5.15" else {"use_fused_topk": True},  # from 0.5.15.post1 on
        "0.5.17": {"dsa_topk_backend": topk_backend and topk_backend.SGL_KERNEL},
        "0.5.19": {"supports_mha_one_shot": True},
        "0.5.20": {
            "dsa_index_kpool": 1,
            "_get_device_sm": _sm,
            "_is_blackwell": _no,
            "_is_in_breakable_cuda_graph": _no,
            "_is_in_tc_piecewise_cuda_graph": _no,
        },
        "0.5.21": {
            "_memory_saver_adapter": _MemorySaver(),
            "_multi_ctas_kv_counter_buffer": None,
        },
        "0.5.22": {"physical_page_size": 64, "num_dcp_q_heads": 128},
        "0.5.23": {"_kv_shard_pool": None},
    }
    until = {"_force_attn_forward_mla": "0.5.10", "max_context_len": "0.5.15", "real_page_size": "0.5.22"}
    values = {k: v for first, some in since.items() if base(first) <= base(version) for k, v in some.items()}
    return {k: v for k, v in values.items() if base(version) < base(until.get(k, "999.0.0"))}


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


def flashmla_metadata(module: types.ModuleType, by_lengths: bool = False) -> Callable:
    """For `_compute_flashmla_metadata`: FlashMLA's planner runs on a GPU only; numbers of its shapes.

    They depend on the number of rows alone, as with a top k, or on the lengths too.
    """
    cls = getattr(module, "NSAFlashMLAMetadata", None) or module.DSAFlashMLAMetadata

    def compute(cache_seqlens: torch.Tensor, seq_len_q: int):
        lengths = cache_seqlens if by_lengths else torch.full_like(cache_seqlens, 2048)
        tiles = (torch.arange(NUM_SMS * 8, dtype=torch.int32).view(-1, 8) + 1) * (1 + lengths.sum().to(torch.int32))
        return cls(flashmla_metadata=tiles, num_splits=_cumulative(lengths // 64 + 1))

    return _kernel(compute)


class Kernels:
    """Nanoseconds spent in all forms, so that host times may leave them out."""

    spent = 0


def _kernel(form: Callable) -> Callable:
    """One operation to whoever counts torch's: what the form is made of stays unseen."""

    def launch(*args, **kwargs):
        torch.zeros(())  # the one
        start = time.perf_counter_ns()
        try:
            with _disable_current_modes():
                return form(*args, **kwargs)
        finally:
            Kernels.spent += time.perf_counter_ns() - start

    return launch


# The torch forms. Each gives what upstream's kernel of this name gives; page tables over their whole width, though
# since 0.5.17 the kernels stop after the block of 128 columns with a row's last token: nobody reads what lies behind.


def seqlens_expand_triton(extend_seq_lens, seq_lens, total_len: int, max_q_len: int, floor: int = 0) -> torch.Tensor:
    """The visible length of each of a request's last `extend_seq_lens` tokens, int32 [total_len].

    floor: a padded row has fewer tokens than it extends by; until 0.5.14 upstream leaves its lengths below 0.
    """
    rows = torch.repeat_interleave(torch.arange(len(seq_lens)), extend_seq_lens.long())
    first = torch.repeat_interleave(torch.cumsum(extend_seq_lens, 0) - extend_seq_lens, extend_seq_lens.long())
    offset = torch.arange(total_len) - first
    return (seq_lens[rows] - extend_seq_lens[rows] + 1 + offset).clamp(min=floor).to(torch.int32)


def fused_dsa_decode_metadata(
    *,
    seq_lens,
    req_pool_indices,
    req_to_token,
    cache_seqlens,
    cu_seqlens_k,
    page_table_1,
    dsa_cache_seqlens,
    dsa_cu_seqlens_k,
    real_page_table,
    bs,
    max_len,
    dsa_index_topk,
    **page_size,
) -> None:
    dsa_seqlens = seq_lens.clamp(max=dsa_index_topk)
    _write(cache_seqlens, seq_lens)
    _write(cu_seqlens_k, _cumulative(seq_lens))
    _write(dsa_cache_seqlens, dsa_seqlens)
    _write(dsa_cu_seqlens_k, _cumulative(dsa_seqlens))
    _tables(page_table_1, real_page_table, req_to_token[req_pool_indices, :max_len], **page_size)


def fused_dsa_target_verify_metadata(
    *, seq_lens, req_pool_indices, max_seqlen_k, next_n, paged_mqa_ctx_lens_2d=None, bs, **rest
) -> None:
    if paged_mqa_ctx_lens_2d is not None:
        paged_mqa_ctx_lens_2d.copy_((seq_lens + next_n).view(-1, 1).expand(-1, next_n))
    _expanded(seq_lens + next_n, torch.full((bs,), next_n), req_pool_indices, max_seqlen_k, **rest)


def fused_dsa_draft_extend_metadata(
    *,
    seq_lens,
    extend_seq_lens,
    req_pool_indices,
    max_seqlen_k,
    bs,
    total_len,
    max_extend_len,
    max_total_len,
    static_extend_len=False,
    **rest,
) -> None:
    _expanded(seq_lens, extend_seq_lens, req_pool_indices, max_seqlen_k, **rest)


def _expanded(
    kv_lens,
    extend_seq_lens,
    req_pool_indices,
    width,
    *,
    req_to_token,
    cache_seqlens,
    cu_seqlens_k,
    page_table_1,
    seqlens_expanded,
    dsa_cache_seqlens,
    dsa_cu_seqlens_k,
    real_page_table,
    dsa_index_topk,
    **page_size,
) -> None:
    """The modes with several tokens for each request: a row for each token."""
    expanded = seqlens_expand_triton(extend_seq_lens, kv_lens, int(extend_seq_lens.sum()), 0)
    dsa_seqlens = expanded.clamp(max=dsa_index_topk)
    _write(cache_seqlens, kv_lens)
    _write(cu_seqlens_k, _cumulative(kv_lens))
    _write(seqlens_expanded, expanded)
    _write(dsa_cache_seqlens, dsa_seqlens)
    _write(dsa_cu_seqlens_k, _cumulative(dsa_seqlens))
    rows = torch.repeat_interleave(req_pool_indices, extend_seq_lens.long())
    _tables(page_table_1, real_page_table, req_to_token[rows, :width], **page_size)


def _tables(page_table_1, real_page_table, pages, *, real_page_size=0, physical_page_size=0) -> None:
    size = real_page_size or physical_page_size
    if page_table_1 is not None:
        page_table_1[: len(pages), : pages.shape[1]] = pages
    if size > 1:
        real_page_table[: len(pages), : -(-pages.shape[1] // size)] = pages[:, ::size] // size


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def _write(destination: torch.Tensor, values: torch.Tensor) -> None:
    destination[: len(values)] = values


TOPK_BUCKETS = planners.TOPK_BUCKETS[0]


def plan_topk_v2(seq_lens: torch.Tensor, static_threshold: int = 0, *, out=None) -> torch.Tensor:
    """int32 [rows + 1, 2]; what upstream's leaves unwritten is -7."""
    assert seq_lens.dtype == torch.int32 and bool((seq_lens >= 0).all())
    plan = torch.full((len(seq_lens) + 1, 2), -7, dtype=torch.int32)
    _write(plan, reference.topk_v2_plan(seq_lens, TOPK_BUCKETS))
    return plan if out is None else out.copy_(plan)


def _schedule(context_lens: torch.Tensor, block_kv: int, num_sms: int) -> torch.Tensor:
    """DeepGEMM's schedule on SM90 for one length a row; lengths in several columns count as so many rows."""
    assert context_lens.dtype == torch.int32 and context_lens.is_contiguous() and block_kv == 64
    return reference.paged_mqa_schedule(context_lens.view(-1), 4 * block_kv, num_sms)


deep_gemm = types.ModuleType("deep_gemm")
deep_gemm.get_paged_mqa_logits_metadata = _kernel(_schedule)
deep_gemm.get_num_sms = lambda: NUM_SMS


class _StandIn(types.ModuleType):
    """A module in which every name exists: a class where it is capitalised, else something to call or to decorate with."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__getattr__": lambda self, key: self}) if re.match("[A-Z]", name) else _StandIn(name)

    def __call__(self, *args, **kwargs):
        return args[0] if args and callable(args[0]) else self


class _Finder:
    def __init__(self, packages: set[str]):
        self.packages = packages

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module) -> None:
        pass
