"""Finds and loads the native library; thin typed functions over it. Nothing else knows tvm-ffi."""

import functools
import re
import struct
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import torch

from sglang_nsa_fused import self_check


class Engine(NamedTuple):
    """What copies and generates, chosen once per device type."""

    name: str  # "native", "sgl_kernel", which copies alone, or "none"
    # (mode, destinations) -> function of 10 sources, bs, max_len, max_seqlen_k, expanded size; None: upstream copies
    copy_plan: Optional[Callable] = None
    reason: str = ""  # why nothing better was chosen
    # (mode, Values, destinations) -> function of seq_lens, req_pool_indices, extend_lens, bs; None: it only copies
    generate_plan: Optional[Callable] = None
    # (Values, num_sms) -> function of a draft extend, see `_native_draft_extend_plan`; None: it only copies
    draft_extend_plan: Optional[Callable] = None


LIBRARY = Path(__file__).with_name("libnsa_fused.so")


@functools.lru_cache(None)
def library():
    """The native library. Raises RuntimeError, saying why and what to do, where it cannot be loaded."""
    try:
        tvm_ffi_version()
        import tvm_ffi

        _check_file(LIBRARY)
        return tvm_ffi.load_module(str(LIBRARY))
    except Exception as error:  # a missing package, a missing file or a loader's error: all end in the same message
        raise RuntimeError(
            f"the native library cannot be loaded ({type(error).__name__}: {error}); reinstall sglang-nsa-fused"
        ) from error


def tvm_ffi_version() -> str:
    """The installed one. Raises RuntimeError where it is none that the library was built for: it may load and then crash."""
    version = metadata.version("apache-tvm-ffi")
    if not (0, 1, 9) <= tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < (0, 2):
        raise RuntimeError(f"apache-tvm-ffi is {version}; pip install 'apache-tvm-ffi>=0.1.9,<0.2'")
    return version


def _check_file(path: Path) -> None:
    """Raises ValueError for an ELF file that ends before what its headers name, since to open it may end the process, and for
    one of another processor, which the loader takes for missing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path}: expected a 64-bit ELF file, got {size} bytes that are none")
        with open("/proc/self/exe", "rb") as python:
            mine, its = (struct.unpack_from("<H", head, 18)[0] for head in (python.read(20), header))
        if mine != its:
            raise ValueError(f"{path}: expected ELF machine {mine} as this Python's, got {its}: it is for another processor")
        segments_at, sections_at = struct.unpack_from("<2Q", header, 32)
        segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", header, 54)
        ends = [segments_at + segment_size * segment_count, sections_at + section_size * section_count]
        file.seek(segments_at)
        table = file.read(segment_size * segment_count)
    if len(table) == segment_size * segment_count:
        for at in range(0, len(table), segment_size):
            offset, in_file = struct.unpack_from("<8xQ16xQ", table, at)
            ends.append(offset + in_file)
    if size < max(ends):
        raise ValueError(f"{path}: expected {max(ends)} bytes, got {size}: it was not copied whole")


def cuda_archs() -> list[str]:
    """GPU architectures compiled into the native library, such as sm_90; empty for a CPU build."""
    return str(library().cuda_archs()).split()


def fused_metadata_copy_cuda(
    cache_seqlens_src: torch.Tensor,
    cu_seqlens_k_src: torch.Tensor,
    page_indices_src: torch.Tensor,
    nsa_cache_seqlens_src: torch.Tensor,
    seqlens_expanded_src: Optional[torch.Tensor],
    nsa_cu_seqlens_k_src: torch.Tensor,
    real_page_table_src: Optional[torch.Tensor],
    flashmla_num_splits_src: Optional[torch.Tensor],
    flashmla_metadata_src: Optional[torch.Tensor],
    cache_seqlens_dst: torch.Tensor,
    cu_seqlens_k_dst: torch.Tensor,
    page_table_1_dst: torch.Tensor,
    nsa_cache_seqlens_dst: torch.Tensor,
    seqlens_expanded_dst: Optional[torch.Tensor],
    nsa_cu_seqlens_k_dst: torch.Tensor,
    real_page_table_dst: Optional[torch.Tensor],
    flashmla_num_splits_dst: Optional[torch.Tensor],
    flashmla_metadata_dst: Optional[torch.Tensor],
    forward_mode: int,
    bs: int,
    max_len: int,
    max_seqlen_k: int,
    seqlens_expanded_size: int,
) -> None:
    """Copies precomputed metadata to one step backend in one launch, as sglang's function of this name.

    All tensors are int32, on one CUDA device (or all on the CPU), with last stride 1; n is bs in decode and
    seqlens_expanded_size otherwise. Sources and destinations, in this order: cache_seqlens [bs],
    cu_seqlens_k [bs + 1] of which element 0 is not written, page table [rows, columns], nsa_cache_seqlens [n],
    seqlens_expanded [n] (not in decode), nsa_cu_seqlens_k [n + 1] of which element 0 is not written,
    real_page_table [rows, pages], flashmla_num_splits [n + 1], flashmla_metadata (whole). Destinations may be larger.

    forward_mode: 0 decode, 1 target verify, 2 draft extend. max_len: columns in decode; max_seqlen_k: in the others.
    Runs on torch's current stream and can be captured. Raises TypeError or ValueError before anything is written.
    """
    library().fused_metadata_copy(
        cache_seqlens_src,
        cu_seqlens_k_src,
        page_indices_src,
        nsa_cache_seqlens_src,
        seqlens_expanded_src,
        nsa_cu_seqlens_k_src,
        real_page_table_src,
        flashmla_num_splits_src,
        flashmla_metadata_src,
        cache_seqlens_dst,
        cu_seqlens_k_dst,
        page_table_1_dst,
        nsa_cache_seqlens_dst,
        seqlens_expanded_dst,
        nsa_cu_seqlens_k_dst,
        real_page_table_dst,
        flashmla_num_splits_dst,
        flashmla_metadata_dst,
        forward_mode,
        bs,
        max_len,
        max_seqlen_k,
        seqlens_expanded_size,
    )


def fused_metadata_copy_multi_cuda(*args) -> None:
    """Copies precomputed decode metadata to three step backends in one launch, as sglang's function of this name.

    35 positional arguments: 8 sources, 3 x 8 destinations (those of `fused_metadata_copy_cuda` without
    seqlens_expanded), bs, max_len, seqlens_expanded_size. A tensor that several destinations share is written once.
    Raises as `fused_metadata_copy_cuda`.
    """
    library().fused_metadata_copy_multi(*args)


def _owner(owned: Sequence) -> SimpleNamespace:
    """What a native function holds to keep these alive: any object that tvm-ffi takes for none of its own."""
    return SimpleNamespace(owned=owned)


def _native_plan(mode: int, destinations: Sequence[Sequence[Optional[torch.Tensor]]]) -> Callable:
    tensors = [tensor for destination in destinations for tensor in destination]
    copy = library().copy_plan(_owner(tensors), mode, *tensors)
    copy.release_gil = False  # a launch takes less time than handing the lock over
    return copy


def _native_generate_plan(mode: int, values, destinations: Sequence[Sequence[Optional[torch.Tensor]]]) -> Callable:
    generate = library().generate_plan(
        _owner((values, *map(tuple, destinations))),
        mode,
        *(values.bs, values.rows, values.num_draft_tokens, values.nsa_index_topk, values.page_size),
        *(values.segment_len, values.extra_last, values.row_floor),
        tuple(number for bucket in values.topk_buckets for number in bucket),
        *(values.req_to_token, values.num_splits, values.tile_metadata),
        *(tensor for destination in destinations for tensor in destination),
    )
    generate.release_gil = False
    return generate


def workspace_sizes(bs: int, rows: int, cols: int, pages: int, schedule: int) -> tuple[int, ...]:
    """Elements of the schedule [num_sms + 1, 2], 0 without one, page_table_1 [rows, cols], real_page_table [rows, pages],
    cache_seqlens [bs], cu_seqlens_k [bs + 1], seqlens_expanded [rows], nsa_cache_seqlens [rows], nsa_cu_seqlens_k [rows + 1]."""
    return schedule, rows * cols, rows * pages, bs, bs + 1, rows, rows, rows + 1


def _native_draft_extend_plan(values, num_sms: int) -> Callable:
    """A function of seq_lens, req_pool_indices, extend_lens or None, bs, workspace, rows, cols that writes a draft extend's
    metadata.

    values: bs and rows are those of each call, and not read here. num_sms: of the schedule.
    workspace: int32, all of `workspace_sizes` one after another. Both raise as `ReplayPlan` and its `generate`.
    """
    generate = library().draft_extend_plan(
        _owner(values),
        *(values.req_to_token, values.num_draft_tokens, values.nsa_index_topk, values.page_size),
        *(values.segment_len, values.extra_last, values.row_floor, num_sms),
    )
    generate.release_gil = False
    return generate


def _sgl_kernel_plan(mode: int, destinations: Sequence[Sequence]) -> Callable:
    from sgl_kernel import fused_metadata_copy_cuda as copy_one

    def replay(*args):
        *sources, schedule = args[:10]
        for *destination, schedule_dst in destinations:
            copy_one(*sources, *destination, mode, *args[10:])
            if schedule is not None:
                schedule_dst.copy_(schedule)

    return replay


@functools.lru_cache(None)
def select(device_type: str) -> Engine:
    """The best engine that works on this device type ("cuda" or "cpu"): each is tried once, against the reference.

    Raises RuntimeError, and decides nothing, where it is first asked while a CUDA graph is captured: none can be tried then.
    """
    if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("no kernel can be tried while a CUDA graph is captured; make a plan on this GPU once before")
    candidates = [("native", _native_plan)]
    if device_type == "cuda":
        candidates.append(("sgl_kernel", _sgl_kernel_plan))
    reasons = []
    for name, copy_plan in candidates:
        try:
            self_check.copy(copy_plan, device_type)
            if name == "native":
                self_check.generate(_native_generate_plan, device_type)
        except Exception as error:  # the reason is handed on: the caller warns, or ends the process
            reasons.append(f"{name}: {error}")
        else:
            if name == "native":
                return Engine(name, copy_plan, "", _native_generate_plan, _native_draft_extend_plan)
            return Engine(name, copy_plan, "; ".join(reasons))
    return Engine("none", reason="; ".join(reasons))
