"""What one captured batch size needs at each replay."""

import functools
import operator
from typing import Callable, Optional

import torch

from sglang_nsa_fused import reference
from sglang_nsa_fused.kernels import Engine
from sglang_nsa_fused.plan import ReplayPlan, Values
from sglang_nsa_fused.planners import NO_FORM, Planners
from sglang_nsa_fused.releases import Release


@functools.lru_cache(None)
def mode_of(forward_mode) -> Optional[int]:
    """The reference's number for upstream's ForwardMode; None for one that no graph is captured in."""
    if forward_mode.is_decode_or_idle():
        return reference.DECODE
    if forward_mode.is_target_verify():
        return reference.TARGET_VERIFY
    return reference.DRAFT_EXTEND if forward_mode.name.startswith("DRAFT_EXTEND") else None


class Replay:
    """The plans of one captured batch size, and what is set on its backends."""

    def __init__(self, release: Release, planners: Planners, mode: int, backends: list, bs: int, engine: Engine):
        self.mode = mode
        self._release, self._planners = release, planners
        self._backend = backends[0]
        metadatas = [backend.decode_cuda_graph_metadata[bs] for backend in backends]
        self._states = [(vars(b), self._state(release, b, m)) for b, m in zip(backends, metadatas)]
        self._metadatas = list({id(metadata): metadata for metadata in metadatas}.values())  # steps may share one
        self._sources = operator.attrgetter(*release.precomputed)
        captured = operator.attrgetter(*release.captured)
        paged = getattr(backends[0], release.page_size) > 1  # with pages of one token both tables are the same tensor
        destinations = [self._destination(captured(m), m, paged) for m in self._metadatas]
        cache_lens, _, _, self._nsa_row_lens, expanded, *_ = release.captured
        self._row_lens = cache_lens if mode == reference.DECODE else expanded
        self._has_schedule = self._metadatas[0].paged_mqa_schedule_metadata is not None
        # Upstream's precomputation knows DeepGEMM's lengths of the draft steps alone, which are its cache lengths.
        # It needs the wide page table, too.
        self.copies = (mode == reference.DECODE or release.captured_lens_2d is None) and destinations[0][2] is not None
        self.plan = ReplayPlan(mode, destinations, engine) if self.copies else None
        self._after: list[Callable[[int], None]] = []  # what the kernel may not write, with the batch size
        if release.topk_v2_plan is not None and getattr(self._metadatas[0], release.topk_v2_plan) is not None:
            self._after.append(self._refresh_topk_v2_plan)
        self._after_copy = tuple(self._after)
        self._generated = self._generation(destinations, bs, engine) if engine.generate_plan else None
        self._generate = self._generated.generate if self._generated else None

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

    def _generation(self, destinations: list[tuple], bs: int, engine: Engine) -> Optional[ReplayPlan]:
        release, backend, metadata = self._release, self._backend, self._metadatas[0]
        rows = len(destinations[0][3])
        # Then its number of rows is known on the device alone.
        variable = self.mode == reference.DRAFT_EXTEND and release.accepted is not None
        lens_2d = [getattr(m, release.captured_lens_2d) if release.captured_lens_2d else None for m in self._metadatas]
        # On Blackwell target verify is scheduled by requests, each with its length for every draft token.
        by_request = lens_2d[0] is not None and lens_2d[0].shape[1] > 1
        form, flashmla = NO_FORM, None
        if by_request:
            lens_2d = [None] * len(lens_2d)
            self._after.append(self._refresh_schedule_by_request)
        elif self._has_schedule:
            form = self._planners.schedule_form(rows, backend.device)
            if form is NO_FORM:
                self._after.append(self._refresh_schedule)
        if metadata.flashmla_metadata is not None:
            flashmla = None if variable else self._planners.flashmla(backend, rows)
            if flashmla is None:
                self._after.append(self._refresh_flashmla)
        if variable and self._after:
            return None
        *tensors, num_splits, tile_metadata, schedule = zip(*destinations)
        none = (None,) * len(destinations)
        tensors += (num_splits, tile_metadata) if flashmla is not None else (none, none)
        topk_plans, buckets = none, ()
        if self._refresh_topk_v2_plan in self._after:
            buckets = self._planners.topk_buckets(backend, rows)
            if buckets is not None:
                self._after.remove(self._refresh_topk_v2_plan)
            if buckets:
                topk_plans = [getattr(m, release.topk_v2_plan) for m in self._metadatas]
        tensors += (none if form is NO_FORM else schedule, lens_2d, topk_plans)
        values = Values(
            req_to_token=getattr(backend, release.req_to_token),
            bs=bs,
            rows=rows,
            num_draft_tokens=getattr(backend, release.draft_tokens) or 1,
            nsa_index_topk=getattr(backend, release.index_topk),
            page_size=getattr(backend, release.page_size),
            segment_len=form.segment_len,
            extra_last=form.extra_last,
            num_splits=flashmla.num_splits if flashmla is not None else None,
            tile_metadata=flashmla.flashmla_metadata if flashmla is not None else None,
            row_floor=release.floor,
            topk_buckets=buckets or (),
        )
        return ReplayPlan(self.mode, list(zip(*tensors)), engine, values)

    def _refresh_schedule(self, bs: int) -> None:
        for metadata in self._metadatas:
            schedule = self._planners.schedule(getattr(metadata, self._row_lens), bs)
            metadata.paged_mqa_schedule_metadata.copy_(schedule)

    def _refresh_schedule_by_request(self, bs: int) -> None:
        for metadata in self._metadatas:
            lens_2d = getattr(metadata, self._release.captured_lens_2d)
            lens_2d.copy_(metadata.cache_seqlens_int32.view(-1, 1).expand_as(lens_2d))
            metadata.paged_mqa_schedule_metadata.copy_(self._planners.schedule_of(lens_2d))

    def _refresh_flashmla(self, bs: int) -> None:
        for metadata in self._metadatas:
            plan = self._planners.flashmla_of(self._backend, getattr(metadata, self._nsa_row_lens))
            metadata.flashmla_metadata.copy_(plan)

    def _refresh_topk_v2_plan(self, bs: int) -> None:
        for metadata in self._metadatas:
            getattr(self._backend, self._release.refresh_topk_v2_plan)(metadata)

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

    def extend_lens(self, spec_info) -> Optional[torch.Tensor]:
        """Rows of each request in this replay's draft extend; None where all have the same."""
        if self.mode != reference.DRAFT_EXTEND or self._release.accepted is None:
            return None
        lens = getattr(spec_info, self._release.accepted)
        return lens if lens.dtype == torch.int32 else lens.to(torch.int32)  # int64 once a request of the batch has finished

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
        for refresh in self._after_copy:
            refresh(bs)
        for attributes, state in self._states:
            attributes.update(state)
