"""What differs between sglang releases, as data."""

from dataclasses import dataclass


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
    precomputed: tuple[str, ...]
    captured: tuple[str, ...]
    metadata: str  # class of what the graph reads
    captured_lens_2d: str  # its attribute with DeepGEMM's form of the lengths, which not every release has
    context_lens_2d: str  # the function that makes that form
    # Attributes of the backend.
    page_size: str
    req_to_token: str
    draft_tokens: str
    index_topk: str
    decode_impl: str
    accepted: str  # attribute of a draft extend's spec_info: rows of each request
    # The method of the backend that each replay calls first, and all that it sets without a batch. What it sets depends
    # on the server's flags alone, so a replay sets what the capture saw, without the method's imports.
    set_prefill_impl: str
    prefill_impl_state: tuple[str, ...]
    signatures: dict[str, tuple[str, ...]]  # "Class.method" or "function" -> its parameters, for the check at start-up


NSA = Release(
    versions=("0.5.12", "0.5.12.post1"),
    module="sglang.srt.layers.attention.nsa_backend",
    backend="NativeSparseAttnBackend",
    multi_step="NativeSparseAttnMultiStepBackend",
    precomputed=(
        "cache_seqlens",
        "cu_seqlens_k",
        "page_indices",
        "nsa_cache_seqlens",
        "seqlens_expanded",
        "nsa_cu_seqlens_k",
        "real_page_table",
    ),
    captured=(
        "cache_seqlens_int32",
        "cu_seqlens_k",
        "page_table_1",
        "nsa_cache_seqlens_int32",
        "nsa_seqlens_expanded",
        "nsa_cu_seqlens_k",
        "real_page_table",
    ),
    metadata="NSAMetadata",
    captured_lens_2d="paged_mqa_ctx_lens_2d",
    context_lens_2d="_to_2d_context_lens",
    page_size="real_page_size",
    req_to_token="req_to_token",
    draft_tokens="speculative_num_draft_tokens",
    index_topk="nsa_index_topk",
    decode_impl="nsa_decode_impl",
    accepted="num_accept_tokens",
    set_prefill_impl="set_nsa_prefill_impl",
    prefill_impl_state=("use_mha", "nsa_prefill_impl"),
    signatures={
        "NativeSparseAttnBackend.init_cuda_graph_state": ("self", "max_bs", "max_num_tokens"),
        "NativeSparseAttnBackend.init_forward_metadata_capture_cuda_graph": (
            "self",
            "bs",
            "num_tokens",
            "req_pool_indices",
            "seq_lens",
            "encoder_lens",
            "forward_mode",
            "spec_info",
        ),
        "NativeSparseAttnBackend.init_forward_metadata_replay_cuda_graph_from_precomputed": (
            "self",
            "bs",
            "precomputed",
            "forward_mode",
        ),
        "NativeSparseAttnBackend._precompute_replay_metadata": (
            "self",
            "bs",
            "req_pool_indices",
            "seq_lens",
            "seq_lens_cpu",
            "forward_mode",
            "spec_info",
        ),
        "NativeSparseAttnBackend.init_forward_metadata_replay_cuda_graph": (
            "self",
            "bs",
            "req_pool_indices",
            "seq_lens",
            "seq_lens_sum",
            "encoder_lens",
            "forward_mode",
            "spec_info",
            "seq_lens_cpu",
            "out_cache_loc",
            "actual_forward_mode",
        ),
        "NativeSparseAttnBackend.init_forward_metadata": ("self", "forward_batch"),
        "NativeSparseAttnBackend.get_device_int32_arange": ("self", "l"),
        "NativeSparseAttnBackend._compute_flashmla_metadata": ("self", "cache_seqlens", "seq_len_q"),
        "NativeSparseAttnBackend.set_nsa_prefill_impl": ("self", "forward_batch"),
        "NativeSparseAttnMultiStepBackend.init_cuda_graph_state": ("self", "max_bs", "max_num_tokens"),
        "NativeSparseAttnMultiStepBackend.init_forward_metadata_capture_cuda_graph": ("self", "forward_batch"),
        "NativeSparseAttnMultiStepBackend.init_forward_metadata_replay_cuda_graph": ("self", "forward_batch", "bs"),
        "_to_2d_context_lens": ("seqlens_32", "batch_size"),
    },
)

RELEASES = (NSA,)


def find(version: str) -> Release | None:
    """The release with this version of sglang, or None where it is not supported."""
    return next((release for release in RELEASES if version in release.versions), None)


def supported_versions() -> str:
    return ", ".join(version for release in RELEASES for version in release.versions)


def missing_names(release: Release, module) -> list[str]:
    """What this release should have and the imported backend module lacks or declares otherwise."""
    import inspect

    missing = []
    for path, parameters in release.signatures.items():
        target = module
        for name in path.split("."):
            target = getattr(target, name, None)
        if target is None:
            missing.append(path)
        elif tuple(inspect.signature(target).parameters) != parameters:
            missing.append(f"{path}({', '.join(parameters)})")
    return missing
