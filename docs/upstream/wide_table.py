"""With speculation sglang's DSA graphs keep a page table that nobody reads, a column for each token of the context.

Needs sglang, 0.5.15.post1 to 0.5.23. Calls its own init_cuda_graph_state, as each graph runner of a server does, with the sizes
of GLM-5.2, on torch's meta device, which allocates nothing; once as it is, once with the number of draft tokens hidden from it.
"""

import importlib
import sys
import types
from types import SimpleNamespace

import torch

CONTEXT, REQUESTS, STEPS, DRAFT_TOKENS, PAGE = 1_048_576, 256, 5, 6, 64  # GLM-5.2, graphs up to batch 256
RUNNERS = {  # of the graphs of a server: step backends, rows of each graph
    "target verify": (1, REQUESTS * DRAFT_TOKENS),
    "draft steps": (STEPS - 1, REQUESTS),
    "draft extend": (1, REQUESTS * DRAFT_TOKENS),
}


def tables(backend, rows: int, draft_tokens: int | None) -> dict[str, torch.Tensor | None]:
    """The page tables that a step backend allocates for a graph of so many rows."""
    one = object.__new__(backend.DeepseekSparseAttnBackend)
    # As a server has it: 4 columns and the draft tokens more than the context.
    one.req_to_token = torch.empty(1, CONTEXT + 4 + DRAFT_TOKENS, dtype=torch.int32, device="meta")
    one.device, one.speculative_num_draft_tokens, one.real_page_size, one.physical_page_size = "meta", draft_tokens, PAGE, PAGE
    one.hisparse_coordinator, one.use_fused_topk, one.dsa_index_topk, one.dsa_index_kpool = None, True, 2048, 1
    one.dsa_topk_backend = getattr(backend, "DSATopKBackend", None) and backend.DSATopKBackend.SGL_KERNEL
    one.dsa_decode_impl, one._multi_ctas_kv_counter_buffer, one.num_q_heads = "flashmla_sparse", None, 64
    one._memory_saver_adapter = SimpleNamespace(region=lambda tag: torch.no_grad())
    one.init_cuda_graph_state(REQUESTS, rows)
    return {name: one.decode_cuda_graph_metadata.get(name) for name in ("page_table", "real_page_table")}


def main() -> None:
    if not torch.cuda.is_available():  # torchvision registers shape functions for operators that it may lack here
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("none"))
    backend = importlib.import_module("sglang.srt.layers.attention.dsa_backend")
    import sglang

    backend.is_cuda = lambda: True  # for a machine without a GPU: it is a term of the condition
    print(f"sglang {sglang.__version__}; context {CONTEXT:,}, {DRAFT_TOKENS} draft tokens, graphs up to batch {REQUESTS}")
    totals = [0, 0]
    for runner, (backends, rows) in RUNNERS.items():
        for hidden, draft_tokens in enumerate((DRAFT_TOKENS, None)):
            found = {name: table for name, table in tables(backend, rows, draft_tokens).items() if table is not None}
            size = backends * sum(table.numel() * table.element_size() for table in found.values())
            totals[hidden] += size
            shapes = ", ".join(f"{name} {list(table.shape)}" for name, table in found.items())
            how = "speculation hidden" if hidden else "as it is"
            print(f"{runner}, {how}: {backends} x {shapes} of int32 = {size / 1e9:.2f} GB")
    print(f"together: {totals[0] / 1e9:.2f} GB as it is, {totals[1] / 1e9:.2f} GB with speculation hidden")


if __name__ == "__main__":
    main()
