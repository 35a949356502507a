"""sglang plugin that benchmarks put in both servers: times each refresh of metadata, upstream's or ours.

It appends JSON lines to the file that SERVER_PROBE_FILE names: "at", when the call began (perf_counter_ns, on Linux one
clock for all processes); "kind", draft, verify or extend; "bs", the batch size; "ns", its duration on the host.
"table_bytes", with "at", is the GPU memory that the backends of this process hold for their graphs, page tables first of all.

While a file of that name with ".observe" exists it also appends, at a price: the draft tokens of each step ("drafts"), since
output ids do not tell wrong draft metadata: the target model corrects it; and with kind "draft graph" the GPU's time for the
graph of all draft steps. The GPU waits DELAY_CYCLES before it: otherwise the launch of a graph of hundreds of kernels would
count where the GPU has nothing else to do, and be hidden where upstream's refresh still keeps it busy.

SERVER_PROBE_WEIGHTS=decisive gives both servers a model whose tokens survive the rounding of other batch sizes.
SERVER_PROBE_POISON=1 fills the page tables that a graph reads with a page that does not exist before each refresh: what that does
not write no graph may read.
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
DECISIVE = "server-probe: decisive weights"  # a line of the log
PERIOD = 0.5  # seconds between writes
DELAY_CYCLES = 4_000_000  # of the GPU's clock, 2 ms
# Of decisive_weights: of 129,280 tokens those with random rows in the head, the logit of the next token in standard
# deviations of theirs, and what random weights are multiplied with. Found by simulation of the model on a CPU.
JUMPS, NEXT = 16, 3.3
SCALES = {"q_b_proj": 1.6, "o_proj": 0.5, "down_proj": 0.25, "eh_proj": 1}

POISONS, NO_PAGE = os.environ.get("SERVER_PROBE_POISON") == "1", 1 << 30

_samples = collections.deque()  # its append and popleft need no lock
_graphs = collections.deque()  # (when, bs, the events before and after)
_observes = False
_table_bytes, _in_tables = 0, False


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
    around |= {f"{of}.init_cuda_graph_state": tables for of in (step, multi_step)}
    if release.out_graph:
        around |= {f"{multi_step}.init_forward_metadata_out_graph": draft_out_graph}
        around |= {f"{step}.init_forward_metadata_out_graph": out_graph}
    else:
        around |= {f"{multi_step}.init_forward_metadata_replay_cuda_graph": draft_replay}
        around |= {f"{step}.init_forward_metadata_replay_cuda_graph": graph_replay}
        around |= {f"{of}.init_forward_metadata_capture_cuda_graph": tables for of in (step, multi_step)}
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

    Of 129,280 random logits the best two are 0.2 standard deviations apart on average, and rounding, which depends on
    the batch size, moves them by 0.01: two runs of one server soon differ. Here the head knows token t as what follows
    t - 1, so t + 1 follows t with much the same logit each time. Only JUMPS tokens have random rows besides; one of them
    wins where the rest of the network makes it large, a few times in a hundred. Queries are larger, so that attention
    does not average long prompts away: without a page of 64 tokens out of 100, 4 tokens in a hundred are others. The
    draft layer sees the embedding too, so most drafts are accepted, but not all.
    """
    import torch

    random_weights(model)
    print(DECISIVE, flush=True)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "shard_indices"):
                _decide(module, is_head=name.endswith("head"))
            elif scale := SCALES.get(name.rpartition(".")[2]):
                # Ranks have the same shards, so what they add up is as many times as large.
                ranks = 1 if name.endswith(("q_b_proj", "eh_proj")) else module.input_size // module.input_size_per_partition
                module.weight.mul_(scale / ranks)
            if name.endswith("eh_proj"):
                module.weight[:, : len(module.weight)].fill_diagonal_(1)
            if hasattr(module, "w2_weight"):
                module.w2_weight.mul_(SCALES["down_proj"] / module.moe_tp_size)
            if (bias := getattr(module, "e_score_correction_bias", None)) is not None:
                bias.copy_(torch.arange(len(bias)))  # the same experts each time: a near tie there would show
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # sglang sizes its pools by what is free


def _decide(module, is_head: bool) -> None:
    """The shard of an embedding that all ranks, and both servers, draw alike, or of the head that goes with it."""
    import torch

    weight, start = module.weight, module.shard_indices.padded_org_vocab_start_index
    generator = torch.Generator(weight.device).manual_seed(1)
    shape, hidden = (module.num_embeddings_padded, weight.shape[1]), weight.shape[1]
    vocabulary = torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_(generator=generator)
    if is_head:
        vocabulary = vocabulary.roll(1, 0).mul_(NEXT / hidden)
        jumps = vocabulary[:: len(vocabulary) // JUMPS]
        jumps += torch.empty_like(jumps).normal_(0, hidden**-0.5, generator=generator)
    weight.copy_(vocabulary[start : start + len(weight)])


def tables(call, *args, **kwargs):
    """What this adds to the GPU memory in use is held for graphs. A step backend's call within that of all steps counts once."""
    global _table_bytes, _in_tables
    if _in_tables:
        return call(*args, **kwargs)
    from torch.cuda import memory_allocated

    _in_tables, before = True, memory_allocated()
    try:
        return call(*args, **kwargs)
    finally:
        _in_tables, _table_bytes = False, _table_bytes + memory_allocated() - before
        _samples.append({"at": time.perf_counter_ns(), "table_bytes": _table_bytes})
        _start_writer()


def poison(backend, bs: int) -> None:
    for step in getattr(backend, "attn_backends", [backend]):
        metadata = getattr(step, "decode_cuda_graph_metadata", {}).get(bs)
        for name in ("page_table_1", "real_page_table"):
            if (table := getattr(metadata, name, None)) is not None:
                table.fill_(NO_PAGE)


def refresh(kind: str, bs: int, call, backend, *args, **kwargs):
    if POISONS:
        poison(backend, bs)
    start = time.perf_counter_ns()
    result = call(backend, *args, **kwargs)
    _samples.append({"at": start, "kind": kind, "bs": bs, "ns": time.perf_counter_ns() - start})
    _start_writer()
    return result


def draft_replay(replay, backend, forward_batch, bs):
    return refresh("draft", bs, replay, backend, forward_batch, bs)


def draft_out_graph(init, backend, forward_batch, in_capture=False):
    if in_capture:
        return tables(init, backend, forward_batch, in_capture=True)
    return refresh("draft", forward_batch.batch_size, init, backend, forward_batch)


def graph_replay(replay, backend, bs, *args, **kwargs):
    forward_mode = kwargs["forward_mode"] if "forward_mode" in kwargs else args[4]
    return refresh(kind_of(forward_mode), bs, replay, backend, bs, *args, **kwargs)


def out_graph(init, backend, forward_batch, in_capture=False):
    if in_capture:
        return tables(init, backend, forward_batch, in_capture=True)
    return refresh(kind_of(forward_batch.forward_mode), forward_batch.batch_size, init, backend, forward_batch)


@functools.lru_cache(None)
def kind_of(forward_mode) -> str:
    """Of upstream's ForwardMode; "other" for one that no graph is captured in."""
    from sglang_nsa_fused import reference
    from sglang_nsa_fused.replay import mode_of

    kinds = {reference.DECODE: "decode", reference.TARGET_VERIFY: "verify", reference.DRAFT_EXTEND: "extend"}
    return kinds.get(mode_of(forward_mode), "other")


def eager(init, backend, forward_batch):
    if kind_of(forward_batch.forward_mode) != "extend":
        return init(backend, forward_batch)
    return refresh("extend", forward_batch.batch_size, init, backend, forward_batch)


def draft_graph(replay, runner, *args, **kwargs):
    if not _observes:
        return replay(runner, *args, **kwargs)
    import torch

    bs = args[0].size if args and hasattr(args[0], "size") else runner.bs  # a ShapeKey from 0.5.14 on
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    at = time.perf_counter_ns()
    torch.cuda._sleep(DELAY_CYCLES)
    events[0].record()
    result = replay(runner, *args, **kwargs)
    events[1].record()
    _graphs.append((at, bs, *events))
    return result


def drafts(replay, *args, **kwargs):
    at = time.perf_counter_ns()
    result = replay(*args, **kwargs)
    if _observes:
        _samples.append({"at": at, "drafts": result[2].tolist()})
    return result


@functools.lru_cache(None)
def _start_writer() -> None:
    threading.Thread(target=_write, name="server-probe", daemon=True).start()


def _write() -> None:
    global _observes
    # Unbuffered, all lines in one write: with several schedulers the file is theirs together.
    with open(os.environ[FILE], "ab", buffering=0) as file:
        while True:
            time.sleep(PERIOD)
            _observes = os.path.exists(os.environ[FILE] + ".observe")
            found = []
            while _graphs and _graphs[0][3].query():
                at, bs, start, end = _graphs.popleft()
                found.append({"at": at, "kind": "draft graph", "bs": bs, "ns": start.elapsed_time(end) * 1e6})
            while _samples:
                found.append(_samples.popleft())
            file.write("".join(json.dumps(sample) + "\n" for sample in found).encode())
