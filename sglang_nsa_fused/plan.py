"""The destinations of one captured batch size, checked and packed once at capture."""

from collections.abc import Callable, Sequence
from typing import Optional

import torch

from sglang_nsa_fused.kernels import Engine, select


class ReplayPlan:
    """Copies precomputed metadata to 1 to 16 step backends in one launch.

    mode: 0 decode, 1 target verify, 2 draft extend.
    destinations: for each step backend ten int32 tensors or None, in the order of `fused_metadata_copy_cuda`'s
        destinations, then paged_mqa_schedule. All on one device, each in its own memory; a tensor that several
        backends share in the same place is written once. Kept alive by the plan.
    engine: what carries the copy out; None: the best for their device.

    Raises TypeError or ValueError, naming the parameter and the destination's number, for tensors that do not fit.
    """

    __slots__ = ("mode", "destinations", "copy")

    copy: Callable
    """(10 sources or None, bs, max_len, max_seqlen_k, seqlens_expanded_size): raises as `fused_metadata_copy_cuda`,
    before anything is written. An attribute and not a method: a replay pays for one call, not two."""

    def __init__(
        self,
        mode: int,
        destinations: Sequence[Sequence[Optional[torch.Tensor]]],
        engine: Optional[Engine] = None,
    ):
        if not 1 <= len(destinations) <= 16:
            raise ValueError(f"destinations: expected 1 to 16, got {len(destinations)}")
        for number, destination in enumerate(destinations):
            if len(destination) != 10:
                raise ValueError(f"destinations: expected 10 tensors or None each, got {len(destination)} in {number}")
        self.mode = mode
        self.destinations = [tuple(destination) for destination in destinations]
        engine = engine or select(destinations[0][0].device.type)
        self.copy = engine.copy_plan(mode, self.destinations)
