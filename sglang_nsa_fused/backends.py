"""Subclasses of upstream's step backend and multi-step backend that refresh metadata through a ReplayPlan."""

import functools
import logging
import operator
from types import ModuleType
from typing import Callable, Optional

import torch

from sglang_nsa_fused import __version__, reference
from sglang_nsa_fused.kernels import Engine, select
from sglang_nsa_fused.plan import ReplayPlan
from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.settings import Settings

logger = logging.getLogger("sglang_nsa_fused")


class Replay:
    """What one captured batch size needs at each replay: the plan, and what is set on the backends."""

    def __init__(self, release: Release, module: ModuleType, mode: int, backends: list, bs: int, engine: Engine):
        self.mode = mode
        metadatas = [backend.decode_cuda_graph_metadata[bs] for backend in backends]
        self._sources = operator.attrgetter(*release.precomputed)
        has_schedule = metadatas[0].paged_mqa_schedule_metadata is not None
        self._schedule = _schedule_function(module) if has_schedule else None
        self._states = [(vars(b), self._state(release, b, m)) for b, m in zip(backends, metadatas)]
        captured = operator.attrgetter(*release.captured)
        paged = getattr(backends[0], release.page_size) > 1  # with pages of one token both tables are the same tensor
        self.plan = ReplayPlan(mode, [self._destination(captured(m), m, paged) for m in metadatas], engine)

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

    def __call__(self, bs: int, precomputed) -> None:
        """Copies to every backend, with the schedule of these lengths, which upstream computes after its copy."""
        flashmla = precomputed.flashmla_metadata
        size = precomputed.seqlens_expanded_size
        schedule = None
        if self._schedule is not None:
            lengths = precomputed.cache_seqlens if self.mode == reference.DECODE else precomputed.seqlens_expanded[:size]
            schedule = self._schedule(lengths, bs)
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


def _schedule_function(module: ModuleType) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(int32 lengths [n], bs) -> DeepGEMM's paged MQA schedule [num_sms + 1, 2] for pages of 64 tokens."""
    import deep_gemm

    def schedule(lengths: torch.Tensor, bs: int) -> torch.Tensor:
        return deep_gemm.get_paged_mqa_logits_metadata(
            module._to_2d_context_lens(lengths, bs), 64, deep_gemm.get_num_sms()
        )

    return schedule


def _mode(forward_mode) -> Optional[int]:
    if forward_mode.is_decode_or_idle():
        return reference.DECODE
    if forward_mode.is_target_verify():
        return reference.TARGET_VERIFY
    return reference.DRAFT_EXTEND if forward_mode.is_draft_extend() else None  # upstream copies nothing for its v2


def subclasses(release: Release, module: ModuleType, version: str, settings: Settings) -> tuple[type, type]:
    """Subclasses of upstream's step backend and multi-step backend.

    module: the imported `release.module`; version: sglang's. The step backend's constructor is upstream's.
    """
    Backend, MultiStep = getattr(module, release.backend), getattr(module, release.multi_step)

    @functools.lru_cache(None)
    def engine(device_type: str) -> Engine:
        """Decided once per process, before the first capture: by then logging works and the device is known."""
        chosen = select(device_type)
        if chosen.name == "reference":
            _refuse(f"no kernel for {device_type} ({chosen.reason}); metadata is copied tensor by tensor", settings)
        device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
        logger.info(
            "sglang-nsa-fused %s active: sglang %s, %s, %s copy; replaces %s and %s",
            *(__version__, version, device, chosen.name, release.backend, release.multi_step),
        )
        return chosen

    def device_engine(backend) -> Engine:
        return engine(torch.device(backend.device).type)

    def capture(mode: int, backends: list, bs: int) -> Optional[Replay]:
        try:
            return Replay(release, module, mode, backends, bs, device_engine(backends[0]))
        except (TypeError, ValueError) as error:
            _refuse(f"batch size {bs} keeps upstream's replay: {error}", settings)
            return None

    class FusedBackend(Backend):
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
            super().init_cuda_graph_state(max_bs, max_num_tokens)
            self._replays = {}
            device_engine(self)

        def init_forward_metadata_capture_cuda_graph(
            self, bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
        ):
            super().init_forward_metadata_capture_cuda_graph(
                bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
            )
            mode = _mode(forward_mode)
            self._replays[bs] = None if mode is None else capture(mode, [self], bs)

        def init_forward_metadata_replay_cuda_graph_from_precomputed(self, bs, precomputed, forward_mode):
            replay = self._replays[bs]
            if replay is None:
                return super().init_forward_metadata_replay_cuda_graph_from_precomputed(bs, precomputed, forward_mode)
            if _mode(forward_mode) != replay.mode:
                raise ValueError(f"forward_mode: expected that of the capture, {replay.mode}, got {forward_mode!r}")
            replay(bs, precomputed)

    class FusedMultiStepBackend(MultiStep):
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
            super().init_cuda_graph_state(max_bs, max_num_tokens)
            self._replays = {}

        def init_forward_metadata_capture_cuda_graph(self, forward_batch):
            super().init_forward_metadata_capture_cuda_graph(forward_batch)
            bs = forward_batch.batch_size
            self._replays[bs] = capture(reference.DECODE, self.attn_backends, bs)

        def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs: int):
            replay = self._replays[bs]
            if replay is None:
                return super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
            precomputed = self.attn_backends[0]._precompute_replay_metadata(
                bs=bs,
                req_pool_indices=forward_batch.req_pool_indices,
                seq_lens=forward_batch.seq_lens,
                seq_lens_cpu=forward_batch.seq_lens_cpu,
                forward_mode=module.ForwardMode.DECODE,
                spec_info=forward_batch.spec_info,
            )
            replay(bs, precomputed)

    FusedBackend.__name__ = FusedBackend.__qualname__ = f"Fused{release.backend}"
    FusedMultiStepBackend.__name__ = FusedMultiStepBackend.__qualname__ = f"Fused{release.multi_step}"
    return FusedBackend, FusedMultiStepBackend


@functools.lru_cache(None)
def _refuse(finding: str, settings: Settings) -> None:
    """Says once what keeps the kernel from being used, or ends the process where the user requires it."""
    if settings.required:
        raise SystemExit(f"sglang-nsa-fused: {finding}")
    logger.warning("sglang-nsa-fused: %s", finding)
