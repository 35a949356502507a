"""What the subclasses of one process share: what is decided once, before anything is served."""

import contextlib
import functools
import importlib
import logging
import sys
from types import ModuleType
from typing import Optional

import torch

from sglang_nsa_fused import __version__, buffers, indexer, reference, releases, start_check
from sglang_nsa_fused.draft_extend import DraftExtend
from sglang_nsa_fused.kernels import Engine, select
from sglang_nsa_fused.planners import Planners
from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.replay import Kept, PrecomputedCopy, Replay, mode_of
from sglang_nsa_fused.settings import VERIFY, Settings
from sglang_nsa_fused.verify import verified

logger = logging.getLogger("sglang_nsa_fused")


class Hooks:
    def __init__(self, release: Release, module: ModuleType, version: str, settings: Settings):
        self.release, self.module = release, module
        self._version, self._settings = version, settings
        self._upstream = getattr(module, release.backend)
        self.not_allocated = buffers.NotAllocated()
        self.decided = functools.lru_cache(None)(self._decided)
        self.say_eager = functools.lru_cache(None)(self._say_eager)

    def _decided(self, device_type: str) -> tuple[Engine, Planners]:
        """Decided before the first capture: by then logging works and the device is known."""
        release, engine = self.release, select(device_type)
        if engine.generate_plan is None:
            left = (
                "copies of the draft steps are sgl_kernel's, the rest sglang's" if engine.copy_plan else "sglang runs unchanged"
            )
            self.refuse(f"no native library for {device_type} ({engine.reason}); {left}")
            return engine, Planners(release, self.module, engine)
        if self._settings.verify:
            engine = verified(engine)
            logger.warning("sglang-nsa-fused: each replay is compared with the reference and waits for the GPU (%s)", VERIFY)
        device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
        logger.info(
            "sglang-nsa-fused %s active: sglang %s, %s, %s generates; replaces %s and %s",
            *(__version__, self._version, device, engine.name, release.backend, release.multi_step),
        )
        self._give_all_rows(device_type)
        return engine, Planners(release, self.module, engine)

    def _give_all_rows(self, device_type: str) -> None:
        """Before the first capture upstream's model has imported its indexer."""
        name = self.release.indexer
        if name is None or not self._known or self._settings.keep_chunks or device_type != "cuda":
            return
        cls = getattr(sys.modules.get(name), "Indexer", None)
        if cls is None or torch.cuda.get_device_capability()[0] != 9:  # of other GPUs nobody knows that DeepGEMM takes all
            return
        try:
            indexer.give_all_rows(cls)
            logger.info("sglang-nsa-fused: DeepGEMM gets all rows of the indexer's logits in one call")
        except Kept as kept:
            self.refuse(str(kept))

    @property
    def _known(self) -> bool:
        return releases.find(self._version) is not None

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

    def verify_mask(self, backend, max_bs: int):
        """What says that a verify reads no mask, so that a draft fills none as wide as the context; None where upstream has no
        such thing, or where this backend is upstream's."""
        engine, _ = self.decisions(backend)
        name, draft_tokens = self.release.verify_mask, getattr(backend, self.release.draft_tokens)
        if not (name and self._known and draft_tokens and engine.generate_plan):
            return None
        module = importlib.import_module(name)
        if lacks := start_check.lacking(module, "maybe_create_verify_mask", releases.VERIFY_MASK):
            self.refuse(f"sglang was changed: expected {name}.{lacks}; reinstall sglang")
            return None
        # The context counts for a mask that is read.
        return module.maybe_create_verify_mask(
            is_draft_runner=False,
            skip_prefill=False,
            max_bs=max_bs,
            max_context_len=0,
            num_draft_tokens=draft_tokens,
            device=backend.device,
            is_read=False,
        )

    def has_wide_table(self, backend) -> bool:
        return not (self.release.drop_wide_table and getattr(backend, self.release.drop_wide_table))

    def spared(self, backend, max_rows: int) -> int:
        """Bytes of the wide page table that this backend, with graphs of so many rows, does not have."""
        if self.has_wide_table(backend) or not self.speculates(backend):
            return 0
        return buffers.not_allocated(backend, getattr(backend, self.release.req_to_token), max_rows)

    def capture(self, mode: Optional[int], backends: list, bs: int) -> Optional[Replay]:
        """None where this batch size keeps upstream's replay."""
        first, release = backends[0], self.release
        if mode is None or (mode == reference.DRAFT_EXTEND and not release.draft_extend):
            return None
        # Without speculation upstream drops the wide table by itself and writes the other with one kernel of its own.
        if not self.has_wide_table(first) and not self.speculates(first):
            return None
        engine, planners = self.decisions(first)
        if engine.generate_plan is None:  # said once
            return None
        try:
            if self.is_pooled(first):
                raise Kept("an index with pooled keys keeps upstream's replays")
            return Replay(release, planners, mode, backends, bs, engine)
        except Kept as kept:
            self.refuse(str(kept))
        except Exception as error:  # at capture anything may be: upstream serves this batch size
            self.refuse(f"batch size {bs} keeps upstream's replay: {_text(error)}")
        return None

    def copy(self, forward_mode, backend, bs: int) -> Optional[PrecomputedCopy]:
        """None where upstream copies."""
        engine, planners = self.decisions(backend)
        mode, release = mode_of(forward_mode), self.release
        # Upstream's precomputation knows DeepGEMM's lengths of the draft steps alone, which are its cache lengths. Of draft
        # extend v2 it copies no page table. Without the wide table there is nothing that it precomputes.
        known = mode == reference.DECODE or (release.captured_lens_2d is None and not forward_mode.is_draft_extend_v2())
        if engine.copy_plan is None or mode is None or not known or self.is_pooled(backend) or not self.has_wide_table(backend):
            return None
        try:
            return PrecomputedCopy(release, planners, mode, backend, bs, engine)
        except Exception as error:  # decided once, at the first call
            self.refuse(f"batch size {bs} keeps upstream's copies: {_text(error)}")
            return None

    def launch_in_graph(self, replay: Optional[Replay], forward_batch) -> None:
        """Called as the first work of a region that is captured, or warmed up. Where a graph may not hold the launch it stays
        before the graph."""
        if replay is None or mode_of(forward_batch.forward_mode) != replay.mode:
            return
        # Half a batch, of two that overlap: each replay slices the whole one anew.
        half = getattr(forward_batch, "tbo_parent_token_range", None) is not None
        fenced = replay.mode != reference.DRAFT_EXTEND or self.release.draft_extend_reads
        if self._settings.before_graph or self._settings.verify or half or not fenced or not replay.may_be_in_graph:
            return
        try:
            replay.launch_in_graph(forward_batch)
        except Exception as error:
            logger.warning("sglang-nsa-fused: a launch stays before its graph: %s", _text(error))

    def say_where(self, runner: str, replays: dict[int, Optional[Replay]]) -> None:
        inside = sum(replay is not None and replay.in_graph for replay in replays.values())
        before = len(replays) - inside - list(replays.values()).count(None)
        counts = f"in the graphs of {inside} batch sizes, before those of {before}"
        logger.info("sglang-nsa-fused: %s: the launch is %s; %d keep sglang's", runner, counts, len(replays) - inside - before)

    @staticmethod
    def _say_eager(reason: str) -> None:
        logger.info("sglang-nsa-fused: a draft extend without a graph is sglang's own: %s", reason)

    def draft_extend(self, backend) -> Optional[DraftExtend]:
        """What makes the metadata of a draft extend without a graph; None: upstream does."""
        engine, planners = self.decisions(backend)
        release = self.release
        sharded = release.kv_shard_pool is not None and getattr(backend, release.kv_shard_pool) is not None
        paged = getattr(backend, release.page_size) > 1
        if engine.draft_extend_plan is None or not paged:
            return None
        try:
            if sharded or self.is_pooled(backend):
                raise Kept(f"{'a sharded cache' if sharded else 'an index with pooled keys'} keeps upstream's draft extend")
            return DraftExtend(release, self.module, planners, engine, backend)
        except Kept as kept:
            self.refuse(str(kept))
        except Exception as error:
            self.refuse(f"a draft extend without a graph keeps upstream's metadata: {_text(error)}")
        return None

    def refuse(self, finding: str) -> None:
        _refuse(finding, self._settings)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, (RuntimeError, TypeError, ValueError)) else f"{type(error).__name__}: {error}"


@functools.lru_cache(None)
def _refuse(finding: str, settings: Settings) -> None:
    """Says once what keeps upstream's refresh, or ends the process where the user requires ours."""
    if settings.required:
        raise SystemExit(f"sglang-nsa-fused: {finding}")
    logger.warning("sglang-nsa-fused: %s", finding)
