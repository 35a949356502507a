"""What is said of the memory of page tables is what this release's classes allocate."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from upstream import page_tables

from sglang_nsa_fused import plugin
from sglang_nsa_fused.tools import bare, doctor, table_memory

CONTEXT, MAX_BS, TOKENS = 1000, 12, 4  # an odd number of pages


def test_bytes_of_tables_are_what_is_allocated(upstream, deep_gemm):
    release, device = upstream.release, upstream.device
    if release.drop_wide_table is None:
        with pytest.raises(plugin.Unsupported, match=f"they stay as they are: .*, this is {upstream.version}"):
            doctor.page_tables(CONTEXT, MAX_BS, TOKENS)
        return
    pool = torch.zeros(MAX_BS + 1, table_memory.columns(CONTEXT, TOKENS), dtype=torch.int32, device=device)
    sizes = table_memory.capture_sizes(MAX_BS)
    verify, steps, extend, total = doctor.page_tables(CONTEXT, MAX_BS, TOKENS)
    for side, classes in (("upstream", upstream.classes), ("ours", upstream.fused())):

        def graphs(mode: str):
            return bare.graph_backend(classes[0], upstream.module, release, device, pool, TOKENS, mode, sizes)

        multi = bare.multi_step_backend(classes, release, device, pool, TOKENS - 1, sizes)
        for held, backend in ((verify, graphs("TARGET_VERIFY")), (steps, multi), (extend, graphs("DRAFT_EXTEND_V2"))):
            assert getattr(held, side) == sum(page_tables(backend).values())
    assert total == ("sum", verify.upstream + steps.upstream + extend.upstream, verify.ours + steps.ours + extend.ours)


def test_one_draft_step_has_no_tables_of_its_own():
    _, steps, _ = table_memory.tables(CONTEXT, MAX_BS, 2)
    assert steps == ("draft steps", 0, 0)


@pytest.mark.parametrize("max_bs", [1, 9, 64, 256, 300])
def test_captured_sizes_are_upstreams(upstream, max_bs):
    if upstream.release.drop_wide_table is None:
        return
    args = SimpleNamespace(disable_cuda_graph_padding=False, speculative_algorithm="EAGLE")
    try:
        of = importlib.import_module("sglang.srt.arg_groups.cuda_graph_hook").generate_decode_cuda_graph_batch_sizes
    except (AttributeError, ImportError):
        of = importlib.import_module("sglang.srt.server_args").ServerArgs._generate_decode_cuda_graph_batch_sizes
    assert table_memory.capture_sizes(max_bs) == sorted(of(args, max_bs))
