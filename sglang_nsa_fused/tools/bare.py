"""Upstream's real step backends without a model and without a server, for the demo, the tests and the benchmarks.

Only what the metadata path reads is set on them; every method that runs is upstream's, or ours in its place.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import io
import sys
import types
import warnings
from types import SimpleNamespace

import torch

from sglang_nsa_fused import planners
from sglang_nsa_fused.releases import RELEASES, Release
from sglang_nsa_fused.tools import stand_ins, torch_forms, versions


def import_upstream(release: Release, device: str) -> types.ModuleType:
    """Imports the release's backend module, on a machine without a GPU too."""
    if device == "cpu":
        stand_ins.install(_version())
    with warnings.catch_warnings():
        if device == "cpu":
            warnings.simplefilter("ignore")  # of what needs a GPU
        module = importlib.import_module(release.module)
    # A draft extend asks for the size of a process group, and here there are none.
    setattr(module, f"pad_{release.names}_cache_seqlens", lambda forward_batch, lengths: lengths)
    return module


def gpu(release: Release, device: str, sm100: bool = False):
    """Inside, upstream's CUDA branches run: on a CPU over stand-ins for their kernels."""
    return stand_ins.cuda(release, sys.modules[release.module], sm100) if device == "cpu" else contextlib.nullcontext()


@functools.lru_cache(None)  # reading it takes 5 ms
def _version() -> str:
    return importlib.metadata.version("sglang")


def step_backend(cls: type, release: Release, device: str, req_to_token: torch.Tensor, draft_tokens: int, flashmla: bool):
    """A step backend of this class, made without its constructor, which needs a model.

    req_to_token: int32 [slots, columns]. flashmla: whether captured metadata holds FlashMLA's tile metadata.
    """
    backend, module = object.__new__(cls), sys.modules[release.module]
    values = stand_ins.attributes(release, _version(), module, device, req_to_token, draft_tokens, flashmla)
    for name, value in values.items():
        setattr(backend, name, value)
    if hasattr(backend, "_init_kpool_metadata_fusion"):  # sets the metadata generators
        backend._init_kpool_metadata_fusion()
    if flashmla and device == "cpu":
        backend._compute_flashmla_metadata = torch_forms.flashmla_metadata(module)
    return backend


def multi_step_backend(
    classes: tuple[type, type],
    release: Release,
    device: str,
    req_to_token: torch.Tensor,
    draft_steps: int,
    capture_bs: list[int],
    flashmla: bool = False,
):
    """A multi-step backend of this many draft steps with metadata captured for each batch size.

    Its `seq_lens` is the graph runner's buffer [max(capture_bs)]; an int32 one upstream's captured metadata shares.
    """
    backend_cls, multi_step_cls = classes
    multi = object.__new__(multi_step_cls)
    multi.topk = 1
    multi.speculative_num_steps = draft_steps
    multi.attn_backends = [
        step_backend(backend_cls, release, device, req_to_token, draft_steps + 1, flashmla)
        for _ in range(draft_steps - 1 + versions.of(_version()).spare_step)
    ]
    largest = max(capture_bs)
    multi.init_cuda_graph_state(largest, largest)
    multi.seq_lens = torch.ones(largest, dtype=versions.of(_version()).lengths, device=device)
    multi.req_pool_indices = torch.zeros(largest, dtype=torch.int64, device=device)
    for bs in sorted(capture_bs, reverse=True):
        batch = SimpleNamespace(
            batch_size=bs,
            forward_mode=sys.modules[release.module].ForwardMode.DECODE,
            req_pool_indices=multi.req_pool_indices[:bs],
            seq_lens=multi.seq_lens[:bs],
            seq_lens_cpu=torch.ones(bs, dtype=multi.seq_lens.dtype),
            seq_lens_sum=bs,
            spec_info=None,
        )
        if release.out_graph:
            multi.init_forward_metadata_out_graph(batch, in_capture=True)
        else:
            multi.init_forward_metadata_capture_cuda_graph(batch)
    return multi


def _on_host(lengths: list[int]) -> torch.Tensor | None:
    return torch.tensor(lengths, dtype=torch.int32) if versions.of(_version()).host_lengths else None


def forward_batch(multi, slots: list[int], lengths: list[int], bs: int) -> SimpleNamespace:
    """The batch as upstream's draft graph runner hands it over: padded to bs with length 1 in slot 0 where needed."""
    device, raw = multi.seq_lens.device, len(slots)
    seq_lens = torch.tensor(lengths, dtype=torch.int64, device=device)
    req_pool_indices = torch.tensor(slots, dtype=torch.int64, device=device)
    padded = lengths + [1] * (bs - raw)
    if bs != raw:
        multi.seq_lens.fill_(1)
        multi.req_pool_indices.zero_()
    multi.seq_lens[:raw].copy_(seq_lens)
    multi.req_pool_indices[:raw].copy_(req_pool_indices)
    if bs != raw:
        seq_lens, req_pool_indices = multi.seq_lens[:bs], multi.req_pool_indices[:bs]
    return SimpleNamespace(
        batch_size=bs,
        req_pool_indices=req_pool_indices,
        seq_lens=seq_lens,
        seq_lens_cpu=_on_host(padded),
        seq_lens_sum=sum(padded),
        spec_info=None,
    )


def replay(multi, batch: SimpleNamespace) -> None:
    """One replay. Upstream prints on every fallback, which on a CPU is each call: that stays unseen."""
    quiet = contextlib.redirect_stdout(io.StringIO()) if multi.seq_lens.device.type == "cpu" else contextlib.nullcontext()
    with quiet:
        if hasattr(multi, "init_forward_metadata_replay_cuda_graph"):
            multi.init_forward_metadata_replay_cuda_graph(batch, batch.batch_size)
        else:
            multi.init_forward_metadata_out_graph(batch)


def graph_backend(
    cls: type,
    module: types.ModuleType,
    release: Release,
    device: str,
    req_to_token: torch.Tensor,
    draft_tokens: int,
    mode: str,
    capture_bs: list[int],
    flashmla: bool = False,
):
    """A step backend as a graph runner holds it: captured for each batch size in this ForwardMode.

    Its `graph_lens` and `graph_slots` are the runner's buffers [max(capture_bs)].
    """
    backend = step_backend(cls, release, device, req_to_token, draft_tokens, flashmla)
    largest = max(capture_bs)
    rows = 1 if mode == "DECODE" else draft_tokens
    backend.init_cuda_graph_state(largest, largest * rows)
    backend.graph_lens = torch.ones(largest, dtype=versions.of(_version()).lengths, device=device)
    backend.graph_slots = torch.zeros(largest, dtype=torch.int64, device=device)
    for bs in sorted(capture_bs, reverse=True):
        capture(backend, module, release, mode, bs)
    return backend


def capture(backend, module: types.ModuleType, release: Release, mode: str, bs: int) -> None:
    slots, lengths, forward_mode = backend.graph_slots[:bs], backend.graph_lens[:bs], module.ForwardMode[mode]
    if release.out_graph:
        batch = dict(batch_size=bs, req_pool_indices=slots, seq_lens=lengths, forward_mode=forward_mode, spec_info=None)
        backend.init_forward_metadata_out_graph(SimpleNamespace(**batch), in_capture=True)
    else:
        rows = bs if mode == "DECODE" else bs * backend.speculative_num_draft_tokens
        backend.init_forward_metadata_capture_cuda_graph(bs, rows, slots, lengths, None, forward_mode, None)


def graph_batch(
    backend,
    module: types.ModuleType,
    mode: str,
    slots: list[int],
    lengths: list[int],
    bs: int,
    accepted: list[int] = (),
    accepted_dtype: torch.dtype = torch.int32,
) -> dict:
    """The arguments of `replay_graph`, from the runner's buffers, padded to bs as upstream's runners pad."""
    raw, device = len(slots), backend.graph_lens.device
    lengths = lengths + [1] * (bs - raw)
    backend.graph_lens[:bs].copy_(torch.tensor(lengths, dtype=torch.int32))
    backend.graph_slots[:bs].copy_(torch.tensor(slots + [0] * (bs - raw)))
    spec_info = None
    if accepted:
        accepted = list(accepted) + [backend.speculative_num_draft_tokens] * (bs - raw)
        accepted = torch.tensor(accepted, dtype=accepted_dtype, device=device)
        spec_info = SimpleNamespace(**{release.accepted: accepted for release in RELEASES if release.accepted})
    return dict(
        bs=bs,
        req_pool_indices=backend.graph_slots[:bs],
        seq_lens=backend.graph_lens[:bs],
        seq_lens_sum=sum(lengths),
        encoder_lens=None,
        forward_mode=module.ForwardMode[mode],
        spec_info=spec_info,
        seq_lens_cpu=_on_host(lengths),
    )


def replay_graph(backend, batch: dict) -> None:
    """One replay of a step backend as a graph runner calls it."""
    if hasattr(backend, "init_forward_metadata_replay_cuda_graph"):
        backend.init_forward_metadata_replay_cuda_graph(**batch)
    else:
        backend.init_forward_metadata_out_graph(SimpleNamespace(**batch, batch_size=batch["bs"]))


def static_batch(backend, module: types.ModuleType, mode: str, bs: int) -> SimpleNamespace:
    """The batch that a graph runner captures with: views of its buffers."""
    multi = hasattr(backend, "attn_backends")
    lengths, slots = (backend.seq_lens, backend.req_pool_indices) if multi else (backend.graph_lens, backend.graph_slots)
    return SimpleNamespace(
        batch_size=bs,
        forward_mode=module.ForwardMode[mode],
        seq_lens=lengths[:bs],
        req_pool_indices=slots[:bs],
        spec_info=None,
    )


def draft_extend_batch(
    backend, module: types.ModuleType, mode: str, slots: list[int], lengths: list[int], accepted: list[int] = ()
) -> SimpleNamespace:
    """The batch of a draft extend without a graph: DRAFT_EXTEND_V2 with all draft tokens, or DRAFT_EXTEND with these."""
    device = backend.req_to_token.device
    accepted = list(accepted) or [backend.speculative_num_draft_tokens] * len(slots)
    return SimpleNamespace(
        forward_mode=module.ForwardMode[mode],
        batch_size=len(slots),
        seq_lens=torch.tensor(lengths, device=device),
        seq_lens_cpu=torch.tensor(lengths),
        seq_lens_sum=sum(lengths),
        req_pool_indices=torch.tensor(slots, device=device),
        req_to_token_pool=SimpleNamespace(req_to_token=backend.req_to_token),
        extend_seq_lens=torch.tensor(accepted, dtype=torch.int32, device=device),
        extend_seq_lens_cpu=accepted,
        extend_prefix_lens_cpu=[length - rows for length, rows in zip(lengths, accepted)],
        extend_num_tokens=sum(accepted),
        global_num_tokens_cpu=None,
        spec_info=None,
    )


def fields(metadata, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the captured graph reads, by name: whole vectors, and the live prefix of each row of the tables.

    lengths: int [rows], the live tokens of each row.
    """
    found = {}
    n = "nsa" if hasattr(metadata, "nsa_cache_seqlens_int32") else "dsa"
    for name in (
        "cache_seqlens_int32",
        "cu_seqlens_k",
        f"{n}_cache_seqlens_int32",
        f"{n}_seqlens_expanded",
        f"{n}_cu_seqlens_k",
        "paged_mqa_schedule_metadata",
        "paged_mqa_ctx_lens_2d",
    ):
        if getattr(metadata, name, None) is not None:
            found[name] = getattr(metadata, name).clone()
    plan = getattr(metadata, "topk_v2_plan", None)
    unwritten = plan is not None and plan.is_cuda and len(plan) <= 1 + 30 and not versions.of(_version()).small_plans
    if plan is not None and not unwritten:
        # Its rows come in any order, and behind them it is as the allocator had it.
        head, *rows = plan.tolist()
        if any(head[0] == threshold for buckets in planners.TOPK_BUCKETS for threshold, _ in buckets):
            found["topk_v2_plan"] = torch.tensor([head, *sorted(rows[: head[1]])])
    for name, page in (("page_table_1", 1), ("real_page_table", 64)):
        table = getattr(metadata, name)
        if table is None:
            continue
        live = torch.arange(table.shape[1], device=table.device) < ((lengths.view(-1, 1) + page - 1) // page)
        found[name] = torch.where(live, table[: len(lengths)], -1)
    if metadata.flashmla_metadata is not None:
        found["flashmla_num_splits"] = metadata.flashmla_metadata.num_splits.clone()
        # Columns 5 to 7 are padding that FlashMLA's planner leaves as the allocator had it.
        found["flashmla_metadata"] = metadata.flashmla_metadata.flashmla_metadata[:, :5].clone()
    return found


def both_fields(upstreams, ours, lengths: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`fields` of two sides, without the wide page table where ours has none."""
    expected, found = fields(upstreams, lengths), fields(ours, lengths)
    if ours.page_table_1 is None:
        expected.pop("page_table_1", None)
    return expected, found
