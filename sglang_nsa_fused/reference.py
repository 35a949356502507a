"""The copy from plain torch operations: the fallback without the kernel, and the oracle of the tests."""

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


def copy_plan(mode, destinations):
    """A function (10 sources, bs, max_len, max_seqlen_k, seqlens_expanded_size) that copies to these destinations."""

    def replay(*args):
        copy(mode, args[:10], destinations, *args[10:])

    return replay
