"""Both operations from plain torch operations: the oracle of the tests and of the verify mode. It never serves a request."""

import torch

DECODE, TARGET_VERIFY, DRAFT_EXTEND = 0, 1, 2


def copy(mode, sources, destinations, bs, max_len, max_seqlen_k, seqlens_expanded_size):
    """Copies one source set to every destination.

    mode: DECODE, TARGET_VERIFY or DRAFT_EXTEND.
    sources: ten int32 tensors or None: cache_seqlens [bs], cu_seqlens_k [bs + 1], page_indices [rows, cols],
        nsa_cache_seqlens [n], seqlens_expanded [n], nsa_cu_seqlens_k [n + 1], real_page_table [rows, pages],
        flashmla_num_splits [n + 1], flashmla_metadata, paged_mqa_schedule; n is bs in decode, otherwise
        seqlens_expanded_size.
    destinations: one such set of captured tensors, each at least as large, for each step backend.
    """
    if bs == 0:
        return
    n = bs if mode == DECODE else seqlens_expanded_size
    cols = max_len if mode == DECODE else max_seqlen_k
    rows = min(sources[2].shape[0], n) if mode == DRAFT_EXTEND else n
    lengths, cu, table, nsa_lengths, expanded, nsa_cu, pages, splits, tiles, schedule = sources
    for dst in destinations:
        dst[0][:bs].copy_(lengths[:bs])
        dst[1][1 : bs + 1].copy_(cu[1 : bs + 1])
        dst[2][:rows, :cols].copy_(table[:rows, :cols])
        dst[3][:n].copy_(nsa_lengths[:n])
        if mode != DECODE:
            dst[4][:n].copy_(expanded[:n])
        dst[5][1 : n + 1].copy_(nsa_cu[1 : n + 1])
        if pages is not None:
            dst[6][:rows, : pages.shape[1]].copy_(pages[:rows])
        if splits is not None:
            dst[7][: n + 1].copy_(splits[: n + 1])
        for out, source in ((dst[8], tiles), (dst[9], schedule)):
            if source is not None:
                out.flatten()[: source.numel()].copy_(source.flatten())


def generate(mode, values, destinations, seq_lens, req_pool_indices, extend_lens, bs):
    """Writes what the captured graphs read of these lengths; arguments as those of `ReplayPlan` and its `generate`."""
    device = seq_lens.device
    each = 1 if mode == DECODE else values.num_draft_tokens
    counts = torch.full((bs,), each, device=device) if extend_lens is None else extend_lens[:bs].long().clamp(min=0)
    request = torch.repeat_interleave(torch.arange(bs, device=device), counts)
    rows = len(request)
    nth = torch.arange(rows, device=device) - (counts.cumsum(0) - counts)[request]
    slots = req_pool_indices[:bs].long()
    padding = (seq_lens[:bs] <= 1) & ((slots < 0) | (slots >= len(values.req_to_token)))  # it takes the first slot
    slots = slots.masked_fill(padding, 0)[request]
    for dst in destinations:
        lengths, cu, table, nsa_lengths, expanded, nsa_cu, pages, splits, tiles, schedule, lengths_2d, topk_plan = dst
        cache = (seq_lens[:bs] + (each if mode == TARGET_VERIFY else 0)).to(torch.int32)
        row_lens = (cache[request] - counts[request] + 1 + nth).to(torch.int32)
        if mode == DRAFT_EXTEND:
            row_lens = row_lens.clamp(min=values.row_floor)
        nsa = row_lens.clamp(max=values.nsa_index_topk)
        columns = cache[request].view(-1, 1)
        for out, new in ((lengths, cache), (expanded, row_lens), (nsa_lengths, nsa)):
            if out is not None:
                out[: len(new)] = new
        if lengths_2d is not None:
            lengths_2d.view(-1)[:rows] = row_lens
        for out, of in ((cu, cache), (nsa_cu, nsa)):
            if out is not None:
                out[0] = 0
                out[1 : len(of) + 1] = torch.cumsum(of, 0, dtype=torch.int32)
        for out, page in ((table, 1), (pages, values.page_size)):
            if out is None or rows == 0:
                continue
            found = values.req_to_token[slots, ::page][:, : out.shape[1]] // page
            live = torch.arange(found.shape[1], device=device) * page < columns
            out[:rows, : found.shape[1]] = torch.where(live, found, out[:rows, : found.shape[1]])
        if splits is not None:
            splits[: len(values.num_splits)] = values.num_splits
        if tiles is not None:
            tiles.view(-1)[: values.tile_metadata.numel()] = values.tile_metadata.view(-1)
        if schedule is not None:
            schedule.copy_(paged_mqa_schedule(row_lens, values.segment_len, len(schedule) - 1, values.extra_last))
        if topk_plan is not None:
            made = topk_v2_plan(row_lens, values.topk_buckets)
            topk_plan.view(-1)[: made.numel()] = made.view(-1)


def topk_v2_plan(lengths, buckets):
    """The plan of sglang's top-k v2, int32 [1 + n, 2]: (threshold, n), then (row, length) of the n rows that are longer.

    lengths: int32 [rows]. buckets: (threshold, most), rising; the threshold is the lowest that, as every one above it, no
    more than `most` rows exceed, or the highest.
    """
    unsigned = lengths.long() & 0xFFFFFFFF  # as there
    threshold = buckets[-1][0]
    for candidate, most in reversed(buckets):
        if int((unsigned > candidate).sum()) > most:
            break
        threshold = candidate
    rows = (unsigned > threshold).nonzero().view(-1)
    head = lengths.new_tensor([[threshold, len(rows)]])
    return torch.cat([head, torch.stack([rows.to(lengths.dtype), lengths[rows]], 1)])


def paged_mqa_schedule(lengths, segment_len, num_sms, extra_last=False):
    """DeepGEMM's schedule, int32 [num_sms + 1, 2]: the row and the segment of segment_len tokens in it where each SM
    begins, so that all have as many segments, or one more: the first of them, or the last. lengths: int32 [rows]."""
    segments = ((lengths.long() + segment_len - 1) & 0xFFFFFFFF) // segment_len  # unsigned arithmetic, as there
    ends = segments.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    sm = torch.arange(num_sms + 1, device=lengths.device)
    more = total % num_sms
    first = sm * (total // num_sms) + ((sm - num_sms + more).clamp(min=0) if extra_last else sm.clamp(max=more))
    row = torch.searchsorted(ends, first, right=True)
    begins = torch.cat([ends.new_zeros(1), ends])
    return torch.stack([row, first - begins[row]], 1).to(torch.int32)
