"""What a token takes in the KV cache of a GPU, as sglang 0.5.23 sizes its pools."""

from typing import NamedTuple

LATENT, ROPE, INDEX_KEY = 512, 64, 128  # kv_lora_rank, qk_rope_head_dim, index_head_dim, of both models
BLOCK = 128  # values that share a float32 scale


class Model(NamedTuple):
    name: str
    context: int
    draft_tokens: int  # of its recipe
    layers: int
    indexers: int  # layers with an indexer: the others take the top-k of one before, and have no index keys


# Besides, each has one draft layer, with an indexer. GLM-5.2: index_topk_freq 4, index_skip_topk_offset 3.
MODELS = (
    Model("DeepSeek-V3.2", context=163_840, draft_tokens=4, layers=61, indexers=61),
    Model("GLM-5.2", context=1_048_576, draft_tokens=6, layers=78, indexers=21),
)
# Bytes in a layer, as calculate_mla_kv_cache_dim has them; in an fp8 cache the rope part stays bf16.
LAYER = {"bf16": 2 * (LATENT + ROPE), "fp8": LATENT + LATENT // BLOCK * 4 + 2 * ROPE}
INDEXER = INDEX_KEY + INDEX_KEY // BLOCK * 4  # in either cache, as _compute_dsa_indexer_cell_size has it


def bytes_per_token(model: Model, cache: str) -> int:
    """cache: bf16 or fp8. The same on each GPU of a tensor-parallel group: the latent is not split."""
    return (model.layers + 1) * LAYER[cache] + (model.indexers + 1) * INDEXER
