"""The destinations of one captured batch size, checked and packed once at capture."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch

from sglang_nsa_fused.kernels import Engine, select


class Destination(NamedTuple):
    """What one step backend's graph reads, int32, in the library's order; None: not there, or not written. n is bs in decode,
    else the captured rows."""

    cache_seqlens: Optional[torch.Tensor] = None  # [bs]
    cu_seqlens_k: Optional[torch.Tensor] = None  # [bs + 1]
    page_table_1: Optional[torch.Tensor] = None  # [n, columns], a column for each token
    nsa_cache_seqlens: Optional[torch.Tensor] = None  # [n]
    seqlens_expanded: Optional[torch.Tensor] = None  # [n]
    nsa_cu_seqlens_k: Optional[torch.Tensor] = None  # [n + 1]
    real_page_table: Optional[torch.Tensor] = None  # [n, pages]
    flashmla_num_splits: Optional[torch.Tensor] = None  # [n + 1]
    flashmla_metadata: Optional[torch.Tensor] = None  # [num_sm_parts, 8]
    paged_mqa_schedule: Optional[torch.Tensor] = None  # [num_sms + 1, 2]
    paged_mqa_ctx_lens_2d: Optional[torch.Tensor] = None  # [n, 1]; generated, never copied
    topk_v2_plan: Optional[torch.Tensor] = None  # [n + 1, 2]; generated, never copied


class Values(NamedTuple):
    """What generated metadata is made from besides the batch."""

    req_to_token: torch.Tensor  # int32 [slots, columns], the runner's pool
    bs: int  # captured requests
    rows: int  # captured rows: bs in decode, bs * num_draft_tokens in target verify
    num_draft_tokens: int  # rows of a request in target verify, and in draft extend without extend_lens
    nsa_index_topk: int
    page_size: int
    segment_len: int = 0  # tokens that DeepGEMM schedules as one; 0: no destination holds a schedule
    extra_last: bool = False  # the SMs with one segment more are the last ones, as from DeepGEMM 0.1.4 on, not the first
    num_splits: Optional[torch.Tensor] = None  # int32 [rows + 1], FlashMLA's for this number of rows
    tile_metadata: Optional[torch.Tensor] = None  # int32 [num_sm_parts, 8]
    row_floor: int = -(1 << 31)  # of draft extend: the least length of a row
    topk_buckets: tuple[tuple[int, int], ...] = ()  # (threshold, most rows) of sglang's top-k v2, rising; none: no plan of it


class ReplayPlan:
    """Refreshes the metadata of 1 to 16 step backends in one launch: copied, or generated where `values` are given.

    mode: 0 decode, 1 target verify, 2 draft extend.
    destinations: a `Destination` for each step backend, of which any tensor may be None; to copy, its first ten, those that
        have a source. All on one device, each in its own memory; a tensor that several backends share in the same place is
        written once. These, and the tensors of `values`, are kept alive by `copy` and `generate`.
    engine: what carries it out; None: the native library.
    values: what does not change from replay to replay; None: the plan copies.

    Raises TypeError or ValueError, naming the parameter and the destination's number, for tensors that do not fit;
    RuntimeError where the native library is missing or does not work on their device.
    """

    __slots__ = ("mode", "destinations", "values", "copy", "generate")

    copy: Callable
    """(10 sources or None, bs, max_len, max_seqlen_k, seqlens_expanded_size): raises as `fused_metadata_copy_cuda`,
    before anything is written. An attribute and not a method, as the next: a replay pays for one call, not two."""

    generate: Callable
    """(seq_lens, req_pool_indices, extend_lens, bs): seq_lens and req_pool_indices int32 or int64 [>= bs], extend_lens
    int32 [>= bs] or None. Cumulative lengths begin with 0; table rows are written as far as their request's cache
    length, and never beyond the table. Raises TypeError or ValueError before the launch. What only the device sees: a
    request of length 0 or 1, which is padding, may name a slot outside req_to_token and takes slot 0; a longer one that
    does, and more rows than captured, trap there and end the process (on the CPU they raise ValueError)."""

    def __init__(
        self,
        mode: int,
        destinations: Sequence[Sequence[Optional[torch.Tensor]]],
        engine: Optional[Engine] = None,
        values: Optional[Values] = None,
    ):
        if not 1 <= len(destinations) <= 16:
            raise ValueError(f"destinations: expected 1 to 16, got {len(destinations)}")
        count = 10 if values is None else 12
        for number, destination in enumerate(destinations):
            if len(destination) != count:
                raise ValueError(f"destinations: expected {count} tensors or None each, got {len(destination)} in {number}")
        self.mode = mode
        self.destinations = [tuple(destination) for destination in destinations]
        self.values = values
        if values is None:
            if not isinstance(lengths := self.destinations[0][0], torch.Tensor):
                raise TypeError(f"cache_seqlens_dst of destination 0: expected an int32 tensor, got {type(lengths).__name__}")
            copy_plan = (engine or _native(lengths.device.type)).copy_plan
            if copy_plan is None:
                raise ValueError("engine: expected one that copies, got none")
            self.copy = copy_plan(mode, self.destinations)
            return
        if not isinstance(values, Values):
            raise TypeError(f"values: expected Values or None, got {type(values).__name__}")
        if not isinstance(values.req_to_token, torch.Tensor):
            raise TypeError(f"req_to_token: expected an int32 tensor, got {type(values.req_to_token).__name__}")
        generate_plan = (engine or _native(values.req_to_token.device.type)).generate_plan
        if generate_plan is None:
            raise ValueError("engine: expected one that generates, which the native library alone does")
        self.generate = generate_plan(mode, values, self.destinations)


def _native(device_type: str) -> Engine:
    engine = select(device_type)
    if engine.name != "native":
        raise RuntimeError(f"no native library for {device_type} ({engine.reason}); reinstall sglang-nsa-fused where nvcc is")
    return engine
