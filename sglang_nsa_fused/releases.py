"""What differs between sglang releases, as data."""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Release:
    """One form of upstream's metadata path.

    `precomputed` and `captured` name the attributes of upstream's PrecomputedMetadata (what a replay copies from) and
    NSAMetadata (what the graph reads), in the order of the first seven parameters of fused_metadata_copy_cuda.
    """

    versions: tuple[str, ...]
    module: str  # holds both classes
    backend: str
    multi_step: str
    names: str  # what the names of fields begin with, "nsa" or "dsa"
    precomputed: tuple[str, ...]
    captured: tuple[str, ...]
    metadata: str  # class of what the graph reads
    captured_lens_2d: str | None  # its attribute with the lengths that DeepGEMM's schedule was made of
    context_lens_2d: str | None  # the function that makes that form, [rows, 1]; None: the schedule takes lengths [rows]
    topk_v2_plan: str | None  # its attribute with the top-k plan, made and refreshed by the backend's next methods
    build_topk_v2_plan: str | None
    refresh_topk_v2_plan: str | None
    # The attribute of the backend that says that its graphs have no wide page table; None: they always have.
    drop_wide_table: str | None
    # Functions of the module that give DeepGEMM's functions get_paged_mqa_logits_metadata and get_num_sms, or what stands
    # in for them there; None: DeepGEMM's own.
    schedule_function: str | None
    num_sms: str | None
    # The module whose Indexer gives DeepGEMM as many rows at a time as there are SMs; None: it gives all.
    indexer: str | None
    # The module with maybe_create_verify_mask: a backend may say that it reads no mask in a verify; None: it may not.
    verify_mask: str | None
    # Attributes of the backend.
    page_size: str
    req_to_token: str
    draft_tokens: str
    index_topk: str
    decode_impl: str
    kpool: str | None  # above 1, pooled metadata follows
    flashmla_heads: str  # what FlashMLA's plan depends on besides the lengths
    kv_shard_pool: str | None  # where there is one, a batch without a graph prepares it
    accepted: str | None  # attribute of a draft extend graph's spec_info: rows of each request; None: all draft tokens
    # The method of the backend that each replay calls first, and all that it sets without a batch. What it sets depends
    # on the server's flags alone, so a replay sets what the capture saw, without the method's imports.
    set_prefill_impl: str
    prefill_impl_state: tuple[str, ...]
    # How a graph runner captures and replays: one method of each class with `in_capture`, or two methods.
    out_graph: bool
    draft_extend: tuple[str, ...]  # forward modes of a draft extend graph; none where upstream captures none
    # Whether the scheduler's next write to req_to_token waits for a draft extend graph, so that it may read it, and not just
    # for what comes before the graph.
    draft_extend_reads: bool
    v2_schedule: bool  # whether a draft extend of DRAFT_EXTEND_V2 has a schedule too
    floor: int  # the least length of a row of a draft extend: padded rows have fewer tokens than they extend by
    draft_schedule: bool  # whether upstream refreshes the schedule for the draft steps
    flags_by_phase: bool  # a server has --cuda-graph-max-bs-decode and --disable-prefill-cuda-graph
    signatures: dict[str, tuple[str, ...]]  # "Class.method" or "function" -> its parameters, for the check at start-up


def _signatures(backend: str, multi_step: str, of_backend: dict, of_multi_step: dict, of_module: dict) -> dict:
    return {
        **{f"{backend}.{name}": parameters for name, parameters in of_backend.items()},
        **{f"{multi_step}.{name}": parameters for name, parameters in of_multi_step.items()},
        **of_module,
    }


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_STATE = {"init_cuda_graph_state": ("self", "max_bs", "max_num_tokens")}
_PRECOMPUTED = {"init_forward_metadata_replay_cuda_graph_from_precomputed": ("self", "bs", "precomputed", "forward_mode")}
_PRECOMPUTE = ("self", "bs", "req_pool_indices", "seq_lens", "seq_lens_cpu", "forward_mode")
_CAPTURE = ("self", "bs", "num_tokens", "req_pool_indices", "seq_lens", "encoder_lens", "forward_mode", "spec_info")
_REPLAY = _names("self bs req_pool_indices seq_lens seq_lens_sum encoder_lens forward_mode spec_info seq_lens_cpu out_cache_loc")
_OUT_GRAPH = {
    "init_forward_metadata_out_graph": ("self", "forward_batch", "in_capture"),
    "init_forward_metadata_in_graph": ("self", "forward_batch"),
}
_APPLY = _names("self bs req_pool_indices seq_lens seq_lens_cpu forward_mode spec_info out_cache_loc actual_forward_mode")
_BUILD = ("self", "bs", "num_tokens", *_APPLY[2:])

_NSA_CLASSES = ("NativeSparseAttnBackend", "NativeSparseAttnMultiStepBackend")
_DSA_CLASSES = ("DeepseekSparseAttnBackend", "DeepseekSparseAttnMultiStepBackend")


def _nsa_signatures(replay: tuple, of_module: dict) -> dict:
    return _signatures(
        *_NSA_CLASSES,
        {
            **_STATE,
            **_PRECOMPUTED,
            "init_forward_metadata_capture_cuda_graph": _CAPTURE,
            "init_forward_metadata_replay_cuda_graph": replay,
            "_precompute_replay_metadata": (*_PRECOMPUTE, "spec_info"),
            "init_forward_metadata": ("self", "forward_batch"),
            "get_device_int32_arange": ("self", "l"),
            "set_nsa_prefill_impl": ("self", "forward_batch"),
            "_compute_flashmla_metadata": ("self", "cache_seqlens", "seq_len_q"),
        },
        {
            **_STATE,
            "init_forward_metadata_capture_cuda_graph": ("self", "forward_batch"),
            "init_forward_metadata_replay_cuda_graph": ("self", "forward_batch", "bs"),
        },
        of_module,
    )


def _dsa_signatures(precompute: tuple, arange: str, more: dict) -> dict:
    return _signatures(
        *_DSA_CLASSES,
        {
            **_STATE,
            **_PRECOMPUTED,
            **_OUT_GRAPH,
            "_build_forward_metadata_cuda_graph": _BUILD,
            "_apply_cuda_graph_metadata": _APPLY,
            "_precompute_replay_metadata": precompute,
            "_build_paged_mqa_schedule_2d_ctx_lens": _names("self forward_mode cache_seqlens_int32 seqlens_expanded batch_size"),
            "init_forward_metadata": ("self", "forward_batch"),
            "get_device_int32_arange": ("self", arange),
            "set_dsa_prefill_impl": ("self", "forward_batch"),
            "_compute_flashmla_metadata": ("self", "cache_seqlens", "seq_len_q"),
            **more,
        },
        {**_STATE, **_OUT_GRAPH},
        {"_to_2d_context_lens": ("seqlens_32", "batch_size")},
    )


NSA_0_5_7 = Release(
    versions=("0.5.7", "0.5.8", "0.5.8.post1", "0.5.9", "0.5.10", "0.5.10.post1"),
    module="sglang.srt.layers.attention.nsa_backend",
    backend=_NSA_CLASSES[0],
    multi_step=_NSA_CLASSES[1],
    names="nsa",
    precomputed=_names(
        "cache_seqlens cu_seqlens_k page_indices nsa_cache_seqlens seqlens_expanded nsa_cu_seqlens_k real_page_table"
    ),
    captured=_names(
        "cache_seqlens_int32 cu_seqlens_k page_table_1 nsa_cache_seqlens_int32 nsa_seqlens_expanded nsa_cu_seqlens_k "
        "real_page_table"
    ),
    metadata="NSAMetadata",
    captured_lens_2d=None,
    context_lens_2d=None,
    topk_v2_plan=None,
    build_topk_v2_plan=None,
    refresh_topk_v2_plan=None,
    drop_wide_table=None,
    schedule_function=None,
    num_sms=None,
    indexer=None,
    verify_mask=None,
    page_size="real_page_size",
    req_to_token="req_to_token",
    draft_tokens="speculative_num_draft_tokens",
    index_topk="nsa_index_topk",
    decode_impl="nsa_decode_impl",
    kpool=None,
    flashmla_heads="num_q_heads",
    kv_shard_pool=None,
    accepted="accept_length",
    set_prefill_impl="set_nsa_prefill_impl",
    prefill_impl_state=("use_mha", "nsa_prefill_impl"),
    out_graph=False,
    draft_extend=("DRAFT_EXTEND", "DRAFT_EXTEND_V2"),
    draft_extend_reads=False,
    v2_schedule=False,
    floor=-(1 << 31),
    draft_schedule=False,
    flags_by_phase=False,
    signatures=_nsa_signatures(_REPLAY, {}),
)
NSA_0_5_11 = replace(NSA_0_5_7, versions=("0.5.11",), accepted="num_accepted_tokens", flashmla_heads="flashmla_kv_num_q_heads")
NSA_0_5_12 = replace(
    NSA_0_5_11,
    versions=("0.5.12", "0.5.12.post1"),
    context_lens_2d="_to_2d_context_lens",
    accepted="num_accept_tokens",
    draft_schedule=True,
    v2_schedule=True,
    signatures=_nsa_signatures((*_REPLAY, "actual_forward_mode"), {"_to_2d_context_lens": ("seqlens_32", "batch_size")}),
)
DSA_0_5_13 = replace(
    NSA_0_5_12,
    versions=("0.5.13", "0.5.13.post1"),
    module="sglang.srt.layers.attention.dsa_backend",
    backend=_DSA_CLASSES[0],
    multi_step=_DSA_CLASSES[1],
    names="dsa",
    precomputed=tuple(name.replace("nsa_", "dsa_") for name in NSA_0_5_7.precomputed),
    captured=tuple(name.replace("nsa_", "dsa_") for name in NSA_0_5_7.captured),
    metadata="DSAMetadata",
    captured_lens_2d="paged_mqa_ctx_lens_2d",
    index_topk="dsa_index_topk",
    decode_impl="dsa_decode_impl",
    set_prefill_impl="set_dsa_prefill_impl",
    prefill_impl_state=("use_mha", "dsa_prefill_impl"),
    out_graph=True,
    draft_extend=(),
    signatures=_dsa_signatures((*_PRECOMPUTE, "spec_info"), "l", {}),
)
DSA_0_5_14 = replace(
    DSA_0_5_13,
    versions=("0.5.14",),
    flags_by_phase=True,
    signatures=_dsa_signatures(_PRECOMPUTE, "length", {}),
)
_REFRESH = {
    "_refresh_paged_mqa_schedule_metadata": ("self", "metadata", "seqlens_32_2d"),
    "_refresh_topk_v2_plan": ("self", "metadata"),
    "_build_topk_v2_plan": ("self", "seqlens_expanded"),
    "_graph_page_table_width": ("self", "metadata"),
}
DSA_0_5_15 = replace(
    DSA_0_5_14,
    versions=("0.5.15", "0.5.15.post1", "0.5.16"),
    draft_extend=("DRAFT_EXTEND_V2",),
    accepted=None,
    floor=0,
    topk_v2_plan="topk_v2_plan",
    build_topk_v2_plan="_build_topk_v2_plan",
    refresh_topk_v2_plan="_refresh_topk_v2_plan",
    drop_wide_table="dsa_drop_wide_page_table",
    signatures=_dsa_signatures(_PRECOMPUTE, "length", _REFRESH),
)
VERIFY_MASK = _names("is_draft_runner skip_prefill max_bs max_context_len num_draft_tokens device is_read dtype")
DSA_0_5_17 = replace(DSA_0_5_15, versions=("0.5.17", "0.5.18", "0.5.19"), verify_mask="sglang.srt.layers.attention.verify_mask")
_KPOOL = {
    "_copy_base_replay_buffers": ("self", "bs", "metadata", "precomputed", "forward_mode"),
    "_update_kpool_metadata_from_precomputed": ("self", "metadata", "precomputed", "forward_mode"),
    "_update_kpool_metadata_replay": _names("self metadata seq_lens req_pool_indices forward_mode effective_n_per_batch"),
}
DSA_0_5_20 = replace(
    DSA_0_5_17,
    versions=("0.5.20", "0.5.21"),
    kpool="dsa_index_kpool",
    indexer="sglang.srt.layers.attention.dsa.dsa_indexer",
    signatures=_dsa_signatures(_PRECOMPUTE, "length", {**_REFRESH, **_KPOOL}),
)
DSA_0_5_22 = replace(
    DSA_0_5_20,
    versions=("0.5.22",),
    draft_extend_reads=True,
    page_size="physical_page_size",
    schedule_function="resolve_paged_mqa_logits_metadata_fn",
    num_sms="resolve_num_sms",
    signatures={**DSA_0_5_20.signatures, "resolve_paged_mqa_logits_metadata_fn": (), "resolve_num_sms": ()},
)
DSA_0_5_23 = replace(DSA_0_5_22, versions=("0.5.23",), kv_shard_pool="_kv_shard_pool")

RELEASES = (
    NSA_0_5_7,
    NSA_0_5_11,
    NSA_0_5_12,
    DSA_0_5_13,
    DSA_0_5_14,
    DSA_0_5_15,
    DSA_0_5_17,
    DSA_0_5_20,
    DSA_0_5_22,
    DSA_0_5_23,
)


def find(version: str) -> Release | None:
    """The release with this version of sglang, with or without a local suffix as in +cu129; None: it is not supported."""
    return next((release for release in RELEASES if version.partition("+")[0] in release.versions), None)


def newest(version: str) -> Release | None:
    """The newest known release for a version that is newer than it, else None. A pre-release comes before its release."""
    last = _numbers(RELEASES[-1].versions[-1])
    older = _numbers(version) < last or (_numbers(version) == last and re.search(r"dev|rc|a\d|b\d", version.partition("+")[0]))
    return None if older else RELEASES[-1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def supported_versions() -> str:
    return f"{RELEASES[0].versions[0]} to {RELEASES[-1].versions[-1]}"
