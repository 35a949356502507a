"""Subclasses of upstream's step backend and multi-step backend that refresh metadata through Replays.

Up to sglang 0.5.12 a graph runner captures with one method and replays with another; from 0.5.13 on one method does both.
"""

import contextlib
import logging
from types import ModuleType
from typing import Callable, Optional

from sglang_nsa_fused import buffers, reference
from sglang_nsa_fused.draft_extend import DraftExtend
from sglang_nsa_fused.hooks import Hooks
from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.replay import Replay, mode_of
from sglang_nsa_fused.settings import Settings

logger = logging.getLogger("sglang_nsa_fused")

RUNNERS = {reference.DECODE: "decode", reference.TARGET_VERIFY: "target verify", reference.DRAFT_EXTEND: "draft extend"}


def captured(replays: dict, bs: int) -> Optional[Replay]:
    if bs not in replays:
        raise ValueError(f"bs: expected a captured batch size, one of {sorted(replays)}, got {bs}")
    return replays[bs]


class Step:
    """Stands before upstream's step backend among the bases."""

    _hooks: Hooks
    _replays: dict[int, Optional[Replay]] = {}  # of a server without graphs
    _said = True  # where the launches are
    _draft_extend: Optional[Callable] = None  # made at the first one

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        with self._hooks.without_wide_table(self):
            super().init_cuda_graph_state(max_bs, max_num_tokens)
        self._replays, self._copies, self._said = {}, {}, False
        self._spared = self._hooks.spared(self, max_num_tokens)

    def _captured(self, bs: int, forward_mode) -> None:
        mode = mode_of(forward_mode)
        self._replays[bs] = self._hooks.capture(mode, [self], bs)
        if mode in (reference.TARGET_VERIFY, reference.DRAFT_EXTEND):  # draft steps are said by the multi-step backend
            self._hooks.not_allocated.say(RUNNERS[mode], self, self._spared)

    def init_forward_metadata_replay_cuda_graph_from_precomputed(self, bs, precomputed, forward_mode):
        key = bs, mode_of(forward_mode)
        if key not in self._copies:
            self._copies[key] = self._hooks.copy(forward_mode, self, bs)
        copy = self._copies[key]
        if copy is None:
            return super().init_forward_metadata_replay_cuda_graph_from_precomputed(bs, precomputed, forward_mode)
        copy(bs, precomputed)

    def init_forward_metadata(self, forward_batch):
        if mode_of(forward_batch.forward_mode) != reference.DRAFT_EXTEND:
            return super().init_forward_metadata(forward_batch)
        if reason := DraftExtend.not_ours(forward_batch):
            self._hooks.say_eager(reason)
            return super().init_forward_metadata(forward_batch)
        if self._draft_extend is None:
            self._draft_extend = self._hooks.draft_extend(self) or self._upstreams_draft_extend
        self.forward_metadata = self._draft_extend(forward_batch)

    def _upstreams_draft_extend(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        return self.forward_metadata


class TwoMethodsStep(Step):
    def init_forward_metadata_capture_cuda_graph(
        self, bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
    ):
        super().init_forward_metadata_capture_cuda_graph(
            bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
        )
        self._captured(bs, forward_mode)

    # The last of upstream's parameters differ between releases and none of them is read here: they are handed on.
    def init_forward_metadata_replay_cuda_graph(
        self, bs, req_pool_indices, seq_lens, seq_lens_sum, encoder_lens, forward_mode, spec_info, *args, **kwargs
    ):
        replay = captured(self._replays, bs)
        if replay is None:
            return super().init_forward_metadata_replay_cuda_graph(
                bs, req_pool_indices, seq_lens, seq_lens_sum, encoder_lens, forward_mode, spec_info, *args, **kwargs
            )
        if mode_of(forward_mode) != replay.mode:
            raise ValueError(f"forward_mode: expected that of the capture, {replay.mode}, got {forward_mode!r}")
        replay.generate(seq_lens, req_pool_indices, replay.extend_lens(spec_info), bs)


class OutGraphStep(Step):
    verify_mask = None  # upstream asks for it after each draft

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.verify_mask = self._hooks.verify_mask(self, max_bs)

    def init_forward_metadata_in_graph(self, forward_batch):
        super().init_forward_metadata_in_graph(forward_batch)
        # Of decode the scheduler waits for what comes before the graph alone; draft steps are the multi-step backend's.
        if not forward_batch.forward_mode.is_decode_or_idle():
            self._hooks.launch_in_graph(self._replays.get(forward_batch.batch_size), forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False):
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if not (in_capture or self._said):
            self._said = True
            self._hooks.say_where(RUNNERS[mode_of(forward_batch.forward_mode)], self._replays)

    def _build_forward_metadata_cuda_graph(
        self, bs, num_tokens, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode, *args, **kwargs
    ):
        super()._build_forward_metadata_cuda_graph(
            bs, num_tokens, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode, *args, **kwargs
        )
        self._captured(bs, forward_mode)

    def _apply_cuda_graph_metadata(self, bs, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode, spec_info, *args, **kwargs):
        replay = self._replays.get(bs)
        # A batch in another mode than captured upstream's method serves by that mode.
        if replay is None or mode_of(forward_mode) != replay.mode:
            return super()._apply_cuda_graph_metadata(
                bs, req_pool_indices, seq_lens, seq_lens_cpu, forward_mode, spec_info, *args, **kwargs
            )
        replay.generate(seq_lens, req_pool_indices, replay.extend_lens(spec_info), bs)


class MultiStep:
    """Stands before upstream's multi-step backend among the bases."""

    _hooks: Hooks

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        self._replays, self._said, backends = {}, False, self.attn_backends
        self._share = self._may_share(backends)
        if not self._share:
            super().init_cuda_graph_state(max_bs, max_num_tokens)
            return self._hooks.not_allocated.say("draft steps", self, sum(backend._spared for backend in backends))
        first, *others = backends
        before = dict(vars(first))
        with self._first_step_alone():
            super().init_cuda_graph_state(max_bs, max_num_tokens)
        # The buffers, and what else upstream sets there and later reads.
        made = {name: value for name, value in vars(first).items() if name not in before or value is not before[name]}
        for backend in others:
            vars(backend).update(made, _replays={}, _copies={})
        shared = len(others) * buffers.buffer_bytes(first.decode_cuda_graph_metadata)
        self._hooks.not_allocated.say("draft steps", self, shared + len(backends) * first._spared)

    def _may_share(self, backends: list) -> bool:
        if len(backends) < 2 or self._hooks.is_pooled(backends[0]):
            return False
        try:
            return buffers.steps_are_alike(backends)
        except Exception as error:  # then each step has buffers of its own, as upstream's
            logger.warning("sglang-nsa-fused: draft steps do not share buffers: %s: %s", type(error).__name__, error)
            return False

    @contextlib.contextmanager
    def _first_step_alone(self):
        """Upstream's loops over the steps then serve that one."""
        backends, steps = self.attn_backends, self.speculative_num_steps
        self.attn_backends, self.speculative_num_steps = backends[:1], steps - len(backends) + 1
        try:
            yield
        finally:
            self.attn_backends, self.speculative_num_steps = backends, steps

    def _capture(self, upstream: Callable[[], None], bs: int) -> None:
        """upstream: captures for all steps."""
        if self._share:
            with self._first_step_alone():
                upstream()
            for backend in self.attn_backends[1:]:
                backend.forward_metadata = self.attn_backends[0].forward_metadata
        else:
            upstream()
        self._replays[bs] = self._hooks.capture(reference.DECODE, self.attn_backends, bs) if self.attn_backends else None

    def _replay(self, upstream: Callable[[], None], forward_batch, bs: int) -> None:
        replay = captured(self._replays, bs)
        if replay is not None:
            replay.generate(forward_batch.seq_lens, forward_batch.req_pool_indices, None, bs)
        elif self.attn_backends and not self._hooks.has_wide_table(self.attn_backends[0]):
            self._replay_each_step(forward_batch, bs)
        else:
            upstream()

    def _replay_each_step(self, forward_batch, bs: int) -> None:
        """Upstream's precomputation for all steps needs a wide page table; a step's own replay does not."""
        for backend in self.attn_backends:
            backend._apply_cuda_graph_metadata(
                bs=bs,
                req_pool_indices=forward_batch.req_pool_indices,
                seq_lens=forward_batch.seq_lens,
                seq_lens_cpu=forward_batch.seq_lens_cpu,
                forward_mode=self._hooks.module.ForwardMode.DECODE,
                spec_info=forward_batch.spec_info,
            )


class TwoMethodsMultiStep(MultiStep):
    def init_forward_metadata_capture_cuda_graph(self, forward_batch):
        upstream = super().init_forward_metadata_capture_cuda_graph
        self._capture(lambda: upstream(forward_batch), forward_batch.batch_size)

    def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs: int):
        upstream = super().init_forward_metadata_replay_cuda_graph
        self._replay(lambda: upstream(forward_batch, bs), forward_batch, bs)


class OutGraphMultiStep(MultiStep):
    def init_forward_metadata_in_graph(self, forward_batch):
        super().init_forward_metadata_in_graph(forward_batch)
        self._hooks.launch_in_graph(self._replays.get(forward_batch.batch_size), forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False):
        upstream, bs = super().init_forward_metadata_out_graph, forward_batch.batch_size
        if in_capture:
            self._capture(lambda: upstream(forward_batch, in_capture=True), bs)
        else:
            self._replay(lambda: upstream(forward_batch), forward_batch, bs)
            if not self._said:
                self._said = True
                self._hooks.say_where("draft steps", self._replays)


def subclasses(release: Release, module: ModuleType, version: str, settings: Settings) -> tuple[type, type]:
    """Subclasses of upstream's step backend and multi-step backend.

    module: the imported `release.module`; version: sglang's. The constructors are upstream's.
    """
    ours = (OutGraphStep, OutGraphMultiStep) if release.out_graph else (TwoMethodsStep, TwoMethodsMultiStep)
    hooks = Hooks(release, module, version, settings)
    return tuple(
        type(f"Fused{name}", (base, getattr(module, name)), {"_hooks": hooks, "__module__": __name__})
        for name, base in zip((release.backend, release.multi_step), ours)
    )
