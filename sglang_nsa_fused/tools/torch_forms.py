"""What upstream's CUDA and Triton kernels give, in torch: the forms that stand in for them on a CPU.

Each gives what upstream's kernel of this name gives; page tables over their whole width, though since 0.5.17 the kernels
stop after the block of 128 columns with a row's last token: nobody reads what lies behind.
"""

import time
import types
from typing import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sglang_nsa_fused import planners, reference

NUM_SMS = 132  # an H100's


class Kernels:
    """Nanoseconds spent in all forms, so that host times may leave them out."""

    spent = 0


def as_kernel(form: Callable) -> Callable:
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
deep_gemm.get_paged_mqa_logits_metadata = as_kernel(_schedule)
deep_gemm.get_num_sms = lambda: NUM_SMS


def flashmla_metadata(module: types.ModuleType) -> Callable:
    """For `_compute_flashmla_metadata`: FlashMLA's planner runs on a GPU only; numbers of its shapes, by the number of rows."""
    cls = getattr(module, "NSAFlashMLAMetadata", None) or module.DSAFlashMLAMetadata

    def compute(cache_seqlens: torch.Tensor, seq_len_q: int):
        lengths = torch.full_like(cache_seqlens, 2048)
        tiles = (torch.arange(NUM_SMS * 8, dtype=torch.int32).view(-1, 8) + 1) * (1 + lengths.sum().to(torch.int32))
        return cls(flashmla_metadata=tiles, num_splits=_cumulative(lengths // 64 + 1))

    return as_kernel(compute)
