"""Whether an imported sglang has what its release should have."""

import inspect

from sglang_nsa_fused.releases import Release

# Of the newest release's metadata. One that is added later is something to refresh that nothing here knows.
NEWEST_FIELDS = frozenset(
    (
        "cache_seqlens_int32 cu_seqlens_k cu_seqlens_q dsa_cache_seqlens_int32 dsa_cu_seqlens_k dsa_cu_seqlens_q "
        "dsa_extend_seq_lens_list dsa_max_seqlen_q dsa_seqlens_expanded flashmla_metadata indexer_k_start_end "
        "indexer_logical_page_table indexer_seq_lens indexer_seq_lens_cpu kpool_extend_plan kpool_write_plan max_seq_len_k "
        "max_seq_len_q page_size page_table_1 page_table_1_flattened paged_mqa_ctx_lens_2d paged_mqa_schedule_metadata "
        "pooled_cache_seqlens_int32 pooled_index_kpool pooled_paged_mqa_schedule_metadata pooled_real_page_table "
        "pooled_topk_v2_plan real_page_table seq_lens_sum token_to_batch_idx topk_indices_offset topk_v2_plan"
    ).split()
)


def unknown_names(release: Release, module) -> list[str]:
    """What the backend module of an sglang newer than all known has otherwise, where `missing_names` finds nothing: fields
    that nobody here would refresh, and attributes of the backend that its constructor no longer sets."""
    fields = getattr(module, release.metadata).__dataclass_fields__.keys()
    constructors = [vars(base).get("__init__") for base in getattr(module, release.backend).__mro__]
    named = {name for init in constructors if hasattr(init, "__code__") for name in init.__code__.co_names}
    read = (
        release.page_size,
        release.req_to_token,
        release.draft_tokens,
        release.index_topk,
        release.decode_impl,
        release.kpool,
        release.flashmla_heads,
        release.kv_shard_pool,
    )
    added = [f"{release.metadata}.{name} is new" for name in sorted(fields - NEWEST_FIELDS)]
    return added + [f"{release.backend}.{name} is gone" for name in read if name and name not in named]


def missing_names(release: Release, module) -> list[str]:
    """What this release should have and the imported backend module lacks or declares otherwise."""
    missing = [lacks for path, parameters in release.signatures.items() if (lacks := lacking(module, path, parameters))]
    fields = getattr(getattr(module, release.metadata, None), "__dataclass_fields__", {})
    optional = (release.captured_lens_2d, release.topk_v2_plan)
    missing += [f"{release.metadata}.{name}" for name in (*release.captured, *optional) if name and name not in fields]
    return missing


def lacking(owner, path: str, parameters: tuple[str, ...]) -> str | None:
    """The path, where owner has nothing there; with the parameters, where it takes others; None where it is as it should be."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    if owner is None:
        return path
    return None if tuple(inspect.signature(owner).parameters) == parameters else f"{path}({', '.join(parameters)})"
