"""With speculation sglang fills a mask that DSA's verify does not read, a column for each token of the context, in each step.

Needs sglang, 0.5.17 to 0.5.23. Calls build_eagle_verify_input, the end of each draft, for a batch whose lengths are on the GPU
alone, as with the overlap scheduler: with DSA's backend as it is, and as if it had the mask of DeepSeek-V4's. On a GPU it
times both. Without one nothing is computed: the tensors are on torch's meta device.
"""

import importlib
import sys
import types
from types import SimpleNamespace

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "meta"
REQUESTS, LENGTH = 64, 512
MODELS = {"GLM-5.2": (1_048_576, 6), "DeepSeek-V3.2": (163_840, 4)}  # context, draft tokens


class Draft:
    """What a draft of 64 requests hands over."""

    def __init__(self, worker, context: int, draft_tokens: int):
        self.worker, self.context, self.draft_tokens, steps = worker, context, draft_tokens, draft_tokens - 1
        self.batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_idle=lambda: False),
            seq_lens=torch.full((REQUESTS,), LENGTH, device=DEVICE),
            seq_lens_sum=None,  # with the overlap scheduler nobody knows it on the host
            req_pool_indices=torch.arange(REQUESTS, device=DEVICE),
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(REQUESTS, context, dtype=torch.int32, device=DEVICE)),
            multimodal_inputs=[None] * REQUESTS,
        )
        ids = torch.zeros(REQUESTS, steps, dtype=torch.int64, device=DEVICE)
        parents, scores = (torch.arange(first, first + steps, device=DEVICE).repeat(REQUESTS, 1) for first in (-1, 0))  # a chain
        bonus = torch.zeros(REQUESTS, dtype=torch.int64, device=DEVICE)
        self.tensors = SimpleNamespace(bonus_tokens=bonus), parents, scores, ids, None

    def verify_input(self, backend):
        backend.max_context_len = self.context
        runner = SimpleNamespace(attn_backend=backend, model_config=SimpleNamespace(model_is_mrope=False))
        return self.worker.build_eagle_verify_input(
            self.batch,
            *self.tensors,
            target_worker=SimpleNamespace(model_runner=runner),
            topk=1,
            num_steps=self.draft_tokens - 1,
            num_draft_tokens=self.draft_tokens,
            tree_mask_mode=self.worker.TreeMaskMode.FULL_MASK,
            device=DEVICE,
        )


def time(draft: Draft, backend) -> float:
    """us, median of 20."""
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        draft.verify_input(backend)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return sorted(times[5:])[10]


def imported():
    """sglang's module of the worker."""
    if not GPU:  # torchvision registers shape functions for operators that it may lack here
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("none"))
    worker = importlib.import_module("sglang.srt.speculative.eagle_worker_common")
    if not GPU:
        utils = importlib.import_module("sglang.srt.speculative.eagle_utils")
        for name in ("build_tree_kernel_efficient_func", "sgl_build_tree_kernel_efficient"):  # the latter up to 0.5.22
            setattr(utils, name, lambda *args: None)
    return worker


def main() -> None:
    worker = imported()
    dsa = importlib.import_module("sglang.srt.layers.attention.dsa_backend").DeepseekSparseAttnBackend
    mask = importlib.import_module("sglang.srt.layers.attention.verify_mask")
    import sglang

    print(f"sglang {sglang.__version__}, {torch.cuda.get_device_name() if GPU else 'no GPU'}; batch {REQUESTS}")
    for name, (context, draft_tokens) in MODELS.items():
        draft = Draft(worker, context, draft_tokens)
        compact = mask.maybe_create_verify_mask(
            is_draft_runner=False,
            skip_prefill=False,
            max_bs=REQUESTS,
            max_context_len=context,
            num_draft_tokens=draft_tokens,
            device=DEVICE,
            is_read=False,
        )
        # The property of the backend's class is what is asked.
        as_v4 = type("WithMask", (dsa,), {"verify_mask": compact, "__init__": lambda self: None})
        found = []
        for how, backend in (("as it is", object.__new__(dsa)), ("as DeepSeek-V4's", as_v4())):
            size = draft.verify_input(backend).custom_mask.numel()
            taken = f" ({time(draft, backend):.0f} us)" if GPU else ""
            found.append(f"{size:,} bytes {how}{taken}")
        print(f"{name}, context {context:,}, {draft_tokens} draft tokens: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
