"""sglang plugin that benchmarks put in both servers: times each refresh of metadata, upstream's or ours.

It appends JSON lines to the file that SERVER_PROBE_FILE names: "at", when the call began (perf_counter_ns, on Linux one
clock for all processes); "kind", draft, verify or extend; "bs", the batch size; "ns", its duration on the host. Of kind
"draft graph" the duration is the GPU's, of the graph of all draft steps. While a file of that name with ".drafts"
exists, it also appends the draft tokens of each step, since output ids do not tell wrong draft metadata: the target
model corrects it.

SERVER_PROBE_WEIGHTS=decisive gives both servers a model whose tokens survive the rounding of other batch sizes.
"""

import collections
import functools
import importlib
import json
import multiprocessing
import os
import threading
import time

RUNNER = "sglang.srt.speculative.eagle_draft_cuda_graph_runner"
WEIGHTS = "sglang.srt.model_loader.loader.initialize_dummy_weights"
FILE = "SERVER_PROBE_FILE"
PERIOD = 0.5  # seconds between writes

_samples = collections.deque()  # its append and popleft need no lock
_graphs = collections.deque()  # (when, bs, the events before and after)
_keeps_drafts = False


def activate() -> None:
    """Entry point. The hook registry replaces classes before it wraps methods, so this wraps the plugin's method too."""
    # Only the scheduler, a child, replays graphs; a hook in the launcher would import the attention backend there.
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_nsa_fused.plugin import find_release

    release, _ = find_release()
    step, multi_step = f"{release.module}.{release.backend}", f"{release.module}.{release.multi_step}"
    around = {f"{step}.init_forward_metadata": eager}
    if release.out_graph:
        around |= {f"{multi_step}.init_forward_metadata_out_graph": draft_out_graph}
        around |= {f"{step}.init_forward_metadata_out_graph": out_graph}
    else:
        around |= {f"{multi_step}.init_forward_metadata_replay_cuda_graph": draft_replay}
        around |= {f"{step}.init_forward_metadata_replay_cuda_graph": graph_replay}
    runner = f"{RUNNER}.EAGLEDraftCudaGraphRunner"
    if hasattr(importlib.import_module(RUNNER).EAGLEDraftCudaGraphRunner, "execute"):
        around |= {f"{runner}._replay_graph": draft_graph, f"{runner}.execute": drafts}
    else:  # up to 0.5.13
        around |= {f"{runner}._replay": draft_graph, f"{runner}.replay": drafts}
    for target, hook in around.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    weights = decisive_weights if os.environ.get("SERVER_PROBE_WEIGHTS") == "decisive" else random_weights
    HookRegistry.register(WEIGHTS, weights, HookType.REPLACE)


def random_weights(model, *args, **kwargs) -> None:
    """Normal with variance 1 / fan-in. Upstream's, uniform within 0.001, leave attention without a say in the output."""
    import torch

    for name, parameter in model.state_dict().items():
        if not torch.is_floating_point(parameter):
            continue
        if parameter.ndim < 2:
            parameter.fill_(0 if name.endswith("bias") else 1)  # norms and scales
        else:
            generator = torch.Generator(parameter.device).manual_seed(sum(name.encode()) + parameter.numel())
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)


def decisive_weights(model, *args, **kwargs) -> None:
    """random_weights, and a best token that is rarely close to the next.

    Of the 129,280 logits of random weights the best two are 0.2 standard deviations apart on average, and rounding, which
    depends on the batch size, moves them by 0.01: two runs soon differ. Here the head knows the embedding of each token t
    as that of the one before t + 1, so t + 1 follows with the same logit each time. Only for JUMPS tokens it also has
    random rows; one of them wins where the rest of the network, attention in particular, makes it large, at a few in a
    hundred tokens. The draft layer sees the embedding too: most drafts are accepted, but not all.
    """
    import torch

    random_weights(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "shard_indices"):
                _decide(module, is_head=name.endswith("head"))
            elif name.endswith(("o_proj", "down_proj")):
                # All ranks have the same shard, so their sum is tp_size times as large.
                module.weight.mul_((ATTENTION if name.endswith("o_proj") else MLP) / module.tp_size)
            elif hasattr(module, "w2_weight"):
                module.w2_weight.mul_(MLP / module.moe_tp_size)
            elif hasattr(module, "e_score_correction_bias"):
                bias = module.e_score_correction_bias  # the same experts for all tokens: no jumps from near ties there
                bias.copy_(torch.arange(len(bias)))
            elif name.endswith("eh_proj"):
                hidden = len(module.weight)
                module.weight.mul_(DRAFT)
                module.weight[:, :hidden].fill_diagonal_(1)


def _decide(module, is_head: bool) -> None:
    import torch

    weight = module.weight
    vocabulary, (rows, hidden) = module.num_embeddings_padded, weight.shape
    generator = torch.Generator(weight.device).manual_seed(1)
    embedding = torch.empty(vocabulary, hidden, dtype=weight.dtype, device=weight.device).normal_(generator=generator)
    if is_head:
        embedding = embedding.roll(1, 0).mul_(NEXT / hidden)
        embedding[:: vocabulary // JUMPS] += torch.empty_like(embedding[:: vocabulary // JUMPS]).normal_(
            0, hidden**-0.5, generator=generator
        )
    start = module.shard_indices.padded_org_vocab_start_index
    weight.copy_(embedding[start : start + rows])


def timed(kind: str, bs: int, call, *args, **kwargs):
    start = time.perf_counter_ns()
    result = call(*args, **kwargs)
    _samples.append({"at": start, "kind": kind, "bs": bs, "ns": time.perf_counter_ns() - start})
    _start_writer()
    return result


def draft_replay(replay, backend, forward_batch, bs):
    return timed("draft", bs, replay, backend, forward_batch, bs)


def draft_out_graph(init, backend, forward_batch, in_capture=False):
    if in_capture:
        return init(backend, forward_batch, in_capture=True)
    return timed("draft", forward_batch.batch_size, init, backend, forward_batch)


def graph_replay(replay, backend, bs, *args, **kwargs):
    forward_mode = kwargs["forward_mode"] if "forward_mode" in kwargs else args[4]
    return timed(kind_of(forward_mode), bs, replay, backend, bs, *args, **kwargs)


def out_graph(init, backend, forward_batch, in_capture=False):
    if in_capture:
        return init(backend, forward_batch, in_capture=True)
    return timed(kind_of(forward_batch.forward_mode), forward_batch.batch_size, init, backend, forward_batch)


def kind_of(forward_mode) -> str:
    return "verify" if forward_mode.is_target_verify() else "extend" if forward_mode.is_draft_extend(True) else "decode"


def eager(init, backend, forward_batch):
    if not forward_batch.forward_mode.is_draft_extend(include_v2=True):
        return init(backend, forward_batch)
    return timed("extend", forward_batch.batch_size, init, backend, forward_batch)


def draft_graph(replay, runner, *args, **kwargs):
    import torch

    bs = args[0].size if args and hasattr(args[0], "size") else runner.bs  # a ShapeKey from 0.5.14 on
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    at = time.perf_counter_ns()
    events[0].record()
    result = replay(runner, *args, **kwargs)
    events[1].record()
    _graphs.append((at, bs, *events))
    return result


def drafts(replay, *args, **kwargs):
    at = time.perf_counter_ns()
    result = replay(*args, **kwargs)
    if _keeps_drafts:
        _samples.append({"at": at, "drafts": result[2].tolist()})
    return result


@functools.lru_cache(None)
def _start_writer() -> None:
    threading.Thread(target=_write, name="server-probe", daemon=True).start()


def _write() -> None:
    global _keeps_drafts
    with open(os.environ[FILE], "a") as file:
        while True:
            time.sleep(PERIOD)
            _keeps_drafts = os.path.exists(os.environ[FILE] + ".drafts")
            while _graphs and _graphs[0][3].query():
                at, bs, start, end = _graphs.popleft()
                sample = {"at": at, "kind": "draft graph", "bs": bs, "ns": start.elapsed_time(end) * 1e6}
                file.write(json.dumps(sample) + "\n")
            while _samples:
                file.write(json.dumps(_samples.popleft()) + "\n")
            file.flush()
