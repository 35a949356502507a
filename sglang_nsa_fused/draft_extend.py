"""Metadata of a draft extend that runs without a graph: built each step, from one allocation and one launch."""

from types import ModuleType

import torch

from sglang_nsa_fused.kernels import Engine
from sglang_nsa_fused.planners import Planners
from sglang_nsa_fused.releases import Release


def applies(release: Release, backend, forward_batch) -> bool:
    """Whether this is such a batch, without the padding of data-parallel attention, which stays upstream's."""
    return (
        forward_batch.forward_mode.is_draft_extend(include_v2=True)
        and forward_batch.global_num_tokens_cpu is None
        and forward_batch.seq_lens_cpu is not None
        and getattr(backend, release.page_size) > 1
        and sum(forward_batch.extend_seq_lens_cpu or ()) > 0
    )


def build(release: Release, module: ModuleType, planners: Planners, engine: Engine, backend, forward_batch):
    """Upstream's metadata object for this batch.

    Its tables hold what every row may read, its length's prefix; upstream fills the rest of a row with the pages
    behind it. In v2 all requests have num_draft_tokens rows, in v1 as many as were accepted.
    """
    getattr(backend, release.set_prefill_impl)(forward_batch)
    extend_lens_cpu = forward_batch.extend_seq_lens_cpu
    fixed = forward_batch.forward_mode.is_draft_extend_v2()
    bs, rows = forward_batch.batch_size, sum(extend_lens_cpu)
    cols = int(forward_batch.seq_lens_cpu.max())
    page_size = getattr(backend, release.page_size)
    pages = (cols + page_size - 1) // page_size
    device = forward_batch.seq_lens.device
    segment_len = planners.segment_len(rows, device) if module.is_cuda() else 0
    num_sms = planners.num_sms() if segment_len else 1

    sizes = (2 * (num_sms + 1) if segment_len else 0, rows * cols, rows * pages, bs, bs + 1, rows, rows, rows + 1)
    workspace = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    engine.generate_draft_extend(
        forward_batch.seq_lens,
        forward_batch.req_pool_indices,
        None if fixed else forward_batch.extend_seq_lens,
        bs,
        getattr(backend, release.req_to_token),
        workspace,
        rows,
        cols,
        getattr(backend, release.draft_tokens),
        getattr(backend, release.index_topk),
        page_size,
        segment_len,
        num_sms,
    )
    schedule, table, real_table, cache_lens, cu_lens, expanded, nsa_lens, nsa_cu_lens = torch.split_with_sizes(workspace, sizes)
    schedule = schedule.view(-1, 2) if segment_len else None

    flashmla = None
    if not backend.use_mha and getattr(backend, release.decode_impl) == "flashmla_kv":
        flashmla = planners.flashmla(backend, rows) or planners.flashmla_of(backend, nsa_lens)
    if schedule is None and module.is_cuda():
        schedule = planners.schedule(expanded, bs)
    arange = backend.get_device_int32_arange(rows + 1)
    return getattr(module, release.metadata)(
        page_size=page_size,
        cache_seqlens_int32=cache_lens,
        max_seq_len_q=1,
        max_seq_len_k=cols,
        cu_seqlens_q=arange,
        cu_seqlens_k=cu_lens,
        seq_lens_sum=forward_batch.seq_lens_sum,
        page_table_1=table.view(rows, cols),
        page_table_1_flattened=None,
        flashmla_metadata=flashmla,
        paged_mqa_schedule_metadata=schedule,
        nsa_cache_seqlens_int32=nsa_lens,
        nsa_cu_seqlens_q=arange,
        nsa_cu_seqlens_k=nsa_cu_lens,
        nsa_extend_seq_lens_list=extend_lens_cpu,
        nsa_seqlens_expanded=expanded,
        real_page_table=real_table.view(rows, pages),
        nsa_max_seqlen_q=1,
        topk_indices_offset=None,
        indexer_k_start_end=None,
        indexer_seq_lens_cpu=forward_batch.seq_lens_cpu,
        indexer_seq_lens=forward_batch.seq_lens,
        token_to_batch_idx=None,
    )
