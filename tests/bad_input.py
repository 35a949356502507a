"""Ways to spoil the 23 arguments of fused_metadata_copy_cuda, and what each should raise."""

from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY

SRC, DST = 0, 9  # where sources and destinations start among the 23 arguments
LENGTHS, CU, TABLE, NSA, EXPANDED, NSA_CU, PAGES, SPLITS, TILES = range(9)
MODE, BS, MAX_LEN, MAX_SEQLEN_K, SIZE = range(18, 23)


def change(at, new):
    """new: a value, or a function of the argument and all arguments."""

    def apply(args):
        args[at] = new(args[at], args) if callable(new) else new

    return apply


BAD = [
    (DECODE, change(SRC + LENGTHS, lambda t, _: t.long()), TypeError, "cache_seqlens_src: expected dtype int32, got int64"),
    (DECODE, change(DST + TABLE, lambda t, _: t.float()), TypeError, "page_table_1_dst: expected dtype int32, got float32"),
    (DECODE, change(SRC + CU, [1, 2]), TypeError, "cu_seqlens_k_src: expected an int32 tensor, got ffi.Array"),
    (DECODE, change(SRC + CU, None), ValueError, "cu_seqlens_k_src: expected an int32 tensor.*got None"),
    (DECODE, change(DST + NSA, None), ValueError, "nsa_cache_seqlens_dst: expected an int32 tensor, got None"),
    (DECODE, change(DST + PAGES, None), ValueError, "real_page_table_dst: .* its source is given, got None"),
    (DECODE, change(SRC + PAGES, None), ValueError, "real_page_table_src: .* its destination is given, got None"),
    (DECODE, change(SRC + SPLITS, None), ValueError, "flashmla_num_splits_src: .*got None"),
    (DECODE, change(DST + TILES, None), ValueError, "flashmla_metadata_dst: .*got None"),
    (DECODE, change(SRC + LENGTHS, lambda t, _: t[:-1]), ValueError, r"cache_seqlens_src: .* at least \[3\], got \[2\]"),
    (DECODE, change(SRC + CU, lambda t, _: t[:-1]), ValueError, r"cu_seqlens_k_src: .* at least \[4\], got \[3\]"),
    (DECODE, change(SRC + TABLE, lambda t, _: t[:-1]), ValueError, r"page_indices_src: .* at least \[3, 65\], got \[2, 65\]"),
    (DECODE, change(SRC + TABLE, lambda t, _: t[:, :64]), ValueError, r"page_indices_src: .*\[3, 65\], got \[3, 64\]"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:, :64]), ValueError, r"page_table_1_dst: .*\[3, 65\], got \[3, 64\]"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:2]), ValueError, r"page_table_1_dst: .*\[3, 65\], got \[2, 65\]"),
    (DECODE, change(DST + PAGES, lambda t, _: t[:, :1]), ValueError, r"real_page_table_dst: .*\[3, 2\], got \[3, 1\]"),
    (DECODE, change(DST + NSA_CU, lambda t, _: t[1:]), ValueError, r"nsa_cu_seqlens_k_dst: .*\[4\], got \[3\]"),
    (DECODE, change(SRC + SPLITS, lambda t, _: t[1:]), ValueError, r"flashmla_num_splits_src: .*\[4\], got \[3\]"),
    (DECODE, change(DST + TILES, lambda t, _: t[1:]), ValueError, r"flashmla_metadata_dst: .*\[1056\], got \[1048\]"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:, ::2]), ValueError, "page_table_1_dst: expected last stride 1, got 2"),
    (DECODE, change(SRC + NSA, lambda t, _: t.repeat(2)[::2]), ValueError, "nsa_cache_seqlens_src: expected last stride 1"),
    (DECODE, change(SRC + TILES, lambda t, _: t.t()), ValueError, "flashmla_metadata_src: expected a contiguous tensor"),
    (DECODE, change(SRC + TABLE, lambda t, _: t.flatten()), ValueError, r"page_indices_src: expected 2 dimensions, got 1"),
    (DECODE, change(DST + CU, lambda t, _: t.view(2, 2)), ValueError, "cu_seqlens_k_dst: expected 1 dimension"),
    (DECODE, change(DST + TABLE, lambda t, _: t[:1].expand(3, -1)), ValueError, "page_table_1_dst: expected rows apart"),
    (DECODE, change(DST + NSA, lambda _, a: a[DST + LENGTHS]), ValueError, "nsa_cache_seqlens_dst: .*overlaps cache_seqlens_dst"),
    (DECODE, change(DST + LENGTHS, lambda _, a: a[DST + TABLE][1, 2:5]), ValueError, "overlaps"),
    (DECODE, change(SRC + NSA, lambda _, a: a[DST + LENGTHS]), ValueError, "nsa_cache_seqlens_src: .*overlaps cache_seqlens_dst"),
    (DECODE, change(MODE, 3), ValueError, "forward_mode: expected 0 .decode., 1 .target verify. or 2 .draft extend., got 3"),
    (DECODE, change(MODE, "decode"), TypeError, "forward_mode: expected an integer"),
    (DECODE, change(BS, -1), ValueError, "bs: expected 0 or more, got -1"),
    (DECODE, change(BS, 4), ValueError, "seqlens_expanded_size: expected bs = 4 in decode, got 3"),
    (DECODE, change(MAX_LEN, -1), ValueError, "max_len: expected 0 or more, got -1"),
    (DECODE, change(MAX_LEN, 66), ValueError, r"page_indices_src: .*\[3, 66\], got \[3, 65\]"),
    (DECODE, change(MAX_LEN, 2**40), ValueError, "page_indices_src"),
    (DECODE, change(SIZE, 2), ValueError, "seqlens_expanded_size: expected bs = 3 in decode, got 2"),
    (TARGET_VERIFY, change(SIZE, 8), ValueError, "seqlens_expanded_size: expected a multiple of bs = 3 in target verify, got 8"),
    (TARGET_VERIFY, change(SIZE, -3), ValueError, "seqlens_expanded_size: expected 0 or more, got -3"),
    (TARGET_VERIFY, change(SIZE, 12), ValueError, r"page_indices_src: .*\[12, 65\], got \[9, 65\]"),
    (TARGET_VERIFY, change(MAX_SEQLEN_K, -1), ValueError, "max_seqlen_k: expected 0 or more, got -1"),
    (TARGET_VERIFY, change(SRC + EXPANDED, None), ValueError, "seqlens_expanded_src: expected an int32 tensor"),
    (
        TARGET_VERIFY,
        change(DST + EXPANDED, lambda _, a: a[DST + NSA]),
        ValueError,
        "seqlens_expanded_dst: .*overlaps|nsa_cache_seqlens_dst: .*overlaps",
    ),
    (DRAFT_EXTEND, change(DST + EXPANDED, lambda t, _: t[:7]), ValueError, r"seqlens_expanded_dst: .*\[8\], got \[7\]"),
]
