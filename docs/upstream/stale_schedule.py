"""Above three draft steps sglang replays the draft steps' CUDA graph with the DeepGEMM schedule and top-k plan of its capture.

Needs sglang, 0.5.12 to 0.5.23. Builds its multi-step backend without a model, captures as its graph runner does, with requests
of 1 token, and replays with long ones. Then compares what the captured graph would read with what DeepGEMM and sglang's own
planner of the top-k give for these lengths. Without a GPU stand-ins take the place of both: their "plan" is the lengths.
"""

import importlib
import sys
import types
from types import SimpleNamespace

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTH, STEPS, PAGE, TOPK = 131_072, 5, 64, 2048
WIDTH = LENGTH + 1024  # tokens in a row of the request pool: whole pages
TOPK_MODULES = ("sglang.jit_kernel.dsv4.topk", "sglang.kernels.ops.attention.dsv4.topk")


def module(*names):
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:  # of another release
            pass


def stand_in_for_a_gpu(backend) -> None:
    def copy(*args):  # 9 tensors and where they go; or 8, and three times 8
        n, end = (9, 18) if len(args) == 23 else (8, 32)
        for number, destination in enumerate(args[n:end]):
            if (source := args[number % n]) is not None:
                destination[tuple(map(slice, source.shape))].copy_(source)

    deep_gemm, copies = types.ModuleType("deep_gemm"), types.ModuleType("fused_metadata_copy")
    deep_gemm.get_paged_mqa_logits_metadata = lambda lengths, page, num_sms: lengths.clone()
    deep_gemm.get_num_sms = lambda: 132
    copies.fused_metadata_copy_cuda = copies.fused_metadata_copy_multi_cuda = copy
    for folder in ("jit_kernel", "kernels.ops.attention", "kernels.ops.attention.dsa"):
        sys.modules[f"sglang.{folder}.fused_metadata_copy"] = copies
    sys.modules["deep_gemm"] = backend.deep_gemm = deep_gemm
    backend.is_cuda = lambda: True
    if module(*TOPK_MODULES):
        module(*TOPK_MODULES).plan_topk_v2 = torch.clone


def step_backend(backend, cls, pool):
    """With what the metadata path reads in any of these releases, and nothing else."""
    one, no, topk_backend = object.__new__(cls), lambda: False, getattr(backend, "DSATopKBackend", None)
    for n in ("nsa", "dsa"):
        of_name = {"index_topk": TOPK, "decode_impl": "fa3", "prefill_impl": "fa3", "kv_cache_store_fp8": False, "index_kpool": 1}
        vars(one).update({f"{n}_{name}": value for name, value in of_name.items()})
    one.device, one.req_to_token, one.max_context_len, one.speculative_num_draft_tokens = DEVICE, pool, WIDTH - 16, STEPS + 1
    one.real_page_size, one.physical_page_size, one.num_q_heads = PAGE, PAGE, 128
    one.use_mha, one.enable_auto_select_prefill_impl, one.hisparse_coordinator, one.use_fused_topk = False, False, None, True
    one._arange_buf, one._get_device_sm, one._multi_ctas_kv_counter_buffer = (
        torch.arange(16384).int().to(DEVICE),
        lambda: 90,
        None,
    )
    one._is_blackwell = one._is_in_breakable_cuda_graph = one._is_in_tc_piecewise_cuda_graph = no
    one._memory_saver_adapter = SimpleNamespace(region=lambda tag: torch.no_grad())
    one.dsa_topk_backend = topk_backend and topk_backend.SGL_KERNEL
    getattr(one, "_init_kpool_metadata_fusion", no)()
    return one


def replayed(backend, bs: int) -> list:
    """The step backends after a capture with requests of 1 token and a replay with requests of LENGTH."""
    name = "DeepseekSparseAttn" if hasattr(backend, "DSAMetadata") else "NativeSparseAttn"
    multi, cls = object.__new__(getattr(backend, f"{name}MultiStepBackend")), getattr(backend, f"{name}Backend")
    pool = torch.arange(bs * WIDTH, dtype=torch.int32, device=DEVICE).view(bs, WIDTH)
    multi.topk, multi.speculative_num_steps = 1, STEPS
    multi.attn_backends = [step_backend(backend, cls, pool) for _ in range(STEPS - 1)]
    multi.init_cuda_graph_state(bs, bs)
    up_to_0_5_12 = hasattr(multi, "init_forward_metadata_capture_cuda_graph")
    lengths = torch.ones(bs, dtype=torch.int32 if up_to_0_5_12 else torch.int64, device=DEVICE)
    batch = SimpleNamespace(batch_size=bs, forward_mode=backend.ForwardMode.DECODE, spec_info=None, seq_lens_sum=None)
    batch.seq_lens, batch.seq_lens_cpu, batch.req_pool_indices = lengths, lengths.cpu(), torch.arange(bs, device=DEVICE)
    if up_to_0_5_12:
        multi.init_forward_metadata_capture_cuda_graph(batch)
    else:
        multi.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = [one.decode_cuda_graph_metadata[bs] for one in multi.attn_backends]
    read = [one.paged_mqa_schedule_metadata.data_ptr() for one in captured]
    batch.seq_lens.fill_(LENGTH), batch.seq_lens_cpu.fill_(LENGTH)
    if up_to_0_5_12:
        multi.init_forward_metadata_replay_cuda_graph(batch, bs)
    else:
        multi.init_forward_metadata_out_graph(batch)
    assert read == [one.paged_mqa_schedule_metadata.data_ptr() for one in captured]
    assert all((one.cache_seqlens_int32 == LENGTH).all() for one in captured)
    return multi.attn_backends


def time_logits(metadata, schedule: torch.Tensor) -> str:
    """Of one call of DeepGEMM as the indexer of DeepSeek-V3.2 makes it, median of 50."""
    import deep_gemm

    bs, pages, times = len(metadata.cache_seqlens_int32), metadata.real_page_table, []
    q = torch.zeros(bs, 1, 64, 128, device=DEVICE).to(torch.float8_e4m3fn)
    cache = torch.zeros(bs * WIDTH // PAGE, PAGE, 1, 132, dtype=torch.uint8, device=DEVICE)
    args = (q, cache, torch.zeros(bs, 64, device=DEVICE), metadata.cache_seqlens_int32.view(-1, 1), pages, schedule)
    for _ in range(60):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        deep_gemm.fp8_paged_mqa_logits(*args, pages.shape[1] * PAGE, clean_logits=False)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return f"logits {sorted(times[10:])[25]:.0f} us"


def check_topk(metadata, plan: torch.Tensor) -> str:
    """In how many rows sglang's top-k of random scores is not torch's."""
    topk, lengths = module(*TOPK_MODULES), metadata.cache_seqlens_int32
    # Normal ones: uniform scores overflow the threshold's bin, which the clusters' kernel then truncates, with any plan.
    scores = torch.randn(len(lengths), WIDTH, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    slots = torch.full((len(lengths), TOPK), -1, dtype=torch.int32, device=DEVICE)
    transform = getattr(topk, "topk_transform_paged_v2", None) or topk.topk_transform_512_v2
    transform(scores, lengths, metadata.real_page_table, slots, PAGE, plan)
    tokens = slots.long() - WIDTH * torch.arange(len(lengths), device=DEVICE).view(-1, 1)
    found = scores.gather(1, tokens.clamp(0, LENGTH - 1)).masked_fill(slots < 0, -torch.inf).sort(descending=True).values
    wrong = (found != scores[:, :LENGTH].topk(TOPK).values).any(1)
    return f"{int(wrong.sum())} of {len(lengths)} rows wrong"


def main() -> None:
    if not GPU:  # torchvision registers shape functions for operators that it may lack here
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("none"))
    backend = module("sglang.srt.layers.attention.dsa_backend") or module("sglang.srt.layers.attention.nsa_backend")
    if not GPU:
        stand_in_for_a_gpu(backend)
    import deep_gemm
    import sglang

    print(f"sglang {sglang.__version__}, {torch.cuda.get_device_name() if GPU else 'no GPU: stand-ins'}")
    print(f"{STEPS} draft steps, captured with requests of 1 token, replayed with {LENGTH:,}")
    for bs in (1, 8, 40):
        lengths = torch.full((bs, 1), LENGTH, dtype=torch.int32, device=DEVICE)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE, deep_gemm.get_num_sms())
        for step, one in enumerate(replayed(backend, bs)):
            metadata = one.decode_cuda_graph_metadata[bs]
            parts = [("schedule", metadata.paged_mqa_schedule_metadata, schedule, time_logits)]
            if bs > 30 and getattr(metadata, "topk_v2_plan", None) is not None:  # smaller batches read no plan
                # Its first row, (threshold, rows): the others come in any order.
                parts.append(("top-k plan", metadata.topk_v2_plan, one._build_topk_v2_plan(lengths.view(-1)), check_topk))
            line = []
            for name, found, fresh, effect in parts:
                rows = slice(None) if name == "schedule" else slice(1)
                seen = f" ({effect(metadata, found)}, with a fresh one {effect(metadata, fresh)})" if GPU else ""
                line.append(f"{name} {'fresh' if torch.equal(found[rows], fresh[rows]) else 'STALE'}{seen}")
            print(f"batch {bs}, step {step}: {'; '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
