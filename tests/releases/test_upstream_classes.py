"""Upstream's own classes, captured and replayed, against numbers worked out row by row: what later tests build on."""

import ast
import contextlib
import importlib.metadata
import inspect
import io
import os
import textwrap
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from sglang_nsa_fused.tools import bare, stand_ins, torch_forms, versions

MODES = ["TARGET_VERIFY", "DRAFT_EXTEND", "DRAFT_EXTEND_V2"]
DRAFT_TOKENS = 4
INDEX_TOPK = 2048
WIDTH = 2200
SLOTS, LENGTHS, ACCEPTED = [3, 1, 8, 2], [64, 2049, 7, 1], [1, 4, 2, 3]
BATCHES = [(1, [row]) for row in range(4)] + [(4, [0, 1, 2, 3]), (4, [2, 0, 1])]  # the last one is padded


@pytest.fixture
def req_to_token(device) -> torch.Tensor:
    tokens = torch.randperm(9 * WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return tokens.view(9, WIDTH).to(device)


def rows_of(mode: str, lengths: list[int], accepted: list[int] | None) -> list[tuple[int, int]]:
    """(request, visible tokens) of each row that the graph computes."""
    if mode == "DECODE":
        return list(enumerate(lengths))
    counts = accepted or [DRAFT_TOKENS] * len(lengths)
    return [(request, n - count + 1 + i) for request, (n, count) in enumerate(zip(lengths, counts)) for i in range(count)]


def check(upstream, metadata, mode, slots, lengths, accepted, req_to_token, sm100=False):
    """lengths: with the tokens that the mode adds."""
    release = upstream.release
    rows = rows_of(mode, lengths, accepted)
    expanded = [max(n, release.floor) for _, n in rows]
    selected = [min(n, INDEX_TOPK) for n in expanded]
    expected = {
        "cache_seqlens_int32": lengths,
        "cu_seqlens_k": [0, *accumulate(lengths)],
        f"{release.names}_seqlens_expanded": expanded,
        f"{release.names}_cache_seqlens_int32": selected,
        f"{release.names}_cu_seqlens_k": [0, *accumulate(selected)],
    }
    for name, values in expected.items():
        assert getattr(metadata, name)[: len(values)].tolist() == values, name
    for row, (request, n) in enumerate(rows):
        tokens = req_to_token[slots[request], : max(n, 0)].tolist()
        assert metadata.page_table_1[row, : len(tokens)].tolist() == tokens, f"page_table_1, row {row}"
        pages = [token // 64 for token in tokens[::64]]
        assert metadata.real_page_table[row, : len(pages)].tolist() == pages, f"real_page_table, row {row}"

    context = lengths if mode == "DECODE" else expanded
    shape = (-1, 1)
    if sm100 and mode == "TARGET_VERIFY" and release.captured_lens_2d:
        context, shape = [n for n in lengths for _ in range(DRAFT_TOKENS)], (-1, DRAFT_TOKENS)
    context = torch.tensor(context, dtype=torch.int32, device=upstream.device).view(shape)
    if release.captured_lens_2d:
        assert torch.equal(metadata.paged_mqa_ctx_lens_2d, context)
    if release.draft_schedule or mode in ("TARGET_VERIFY", "DRAFT_EXTEND"):
        import deep_gemm

        schedule = deep_gemm.get_paged_mqa_logits_metadata(context, 64, deep_gemm.get_num_sms())
        assert torch.equal(metadata.paged_mqa_schedule_metadata, schedule)
    if release.topk_v2_plan and upstream.device == "cpu":  # a GPU's planner leaves plans that it does not need unwritten
        plan = torch_forms.plan_topk_v2(torch.tensor(expanded, dtype=torch.int32))
        assert torch.equal(metadata.topk_v2_plan, plan)


def test_the_wheel_under_test_is_the_one_imported(upstream):
    import sglang

    assert (Path(sglang.__file__).parents[1] / f"sglang-{upstream.version}.dist-info").is_dir()
    assert upstream.version == os.environ.get("SGLANG_NSA_FUSED_TEST_RELEASE", upstream.version)
    assert Path(upstream.module.__file__).is_relative_to(Path(sglang.__file__).parent)
    assert importlib.metadata.version("sglang") == upstream.version


def test_the_attributes_are_those_that_upstream_reads(upstream, req_to_token):
    """No attribute is set that the step backend does not read: the list is data about this release, not a wish."""
    read = {
        node.attr
        for cls in upstream.classes[0].__mro__[:-1]
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "self"
    }
    of_upstream = upstream.release, upstream.version, upstream.module, upstream.device
    values = stand_ins.attributes(*of_upstream, req_to_token, DRAFT_TOKENS, True)
    assert values.keys() <= read


@pytest.mark.parametrize("flashmla", [False, True])
def test_draft_steps(upstream, req_to_token, flashmla):
    multi = bare.multi_step_backend(upstream.classes, upstream.release, upstream.device, req_to_token, 3, [1, 4], flashmla)
    assert len(multi.attn_backends) == 2 + versions.of(upstream.version).spare_step
    for bs, batch in BATCHES:
        slots, lengths = [SLOTS[row] for row in batch], [LENGTHS[row] for row in batch]
        bare.replay(multi, bare.forward_batch(multi, slots, lengths, bs))
        padding = bs - len(batch)
        for backend in multi.attn_backends:
            metadata = backend.decode_cuda_graph_metadata[bs]
            assert backend.forward_metadata is metadata
            args = (slots + [0] * padding, lengths + [1] * padding, None)
            check(upstream, metadata, "DECODE", *args, req_to_token)
            assert (metadata.flashmla_metadata is not None) == flashmla


def graph_backend(upstream, req_to_token, mode):
    args = (upstream.module, upstream.release, upstream.device, req_to_token, DRAFT_TOKENS, mode, [1, 4])
    return bare.graph_backend(upstream.classes[0], *args)


def replay(upstream, backend, mode, slots, lengths, bs, accepted):
    batch = bare.graph_batch(backend, upstream.module, mode, slots, lengths, bs, accepted)
    with contextlib.redirect_stdout(io.StringIO()):  # upstream prints on each copy without its CUDA kernel
        bare.replay_graph(backend, batch)


@pytest.mark.parametrize("sm100", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_step_backend(upstream, req_to_token, mode, sm100):
    verify = mode == "TARGET_VERIFY"
    if not verify and mode not in upstream.release.draft_extend:
        pytest.skip(f"sglang {upstream.version} has no such graph of this backend")
    if sm100 and upstream.device == "cuda":
        pytest.skip("the schedule of another GPU")
    with upstream.gpu(sm100):
        backend = graph_backend(upstream, req_to_token, mode)
        for bs, batch in BATCHES:
            padding = bs - len(batch)
            slots, accepted = [SLOTS[row] for row in batch], [ACCEPTED[row] for row in batch]
            by_accepted = not verify and upstream.release.accepted is not None
            lengths = [LENGTHS[row] + (n if by_accepted else DRAFT_TOKENS) for row, n in zip(batch, accepted)]
            replay(upstream, backend, mode, slots, [LENGTHS[row] for row in batch] if verify else lengths, bs, accepted)
            lengths += [1 + DRAFT_TOKENS if verify else 1] * padding
            counts = accepted + [DRAFT_TOKENS] * padding if by_accepted else None
            args = (slots + [0] * padding, lengths, counts, req_to_token)
            check(upstream, backend.decode_cuda_graph_metadata[bs], mode, *args, sm100)


def test_draft_extend_without_a_graph(upstream, req_to_token):
    args = (upstream.release, upstream.device, req_to_token, DRAFT_TOKENS, False)
    backend = bare.step_backend(upstream.classes[0], *args)
    lengths = [n + DRAFT_TOKENS for n in LENGTHS]
    mode = "DRAFT_EXTEND_V2"
    backend.init_forward_metadata(bare.draft_extend_batch(backend, upstream.module, mode, SLOTS, lengths))
    check(upstream, backend.forward_metadata, mode, SLOTS, lengths, None, req_to_token)


@pytest.mark.parametrize("mode", ["DECODE", *MODES])
def test_the_stand_ins_give_what_upstream_gives_without_cuda(upstream, req_to_token, mode):
    """Upstream's own torch branches, which a CPU takes, against its CUDA branches over the stand-ins."""
    if upstream.device == "cuda":
        pytest.skip("stand-ins are for a CPU")
    if mode.startswith("DRAFT_EXTEND") and mode not in upstream.release.draft_extend:
        pytest.skip(f"sglang {upstream.version} has no such graph of this backend")
    found = []
    for is_cuda in (False, True):
        backend = graph_backend(upstream, req_to_token, mode)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upstream.module, "is_cuda", lambda is_cuda=is_cuda: is_cuda)
            replay(upstream, backend, mode, SLOTS, [n + DRAFT_TOKENS for n in LENGTHS], 4, ACCEPTED)
        metadata = vars(backend.decode_cuda_graph_metadata[4])
        found.append({k: v for k, v in metadata.items() if isinstance(v, torch.Tensor)})
    without, over = found
    for name in without.keys() - {"paged_mqa_schedule_metadata", "paged_mqa_ctx_lens_2d", "topk_v2_plan"}:
        assert torch.equal(without[name], over[name]), name
