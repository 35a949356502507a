"""Subclasses of upstream's step backend and multi-step backend that refresh metadata through Replays.

What all releases have is here; how a release's graph runners capture and replay is in hooks_two_methods.py and
hooks_out_graph.py.
"""

import contextlib
import functools
import logging
from types import ModuleType
from typing import Callable, Optional

import torch

from sglang_nsa_fused import __version__, buffers, reference
from sglang_nsa_fused.draft_extend import DraftExtend
from sglang_nsa_fused.kernels import Engine, select
from sglang_nsa_fused.planners import Planners
from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.replay import Replay, mode_of
from sglang_nsa_fused.settings import VERIFY, Settings
from sglang_nsa_fused.verify import verified

logger = logging.getLogger("sglang_nsa_fused")

# What upstream's objects that do not fit raise, and planners that cannot be compared.
RUNNERS = {reference.TARGET_VERIFY: "target verify", reference.DRAFT_EXTEND: "draft extend"}
NOT_CAPTURABLE = (AttributeError, ImportError, RuntimeError, TypeError, ValueError)


class Hooks:
    """What the subclasses of one process share: the release, and what is decided once."""

    def __init__(self, release: Release, module: ModuleType, version: str, settings: Settings):
        self.release, self.module = release, module
        self._version, self._settings = version, settings
        self._upstream = getattr(module, release.backend)
        self._not_allocated: dict[tuple, int] = {}  # (runner, the backend's id) -> bytes
        self.decided = functools.lru_cache(None)(self._decided)

    def _decided(self, device_type: str) -> tuple[Engine, Planners]:
        """Decided before the first capture: by then logging works and the device is known."""
        release, engine = self.release, select(device_type)
        if engine.name == "reference":
            self.refuse(f"no kernel for {device_type} ({engine.reason}); metadata is copied tensor by tensor")
        if self._settings.verify:
            engine = verified(engine)
            logger.warning("sglang-nsa-fused: each replay is compared with the reference and waits for the GPU (%s)", VERIFY)
        device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
        what = "generates" if engine.generate_plan else "copies"
        logger.info(
            "sglang-nsa-fused %s active: sglang %s, %s, %s %s; replaces %s and %s",
            *(__version__, self._version, device, engine.name, what, release.backend, release.multi_step),
        )
        return engine, Planners(release, self.module, engine)

    def decisions(self, backend) -> tuple[Engine, Planners]:
        return self.decided(torch.device(backend.device).type)

    def is_pooled(self, backend) -> bool:
        """Whether the index pools keys: more metadata follows, which is upstream's alone."""
        return self.release.kpool is not None and getattr(backend, self.release.kpool) > 1

    @functools.cached_property
    def _may_drop_wide_table(self) -> bool:
        flag, draft_tokens = self.release.drop_wide_table, self.release.draft_tokens
        if flag is None or self._settings.keep_wide_table:
            return False
        if buffers.drop_terms(self._upstream, flag, draft_tokens):
            return True
        logger.warning("sglang-nsa-fused: the wide page tables stay: sglang sets %s in a way that is not known here", flag)
        return False

    def speculates(self, backend) -> bool:
        return bool(getattr(backend, self.release.draft_tokens))

    def without_wide_table(self, backend) -> contextlib.AbstractContextManager:
        """Inside, upstream's init_cuda_graph_state allocates no wide page table where its own condition holds apart from
        speculation, and where our launch, which needs none, stands for its precomputation."""
        engine, _ = self.decisions(backend)
        ours = engine.generate_plan is not None and self.speculates(backend) and not self.is_pooled(backend)
        drops = ours and self._may_drop_wide_table
        return buffers.hidden(backend, self.release.draft_tokens) if drops else contextlib.nullcontext()

    def has_wide_table(self, backend) -> bool:
        return not (self.release.drop_wide_table and getattr(backend, self.release.drop_wide_table))

    def spared(self, backend, max_rows: int) -> int:
        """Bytes of the wide page table that this backend, with graphs of so many rows, does not have."""
        if self.has_wide_table(backend) or not self.speculates(backend):
            return 0
        return buffers.not_allocated(backend, getattr(backend, self.release.req_to_token), max_rows)

    def say_not_allocated(self, runner: str, backend, size: int) -> None:
        """Once for each runner, with what was said before."""
        before = self._not_allocated.get((runner, id(backend)))
        if not size or before == size:
            return
        self._not_allocated[runner, id(backend)] = size
        sums: dict[str, int] = {}
        for (name, _), count in self._not_allocated.items():
            sums[name] = sums.get(name, 0) + count
        each = ", ".join(f"{name} {count / 2**30:.3f} GiB" for name, count in sums.items())
        logger.info("sglang-nsa-fused: not allocated: %s; %.3f GiB in all", each, sum(sums.values()) / 2**30)

    def capture(self, mode: Optional[int], backends: list, bs: int) -> Optional[Replay]:
        """None where this batch size keeps upstream's replay."""
        extends = mode == reference.DRAFT_EXTEND
        if mode is None or (extends and not self.release.draft_extend):
            return None
        # Without speculation upstream drops the wide table by itself and writes the other with one kernel of its own.
        if not self.has_wide_table(backends[0]) and not self.speculates(backends[0]):
            return None
        if self.is_pooled(backends[0]):
            self.refuse("an index with pooled keys keeps upstream's replays")
            return None
        engine, planners = self.decisions(backends[0])
        try:
            return Replay(self.release, planners, mode, backends, bs, engine)
        except NOT_CAPTURABLE as error:
            self.refuse(f"batch size {bs} keeps upstream's replay: {error}")
            return None

    def draft_extend(self, backend) -> Optional[DraftExtend]:
        """What makes the metadata of a draft extend without a graph; None: upstream does."""
        engine, planners = self.decisions(backend)
        release = self.release
        sharded = release.kv_shard_pool is not None and getattr(backend, release.kv_shard_pool) is not None
        paged = getattr(backend, release.page_size) > 1
        if engine.generate_draft_extend is None or not paged or sharded or self.is_pooled(backend):
            return None
        return DraftExtend(release, self.module, planners, engine, backend)

    def refuse(self, finding: str) -> None:
        _refuse(finding, self._settings)


@functools.lru_cache(None)
def _refuse(finding: str, settings: Settings) -> None:
    """Says once what keeps the kernel from being used, or ends the process where the user requires it."""
    if settings.required:
        raise SystemExit(f"sglang-nsa-fused: {finding}")
    logger.warning("sglang-nsa-fused: %s", finding)


def captured(replays: dict, bs: int) -> Optional[Replay]:
    if bs not in replays:
        raise ValueError(f"bs: expected a captured batch size, one of {sorted(replays)}, got {bs}")
    return replays[bs]


def check_mode(replay: Replay, forward_mode) -> None:
    if mode_of(forward_mode) != replay.mode:
        raise ValueError(f"forward_mode: expected that of the capture, {replay.mode}, got {forward_mode!r}")


class StepBackend:
    """Stands before upstream's step backend among the bases."""

    _hooks: Hooks
    _draft_extend: Optional[Callable] = None  # made at the first one

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        with self._hooks.without_wide_table(self):
            super().init_cuda_graph_state(max_bs, max_num_tokens)
        self._replays = {}
        self._spared = self._hooks.spared(self, max_num_tokens)

    def _captured(self, bs: int, forward_mode) -> None:
        mode = mode_of(forward_mode)
        self._replays[bs] = self._hooks.capture(mode, [self], bs)
        if mode in RUNNERS:  # draft steps are said by the multi-step backend
            self._hooks.say_not_allocated(RUNNERS[mode], self, self._spared)

    def init_forward_metadata_replay_cuda_graph_from_precomputed(self, bs, precomputed, forward_mode):
        replay = captured(self._replays, bs)
        # Of draft extend v2 upstream copies no page table; it is left to it.
        if replay is None or not replay.copies or forward_mode.is_draft_extend_v2():
            return super().init_forward_metadata_replay_cuda_graph_from_precomputed(bs, precomputed, forward_mode)
        check_mode(replay, forward_mode)
        replay.copy(bs, precomputed)

    def init_forward_metadata(self, forward_batch):
        if not DraftExtend.applies(forward_batch):
            return super().init_forward_metadata(forward_batch)
        if self._draft_extend is None:
            self._draft_extend = self._hooks.draft_extend(self) or self._upstreams_draft_extend
        self.forward_metadata = self._draft_extend(forward_batch)

    def _upstreams_draft_extend(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        return self.forward_metadata


class MultiStepBackend:
    """Stands before upstream's multi-step backend among the bases."""

    _hooks: Hooks

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        self._replays = {}
        first, *others = self.attn_backends
        pooled = self._hooks.is_pooled(first)
        self._share = bool(others) and not pooled and buffers.steps_are_alike(self.attn_backends)
        if not self._share:
            super().init_cuda_graph_state(max_bs, max_num_tokens)
            return self._hooks.say_not_allocated("draft steps", self, sum(b._spared for b in self.attn_backends))
        before = dict(vars(first))
        with self._first_step_alone():
            super().init_cuda_graph_state(max_bs, max_num_tokens)
        # The buffers, and what else upstream sets there and later reads.
        made = {name: value for name, value in vars(first).items() if name not in before or value is not before[name]}
        for backend in others:
            vars(backend).update(made)
        shared = len(others) * buffers.buffer_bytes(first.decode_cuda_graph_metadata)
        self._hooks.say_not_allocated("draft steps", self, shared + len(self.attn_backends) * first._spared)

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
        self._replays[bs] = self._hooks.capture(reference.DECODE, self.attn_backends, bs)

    def _replay(self, upstream: Callable[[], None], forward_batch, bs: int) -> None:
        replay = captured(self._replays, bs)
        if replay is None:
            has_wide_table = self._hooks.has_wide_table(self.attn_backends[0])
            return upstream() if has_wide_table else self._replay_each_step(forward_batch, bs)
        if replay.generates:
            return replay.generate(forward_batch.seq_lens, forward_batch.req_pool_indices, None, bs)
        spec_info = dict(spec_info=forward_batch.spec_info) if self._hooks.release.spec_info else {}
        precomputed = self.attn_backends[0]._precompute_replay_metadata(
            bs=bs,
            req_pool_indices=forward_batch.req_pool_indices,
            seq_lens=forward_batch.seq_lens,
            seq_lens_cpu=forward_batch.seq_lens_cpu,
            forward_mode=self._hooks.module.ForwardMode.DECODE,
            **spec_info,
        )
        replay.copy(bs, precomputed)


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


def subclasses(release: Release, module: ModuleType, version: str, settings: Settings) -> tuple[type, type]:
    """Subclasses of upstream's step backend and multi-step backend.

    module: the imported `release.module`; version: sglang's. The constructors are upstream's.
    """
    from sglang_nsa_fused import hooks_out_graph, hooks_two_methods

    style = hooks_out_graph if release.out_graph else hooks_two_methods
    hooks = Hooks(release, module, version, settings)
    return tuple(
        type(f"Fused{name}", (ours, getattr(module, name)), {"_hooks": hooks, "__module__": __name__})
        for name, ours in ((release.backend, style.StepBackend), (release.multi_step, style.MultiStepBackend))
    )
