"""A verify of more rows than the GPU has SMs gets its indexer logits in pieces, and sglang copies them together.

Needs sglang, 0.5.20 to 0.5.23. Calls the indexer's own _get_topk_paged without a model, with the sizes of a target verify of
64 requests: as it is, and as if the GPU had as many SMs as there are rows, so that DeepGEMM is called once. On a GPU it times
both and compares the logits. Without one nothing is computed: the tensors are on torch's meta device.
"""

import importlib
import sys
import types
from types import SimpleNamespace

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "meta"
REQUESTS, LENGTH, PAGE, SMS = 64, 512, 64, 132
MODELS = {  # context, draft tokens, heads of the indexer, layers with one
    "GLM-5.2": (1_048_576, 6, 32, 21),
    "DeepSeek-V3.2": (163_840, 4, 64, 61),
    "DeepSeek-V3.2, 5 draft steps": (163_840, 6, 64, 61),
}


def stand_in_for_a_gpu(indexer) -> None:
    deep_gemm = types.ModuleType("deep_gemm")
    deep_gemm.get_num_sms = lambda: SMS
    deep_gemm.get_paged_mqa_logits_metadata = lambda lengths, page, num_sms: lengths
    deep_gemm.fp8_paged_mqa_logits = lambda q, *args, **kwargs: torch.empty(len(q), args[-1], device=DEVICE)
    sys.modules["deep_gemm"] = indexer.deep_gemm = deep_gemm


class Verify:
    """The indexer of a layer, and what it reads of a target verify."""

    def __init__(self, indexer, context: int, draft_tokens: int, heads: int):
        import deep_gemm

        self.rows, pages = REQUESTS * draft_tokens, LENGTH // PAGE
        keys = torch.randn(REQUESTS * pages, PAGE * 128, device=DEVICE).to(torch.float8_e4m3fn)
        scales = torch.ones(REQUESTS * pages, PAGE, device=DEVICE)
        cache = torch.cat([keys.view(torch.uint8), scales.view(torch.uint8)], 1)
        self.pool = SimpleNamespace(page_size=PAGE, index_page_size=PAGE, get_index_k_with_scale_buffer=lambda layer_id: cache)
        table = torch.zeros(self.rows, context // PAGE, dtype=torch.int32, device=DEVICE)
        own = torch.arange(REQUESTS * pages, dtype=torch.int32, device=DEVICE).view(REQUESTS, pages)
        table[:, :pages] = own.repeat_interleave(draft_tokens, 0)
        lengths = torch.full((self.rows,), LENGTH, dtype=torch.int32, device=DEVICE)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths.view(-1, 1), PAGE, deep_gemm.get_num_sms())
        self.metadata = SimpleNamespace(
            get_page_table_64=lambda: table,
            get_seqlens_expanded=lambda: lengths,
            get_seqlens_int32=lambda: lengths[:REQUESTS],
            get_dsa_extend_len_cpu=lambda: [draft_tokens] * REQUESTS,
            paged_mqa_schedule_metadata=schedule,
            topk_transform=lambda logits, topk: logits,
        )
        mode = SimpleNamespace(is_target_verify=lambda: True, is_draft_extend_v2=lambda: False)
        self.batch = SimpleNamespace(forward_mode=mode)
        self.q = torch.randn(self.rows, heads, 128, device=DEVICE).to(torch.float8_e4m3fn)
        self.weights = torch.randn(self.rows, heads, 1, device=DEVICE)
        self.one = object.__new__(indexer.Indexer)
        no = SimpleNamespace(is_aiter=lambda: False, is_cutedsl=lambda: False)
        vars(self.one).update(paged_mqa_logits_backend=no, n_heads=heads, index_topk=2048, num_init_tokens=0, num_local_tokens=0)

    def logits(self, sm_count: int) -> torch.Tensor:
        vars(self.one)["sm_count"] = sm_count
        return self.one._get_topk_paged(self.batch, 0, self.q, self.weights, self.metadata)


def calls(deep_gemm, verify: Verify, sm_count: int) -> int:
    original, count = deep_gemm.fp8_paged_mqa_logits, []
    deep_gemm.fp8_paged_mqa_logits = lambda *args, **kwargs: count.append(1) or original(*args, **kwargs)
    try:
        verify.logits(sm_count)
    finally:
        deep_gemm.fp8_paged_mqa_logits = original
    return len(count)


def time(verify: Verify, sm_count: int) -> float:
    """us, median of 20."""
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        verify.logits(sm_count)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return sorted(times[5:])[10]


def imported():
    """sglang's module of the indexer, and DeepGEMM."""
    if not GPU:  # torchvision registers shape functions for operators that it may lack here
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("none"))
    indexer = importlib.import_module("sglang.srt.layers.attention.dsa.dsa_indexer")
    if not GPU:
        stand_in_for_a_gpu(indexer)
    import deep_gemm

    if hasattr(indexer, "resolve_fp8_paged_mqa_logits_fn"):  # it remembers the function
        indexer.resolve_fp8_paged_mqa_logits_fn = lambda: deep_gemm.fp8_paged_mqa_logits
    return indexer, deep_gemm


def main() -> None:
    import sglang

    indexer, deep_gemm = imported()
    sms = deep_gemm.get_num_sms()
    print(f"sglang {sglang.__version__}, {torch.cuda.get_device_name() if GPU else 'no GPU: stand-ins'}; {sms} SMs")
    for name, (context, draft_tokens, heads, layers) in MODELS.items():
        verify = Verify(indexer, context, draft_tokens, heads)
        indexer.get_token_to_kv_pool = lambda verify=verify: verify.pool
        size = verify.rows * context * 4 / 1e9
        line = f"{name}, context {context:,}: {verify.rows} rows, {size:.2f} GB of logits; calls of DeepGEMM in a layer:"
        for how, sm_count in (("as it is", sms), ("in one call", verify.rows)):
            seen = f" ({time(verify, sm_count):.0f} us, {layers} layers)" if GPU else ""
            line += f" {calls(deep_gemm, verify, sm_count)} {how}{seen},"
        if GPU:
            found = [verify.logits(sm_count)[:, :LENGTH] for sm_count in (sms, verify.rows)]
            line += f" logits {'the same' if torch.equal(*found) else 'NOT THE SAME'}"
        print(line.rstrip(","), flush=True)


if __name__ == "__main__":
    main()
