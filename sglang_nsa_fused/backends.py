"""Subclasses of upstream's step backend and multi-step backend that refresh metadata through ReplayPlans."""

import contextlib
import functools
import logging
import operator
from types import ModuleType
from typing import Callable, Optional

import torch

from sglang_nsa_fused import __version__, reference, sharing
from sglang_nsa_fused.draft_extend import DraftExtend, applies
from sglang_nsa_fused.kernels import Engine, select
from sglang_nsa_fused.plan import ReplayPlan, Values
from sglang_nsa_fused.planners import Planners
from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.settings import Settings

logger = logging.getLogger("sglang_nsa_fused")


class Replay:
    """What one captured batch size needs at each replay: the plans, and what is set on the backends."""

    def __init__(self, release: Release, planners: Planners, mode: int, backends: list, bs: int, engine: Engine):
        self.mode = mode
        self._planners = planners
        self._backend = backends[0]
        metadatas = [backend.decode_cuda_graph_metadata[bs] for backend in backends]
        self._states = [(vars(b), self._state(release, b, m)) for b, m in zip(backends, metadatas)]
        self._metadatas = list({id(metadata): metadata for metadata in metadatas}.values())  # steps may share one
        self._sources = operator.attrgetter(*release.precomputed)
        captured = operator.attrgetter(*release.captured)
        paged = getattr(backends[0], release.page_size) > 1  # with pages of one token both tables are the same tensor
        destinations = [self._destination(captured(m), m, paged) for m in self._metadatas]
        self._has_schedule = self._metadatas[0].paged_mqa_schedule_metadata is not None
        self.plan = ReplayPlan(mode, destinations, engine)
        self._after: list[Callable[[int], None]] = []  # what the kernel may not write
        self._generate = self._generator(release, destinations, bs, engine) if engine.generate_plan else None

    @staticmethod
    def _state(release: Release, backend, metadata) -> dict:
        """What each replay sets on this backend."""
        getattr(backend, release.set_prefill_impl)(forward_batch=None)
        return {"forward_metadata": metadata, **{name: getattr(backend, name) for name in release.prefill_impl_state}}

    @staticmethod
    def _destination(tensors: tuple, metadata, paged: bool) -> tuple:
        *tensors, real_page_table = tensors
        flashmla = metadata.flashmla_metadata
        return (
            *tensors,
            real_page_table if paged else None,
            flashmla.num_splits if flashmla is not None else None,
            flashmla.flashmla_metadata if flashmla is not None else None,
            metadata.paged_mqa_schedule_metadata,
        )

    def _generator(self, release: Release, destinations: list[tuple], bs: int, engine: Engine) -> Optional[Callable]:
        backend, metadata = self._backend, self._metadatas[0]
        rows = len(destinations[0][3])
        variable = self.mode == reference.DRAFT_EXTEND  # its number of rows is known on the device alone
        segment_len = self._planners.segment_len(rows, backend.device) if self._has_schedule else 0
        flashmla = None
        if metadata.flashmla_metadata is not None and not variable:
            flashmla = self._planners.flashmla(backend, rows)
        if self._has_schedule and not segment_len:
            self._after.append(self._refresh_schedule)
        if metadata.flashmla_metadata is not None and flashmla is None:
            self._after.append(self._refresh_flashmla)
        if variable and self._after:
            return None
        *tensors, num_splits, tile_metadata, schedule = zip(*destinations)
        none = (None,) * len(destinations)
        tensors += (num_splits, tile_metadata) if flashmla is not None else (none, none)
        tensors += (schedule if segment_len else none, [getattr(m, release.captured_lens_2d, None) for m in self._metadatas])
        values = Values(
            req_to_token=getattr(backend, release.req_to_token),
            bs=bs,
            rows=rows,
            num_draft_tokens=getattr(backend, release.draft_tokens) or 1,
            nsa_index_topk=getattr(backend, release.index_topk),
            page_size=getattr(backend, release.page_size),
            segment_len=segment_len,
            num_splits=flashmla.num_splits if flashmla is not None else None,
            tile_metadata=flashmla.flashmla_metadata if flashmla is not None else None,
        )
        return ReplayPlan(self.mode, list(zip(*tensors)), engine, values).generate

    def _refresh_schedule(self, bs: int) -> None:
        for metadata in self._metadatas:
            decode = self.mode == reference.DECODE
            lengths = metadata.cache_seqlens_int32 if decode else metadata.nsa_seqlens_expanded
            metadata.paged_mqa_schedule_metadata.copy_(self._planners.schedule(lengths, bs))

    def _refresh_flashmla(self, bs: int) -> None:
        for metadata in self._metadatas:
            metadata.flashmla_metadata.copy_(
                self._planners.flashmla_of(self._backend, metadata.nsa_cache_seqlens_int32)
            )

    @property
    def generates(self) -> bool:
        return self._generate is not None

    def generate(self, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor, extend_lens, bs: int) -> None:
        """Writes what every backend's graph reads of this batch."""
        self._generate(seq_lens, req_pool_indices, extend_lens, bs)
        for refresh in self._after:
            refresh(bs)
        for attributes, state in self._states:
            attributes.update(state)

    def copy(self, bs: int, precomputed) -> None:
        """Copies to every backend, with the schedule of these lengths, which upstream computes after its copy."""
        flashmla = precomputed.flashmla_metadata
        size = precomputed.seqlens_expanded_size
        schedule = None
        if self._has_schedule:
            lengths = precomputed.cache_seqlens if self.mode == reference.DECODE else precomputed.seqlens_expanded[:size]
            schedule = self._planners.schedule(lengths, bs)
        self.plan.copy(
            *self._sources(precomputed),
            flashmla.num_splits if flashmla is not None else None,
            flashmla.flashmla_metadata if flashmla is not None else None,
            schedule,
            bs,
            precomputed.max_len,
            precomputed.max_seqlen_k,
            size,
        )
        for attributes, state in self._states:
            attributes.update(state)


@functools.lru_cache(None)
def _mode(forward_mode) -> Optional[int]:
    if forward_mode.is_decode_or_idle():
        return reference.DECODE
    if forward_mode.is_target_verify():
        return reference.TARGET_VERIFY
    return reference.DRAFT_EXTEND if forward_mode.is_draft_extend(include_v2=True) else None


def subclasses(release: Release, module: ModuleType, version: str, settings: Settings) -> tuple[type, type]:
    """Subclasses of upstream's step backend and multi-step backend.

    module: the imported `release.module`; version: sglang's. The step backend's constructor is upstream's.
    """
    Backend, MultiStep = getattr(module, release.backend), getattr(module, release.multi_step)

    @functools.lru_cache(None)
    def decided(device_type: str) -> tuple[Engine, Planners]:
        """Decided once per process, before the first capture: by then logging works and the device is known."""
        engine = select(device_type)
        if engine.name == "reference":
            _refuse(f"no kernel for {device_type} ({engine.reason}); metadata is copied tensor by tensor", settings)
        device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
        what = "generates" if engine.generate_plan else "copies"
        logger.info(
            "sglang-nsa-fused %s active: sglang %s, %s, %s %s; replaces %s and %s",
            *(__version__, version, device, engine.name, what, release.backend, release.multi_step),
        )
        return engine, Planners(release, module, engine)

    def decisions(backend) -> tuple[Engine, Planners]:
        return decided(torch.device(backend.device).type)

    def capture(mode: int, backends: list, bs: int) -> Optional[Replay]:
        engine, planners = decisions(backends[0])
        try:
            return Replay(release, planners, mode, backends, bs, engine)
        except (TypeError, ValueError) as error:
            _refuse(f"batch size {bs} keeps upstream's replay: {error}", settings)
            return None

    def captured(replays: dict, bs: int) -> Optional[Replay]:
        if bs not in replays:
            raise ValueError(f"bs: expected a captured batch size, one of {sorted(replays)}, got {bs}")
        return replays[bs]

    def check_mode(replay: Replay, forward_mode) -> None:
        if _mode(forward_mode) != replay.mode:
            raise ValueError(f"forward_mode: expected that of the capture, {replay.mode}, got {forward_mode!r}")

    def draft_extend_of(backend) -> Callable:
        """(forward_batch) -> the metadata of a draft extend without a graph."""
        engine, planners = decisions(backend)
        if engine.generate_draft_extend is not None and getattr(backend, release.page_size) > 1:
            return DraftExtend(release, module, planners, engine, backend)

        def upstream(forward_batch):
            Backend.init_forward_metadata(backend, forward_batch)
            return backend.forward_metadata

        return upstream

    class FusedBackend(Backend):
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
            super().init_cuda_graph_state(max_bs, max_num_tokens)
            self._replays = {}
            decisions(self)

        def init_forward_metadata_capture_cuda_graph(
            self, bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
        ):
            super().init_forward_metadata_capture_cuda_graph(
                bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
            )
            mode = _mode(forward_mode)
            self._replays[bs] = None if mode is None else capture(mode, [self], bs)

        def init_forward_metadata_replay_cuda_graph(
            self,
            bs,
            req_pool_indices,
            seq_lens,
            seq_lens_sum,
            encoder_lens,
            forward_mode,
            spec_info,
            seq_lens_cpu,
            out_cache_loc=None,
            actual_forward_mode=None,
        ):
            replay = captured(self._replays, bs)
            if replay is None or not replay.generates:
                return super().init_forward_metadata_replay_cuda_graph(
                    bs, req_pool_indices, seq_lens, seq_lens_sum, encoder_lens, forward_mode, spec_info, seq_lens_cpu,
                    out_cache_loc, actual_forward_mode,
                )  # fmt: skip
            check_mode(replay, forward_mode)
            accepted = getattr(spec_info, release.accepted) if replay.mode == reference.DRAFT_EXTEND else None
            replay.generate(seq_lens, req_pool_indices, accepted, bs)

        def init_forward_metadata_replay_cuda_graph_from_precomputed(self, bs, precomputed, forward_mode):
            replay = captured(self._replays, bs)
            # Of draft extend v2 upstream copies no page table; it is left to it.
            if replay is None or (replay.mode == reference.DRAFT_EXTEND and not forward_mode.is_draft_extend()):
                return super().init_forward_metadata_replay_cuda_graph_from_precomputed(bs, precomputed, forward_mode)
            check_mode(replay, forward_mode)
            replay.copy(bs, precomputed)

        _draft_extend = None  # made at the first one

        def init_forward_metadata(self, forward_batch):
            if not applies(forward_batch):
                return super().init_forward_metadata(forward_batch)
            if self._draft_extend is None:
                self._draft_extend = draft_extend_of(self)
            self.forward_metadata = self._draft_extend(forward_batch)

    class FusedMultiStepBackend(MultiStep):
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
            self._replays = {}
            first, *others = self.attn_backends
            self._share = bool(others) and sharing.steps_are_alike(self.attn_backends)
            if not self._share:
                return super().init_cuda_graph_state(max_bs, max_num_tokens)
            with self._first_step_alone():
                super().init_cuda_graph_state(max_bs, max_num_tokens)
            for backend in others:
                backend.decode_cuda_graph_metadata = first.decode_cuda_graph_metadata
                backend._replays = first._replays
            saved = len(others) * sharing.buffer_bytes(first.decode_cuda_graph_metadata)
            logger.info(
                "sglang-nsa-fused: %d draft steps share one set of buffers, %.1f MiB are not allocated",
                *(len(self.attn_backends), saved / 2**20),
            )

        @contextlib.contextmanager
        def _first_step_alone(self):
            """Upstream's loops over the steps then serve that one."""
            backends, steps = self.attn_backends, self.speculative_num_steps
            self.attn_backends, self.speculative_num_steps = backends[:1], steps - len(backends) + 1
            try:
                yield
            finally:
                self.attn_backends, self.speculative_num_steps = backends, steps

        def init_forward_metadata_capture_cuda_graph(self, forward_batch):
            bs = forward_batch.batch_size
            if self._share:
                with self._first_step_alone():
                    super().init_forward_metadata_capture_cuda_graph(forward_batch)
                for backend in self.attn_backends[1:]:
                    backend.forward_metadata = self.attn_backends[0].forward_metadata
            else:
                super().init_forward_metadata_capture_cuda_graph(forward_batch)
            self._replays[bs] = capture(reference.DECODE, self.attn_backends, bs)

        def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs: int):
            replay = captured(self._replays, bs)
            if replay is None:
                return super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
            if replay.generates:
                return replay.generate(forward_batch.seq_lens, forward_batch.req_pool_indices, None, bs)
            precomputed = self.attn_backends[0]._precompute_replay_metadata(
                bs=bs,
                req_pool_indices=forward_batch.req_pool_indices,
                seq_lens=forward_batch.seq_lens,
                seq_lens_cpu=forward_batch.seq_lens_cpu,
                forward_mode=module.ForwardMode.DECODE,
                spec_info=forward_batch.spec_info,
            )
            replay.copy(bs, precomputed)

    FusedBackend.__name__ = FusedBackend.__qualname__ = f"Fused{release.backend}"
    FusedMultiStepBackend.__name__ = FusedMultiStepBackend.__qualname__ = f"Fused{release.multi_step}"
    return FusedBackend, FusedMultiStepBackend


@functools.lru_cache(None)
def _refuse(finding: str, settings: Settings) -> None:
    """Says once what keeps the kernel from being used, or ends the process where the user requires it."""
    if settings.required:
        raise SystemExit(f"sglang-nsa-fused: {finding}")
    logger.warning("sglang-nsa-fused: %s", finding)
