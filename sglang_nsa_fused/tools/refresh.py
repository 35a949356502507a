"""The three refreshes of a speculative step on both sides, for the demo and the benchmark of replays: backend, batch, call."""

import random
from functools import partial
from types import SimpleNamespace
from typing import Callable

import torch

from sglang_nsa_fused import backends, plugin
from sglang_nsa_fused.settings import Settings
from sglang_nsa_fused.tools import bare
from sglang_nsa_fused.tools.bench.record import SIDES

# A kind of refresh -> the ForwardMode of its graph; a draft extend has a graph in some releases.
DRAFT, VERIFY, EXTEND = "draft", "verify", "extend"
MODES = {DRAFT: "DECODE", VERIFY: "TARGET_VERIFY", EXTEND: "DRAFT_EXTEND_V2"}


class Classes:
    """Both sides' classes of the installed sglang. Raises plugin.Unsupported."""

    def __init__(self, device: str = "cuda", required: bool = True):
        self.device, (self.release, self.version) = device, plugin.find_release()
        self.module = bare.import_upstream(self.release, device)
        upstream = getattr(self.module, self.release.backend), getattr(self.module, self.release.multi_step)
        settings = Settings(True, required, None)
        fused = backends.subclasses(self.release, plugin.import_backend(self.release), self.version, settings)
        self.of = dict(zip(SIDES, (upstream, fused)))

    def has_graph(self, kind: str) -> bool:
        """Whether the release's server captures this refresh's backend in a graph that the benchmark can replay."""
        return kind != EXTEND or bool(self.release.out_graph and self.release.draft_extend)

    def may_enter_graph(self, kind: str) -> bool:
        """Whether the plugin's launch is a node of this graph."""
        return self.release.out_graph and (kind != EXTEND or self.release.draft_extend_reads)

    def enter_graph(self, backend, kind: str, bs: int) -> Callable[[], None]:
        """Captures what a backend does as the first work of its graph of this batch size, and gives the graph's replay."""
        batch, graph = bare.static_batch(backend, self.module, MODES[kind], bs), torch.cuda.CUDAGraph()
        backend.init_forward_metadata_in_graph(batch)
        with torch.cuda.graph(graph):
            backend.init_forward_metadata_in_graph(batch)
        return graph.replay

    def backend(self, side: str, kind: str, graph: bool, pool, draft_steps: int, capture_bs: list[int], flashmla: bool):
        """graph: captured for these batch sizes, else as it is made. pool: int32 [slots, columns]."""
        if kind == DRAFT:
            args = self.release, self.device, pool, draft_steps, capture_bs, flashmla
            return bare.multi_step_backend(self.of[side], *args)
        cls, draft_tokens = self.of[side][0], draft_steps + 1
        if not graph:
            return bare.step_backend(cls, self.release, self.device, pool, draft_tokens, flashmla)
        args = self.module, self.release, self.device, pool, draft_tokens, MODES[kind], capture_bs, flashmla
        return bare.graph_backend(cls, *args)

    def refresh(self, backend, kind: str, graph: bool, slots: list[int], lengths: list[int], bs: int) -> Callable[[], None]:
        """What refreshes the metadata of a batch with these lengths before its new tokens, padded to bs in a graph."""
        if kind == DRAFT:
            batch = bare.forward_batch(backend, slots, lengths, bs)
            if self.release.out_graph:
                return partial(backend.init_forward_metadata_out_graph, batch)
            return partial(backend.init_forward_metadata_replay_cuda_graph, batch, bs)
        if kind == EXTEND:
            lengths = [length + backend.speculative_num_draft_tokens for length in lengths]
        if not graph:
            batch = bare.draft_extend_batch(backend, self.module, MODES[kind], slots, lengths)
            return partial(backend.init_forward_metadata, batch)
        batch = bare.graph_batch(backend, self.module, MODES[kind], slots, lengths, bs)
        if self.release.out_graph:
            return partial(backend.init_forward_metadata_out_graph, SimpleNamespace(**batch, batch_size=bs))
        return partial(backend.init_forward_metadata_replay_cuda_graph, **batch)


def row_lengths(kind: str, lengths: list[int], draft_steps: int) -> list[int]:
    """The live tokens of each row that is refreshed."""
    return lengths if kind == DRAFT else [length + 1 + row for length in lengths for row in range(draft_steps + 1)]


def requests(steps: int, most: int, longest: int, seed: int = 0):
    """Yields (slots, lengths) step by step: requests join, grow by accepted tokens, and leave.

    Slots run from 1 (0 is for padding) to 2 * most; lengths stay from 1 to `longest`.
    """
    draw = random.Random(seed)
    running: dict[int, int] = {}
    for _ in range(steps):
        for slot in [slot for slot in running if draw.random() < 0.1]:
            del running[slot]
        for slot in running:
            running[slot] = min(longest, running[slot] + draw.randint(1, 5))
        while len(running) < most and (not running or draw.random() < 0.4):
            slot = draw.choice([slot for slot in range(1, 2 * most + 1) if slot not in running])
            running[slot] = draw.choice([1, 63, 64, 65, 2047, 2048, 2049, draw.randint(1, longest)]) % longest + 1
        yield list(running), list(running.values())
