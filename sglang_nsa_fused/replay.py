"""What one captured batch size needs at each replay."""

import functools
import operator
from typing import Callable, Optional

import torch

from sglang_nsa_fused import reference
from sglang_nsa_fused.kernels import Engine
from sglang_nsa_fused.plan import Destination, ReplayPlan, Values
from sglang_nsa_fused.planners import NO_FORM, Planners
from sglang_nsa_fused.releases import Release


class Kept(Exception):
    """Why upstream's refresh stays."""


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(None)
def mode_of(forward_mode) -> Optional[int]:
    """The reference's number for upstream's ForwardMode; None for one that no graph is captured in."""
    if forward_mode.is_decode_or_idle():
        return reference.DECODE
    if forward_mode.is_target_verify():
        return reference.TARGET_VERIFY
    return reference.DRAFT_EXTEND if forward_mode.name.startswith("DRAFT_EXTEND") else None


def destination_of(release: Release, backend, metadata) -> Destination:
    """What a graph reads of this captured metadata."""
    *tensors, real_page_table = operator.attrgetter(*release.captured)(metadata)
    paged = getattr(backend, release.page_size) > 1  # with pages of one token both tables are the same tensor
    flashmla = metadata.flashmla_metadata
    return Destination(
        *tensors,
        real_page_table if paged else None,
        flashmla.num_splits if flashmla is not None else None,
        flashmla.flashmla_metadata if flashmla is not None else None,
        metadata.paged_mqa_schedule_metadata,
        getattr(metadata, release.captured_lens_2d) if release.captured_lens_2d else None,
        getattr(metadata, release.topk_v2_plan) if release.topk_v2_plan else None,
    )


def state_of(release: Release, backend, metadata) -> dict:
    """What each replay sets on this backend."""
    getattr(backend, release.set_prefill_impl)(forward_batch=None)
    return {"forward_metadata": metadata, **{name: getattr(backend, name) for name in release.prefill_impl_state}}


class Replay:
    """The plan of one captured batch size, and what is set on its backends. Raises Kept where upstream's replay stays."""

    def __init__(self, release: Release, planners: Planners, mode: int, backends: list, bs: int, engine: Engine):
        self.mode = mode
        self._release, self._planners = release, planners
        self._backend = backends[0]
        metadatas = [backend.decode_cuda_graph_metadata[bs] for backend in backends]
        self._states = [(vars(b), state_of(release, b, m)) for b, m in zip(backends, metadatas)]
        self._metadatas = list({id(metadata): metadata for metadata in metadatas}.values())  # steps may share one
        cache_lens, _, _, self._nsa_row_lens, expanded, *_ = release.captured
        self._row_lens = cache_lens if mode == reference.DECODE else expanded
        self._after: list[Callable[[int], None]] = []  # what the kernel may not write, with the batch size
        self.plan = self._generation([destination_of(release, self._backend, m) for m in self._metadatas], bs, engine)
        self._generate = self.plan.generate
        self.in_graph = False  # the launch is a node of the graph: a replay has none of its own

    def _generation(self, found: list[Destination], bs: int, engine: Engine) -> ReplayPlan:
        release, backend, planners = self._release, self._backend, self._planners
        first, rows = found[0], len(found[0].nsa_cache_seqlens)
        # Then its number of rows is known on the device alone.
        variable = self.mode == reference.DRAFT_EXTEND and release.accepted is not None
        # On Blackwell target verify is scheduled by requests, each with its length for every draft token.
        by_request = first.paged_mqa_ctx_lens_2d is not None and first.paged_mqa_ctx_lens_2d.shape[1] > 1
        form, flashmla, buckets, written = NO_FORM, None, (), {}
        if by_request:
            written["paged_mqa_ctx_lens_2d"] = None
            self._after.append(self._refresh_schedule_by_request)
        elif first.paged_mqa_schedule is not None:
            form = planners.schedule_form(rows, backend.device)
            if form is NO_FORM:
                self._after.append(self._refresh_schedule)
        if form is NO_FORM:
            written["paged_mqa_schedule"] = None
        if first.flashmla_num_splits is not None:
            flashmla = None if variable else planners.flashmla(backend, rows)
            if flashmla is None:
                self._after.append(self._refresh_flashmla)
                written |= {"flashmla_num_splits": None, "flashmla_metadata": None}
        if variable and self._after:
            raise Kept("a draft extend graph whose plan needs the number of rows keeps upstream's replay")
        if first.topk_v2_plan is not None:
            buckets = planners.topk_buckets(backend, rows)
            if buckets is None:
                self._after.append(self._refresh_topk_v2_plan)
        if not buckets:
            written["topk_v2_plan"] = None
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
        return ReplayPlan(self.mode, [one._replace(**written) for one in found], engine, values)

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
    def may_be_in_graph(self) -> bool:
        """Whether the launch is all that a replay of this batch size does on the device."""
        return not self._after

    def launch_in_graph(self, forward_batch) -> None:
        """The first work of a captured region. Its batch lies in the graph runner's buffers, which each replay fills before.

        The region also runs without a capture, to warm up.
        """
        self._generate(forward_batch.seq_lens, forward_batch.req_pool_indices, None, forward_batch.batch_size)
        self.in_graph |= is_capturing()

    def generate(self, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor, extend_lens, bs: int) -> None:
        """Writes what every backend's graph reads of this batch, unless a node of the graph does, and sets what upstream
        sets on the backends."""
        if not self.in_graph:
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


class PrecomputedCopy:
    """Copies what upstream has precomputed to one captured batch size of one backend, with the schedule of these lengths."""

    def __init__(self, release: Release, planners: Planners, mode: int, backend, bs: int, engine: Engine):
        self._release, self._planners, self._mode = release, planners, mode
        self._backend, self._metadata = backend, backend.decode_cuda_graph_metadata[bs]
        destination = destination_of(release, backend, self._metadata)
        self._has_schedule = destination.paged_mqa_schedule is not None
        self._has_topk_plan = destination.topk_v2_plan is not None
        self._state = state_of(release, backend, self._metadata)
        self._sources = operator.attrgetter(*release.precomputed)
        self._copy = ReplayPlan(mode, [destination[:10]], engine).copy

    def __call__(self, bs: int, precomputed) -> None:
        flashmla = precomputed.flashmla_metadata
        size = precomputed.seqlens_expanded_size
        schedule = None
        if self._has_schedule:
            lengths = precomputed.cache_seqlens if self._mode == reference.DECODE else precomputed.seqlens_expanded[:size]
            schedule = self._planners.schedule(lengths, bs)
        self._copy(
            *self._sources(precomputed),
            flashmla.num_splits if flashmla is not None else None,
            flashmla.flashmla_metadata if flashmla is not None else None,
            schedule,
            bs,
            precomputed.max_len,
            precomputed.max_seqlen_k,
            size,
        )
        if self._has_topk_plan:
            getattr(self._backend, self._release.refresh_topk_v2_plan)(self._metadata)
        vars(self._backend).update(self._state)
