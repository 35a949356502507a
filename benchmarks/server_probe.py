"""sglang plugin that server.py puts in both servers: times each metadata replay of the draft steps, upstream's or ours.

It appends JSON lines to the file that SERVER_PROBE_FILE names: "at", when the call began (perf_counter_ns, on Linux one
clock for all processes); "bs", the captured batch size; "len", the longest sequence in tokens; "ns", its duration;
"precompute_ns", what of it precomputed the metadata; "schedule_ns", what of it computed DeepGEMM's schedules. While a file of that name with ".drafts" exists, it also appends
the draft tokens of each step, since output ids do not tell wrong draft metadata: the target model corrects it.
"""

import collections
import functools
import json
import multiprocessing
import os
import threading
import time

MODULE = "sglang.srt.layers.attention.nsa_backend"
REPLAY = f"{MODULE}.NativeSparseAttnMultiStepBackend.init_forward_metadata_replay_cuda_graph"
PRECOMPUTE = f"{MODULE}.NativeSparseAttnBackend._precompute_replay_metadata"
DRAFT = "sglang.srt.speculative.eagle_draft_cuda_graph_runner.EAGLEDraftCudaGraphRunner.replay"
SCHEDULE = "deep_gemm.get_paged_mqa_logits_metadata"
WEIGHTS = "sglang.srt.model_loader.loader.initialize_dummy_weights"
FILE = "SERVER_PROBE_FILE"
PERIOD = 0.5  # seconds between writes

_samples = collections.deque()  # its append and popleft need no lock
_spent = {"precompute_ns": 0, "schedule_ns": 0}  # of the replay under way
_keeps_drafts = False


def activate() -> None:
    """Entry point. The hook registry replaces classes before it wraps methods, so this wraps the plugin's method too."""
    # Only the scheduler, a child, replays graphs; a hook in the launcher would import the attention backend there.
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(REPLAY, timed, HookType.AROUND)
    HookRegistry.register(PRECOMPUTE, part("precompute_ns"), HookType.AROUND)
    HookRegistry.register(SCHEDULE, part("schedule_ns"), HookType.AROUND)
    HookRegistry.register(DRAFT, draft, HookType.AROUND)
    HookRegistry.register(WEIGHTS, random_weights, HookType.REPLACE)


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


def timed(replay, backend, forward_batch, bs):
    for part in _spent:
        _spent[part] = 0
    start = time.perf_counter_ns()
    result = replay(backend, forward_batch, bs)
    end = time.perf_counter_ns()
    lengths = forward_batch.seq_lens_cpu
    longest = None if lengths is None else int(lengths.max())
    _samples.append({"at": start, "bs": bs, "len": longest, "ns": end - start, **_spent})
    _start_writer()
    return result


def part(name: str):
    def spend(original, *args, **kwargs):
        start = time.perf_counter_ns()
        result = original(*args, **kwargs)
        _spent[name] += time.perf_counter_ns() - start
        return result

    return spend


def draft(replay, *args, **kwargs):
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
            while _samples:
                file.write(json.dumps(_samples.popleft()) + "\n")
            file.flush()
