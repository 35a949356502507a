"""The benchmark's probe reads this release's classes."""

import gc
from functools import partialmethod

import pytest
import torch
from upstream import CAPTURE_BS, live_bytes, page_tables

from sglang_nsa_fused.tools.bench import probe


def test_kinds_of_forward_modes(upstream):
    modes = upstream.module.ForwardMode
    assert probe.kind_of(modes.DECODE) == "decode" and probe.kind_of(modes.TARGET_VERIFY) == "verify"
    extend = {mode.name for mode in modes if mode.name.startswith("DRAFT_EXTEND")}
    assert extend == {mode.name for mode in modes if probe.kind_of(mode) == "extend"} != set()
    assert probe.kind_of(modes.EXTEND) == "other"


@pytest.mark.filterwarnings("ignore")  # of objects of torch that are looked at
@pytest.mark.parametrize("side", ["off", "on"])
def test_bytes_of_tables_are_counted_once(upstream, deep_gemm, side, monkeypatch):
    release = upstream.release
    if upstream.device == "cpu":
        monkeypatch.setattr(torch.cuda, "memory_allocated", live_bytes)
    monkeypatch.setattr(probe, "_start_writer", lambda: None)
    monkeypatch.setattr(probe, "_table_bytes", 0)
    capture = "init_forward_metadata_out_graph" if release.out_graph else "init_forward_metadata_capture_cuda_graph"
    around = (probe.out_graph, probe.draft_out_graph) if release.out_graph else (probe.tables, probe.tables)
    classes = upstream.classes if side == "off" else upstream.fused()
    for cls, hook in zip(classes, around):
        for name, call in (("init_cuda_graph_state", probe.tables), (capture, hook)):
            monkeypatch.setattr(cls, name, partialmethod(of, call, getattr(cls, name)))
    probe._samples.clear()
    gc.collect()  # tables of the test before would be freed while these are counted
    multi = upstream.multi(classes, 4)
    counted = probe._samples[-1]["table_bytes"]
    probe._samples.clear()
    assert 0 <= counted - sum(page_tables(multi).values()) < 100_000


def of(backend, hook, original, *args, **kwargs):
    """As the hook registry calls it."""
    return hook(original, backend, *args, **kwargs)


def test_poison_is_in_every_table_that_a_graph_reads(upstream, deep_gemm):
    _, on = upstream.graphs("TARGET_VERIFY", 4)
    for bs in CAPTURE_BS:
        probe.poison(on, bs)
        metadata = on.decode_cuda_graph_metadata[bs]
        tables = [table for table in (metadata.page_table_1, metadata.real_page_table) if table is not None]
        assert tables and all((table == probe.NO_PAGE).all() for table in tables)
    probe.poison(on, CAPTURE_BS[-1] + 1)  # of a batch without a graph
