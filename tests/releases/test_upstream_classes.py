"""Upstream's own classes, captured and replayed, against numbers worked out row by row: what later tests build on."""

import ast
import importlib.metadata
import inspect
import os
import textwrap
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from upstream_classes import Runner, Upstream

from sglang_nsa_fused.tools import stand_ins, torch_forms

DRAFT_TOKENS = 4
INDEX_TOPK = 2048
WIDTH = 2200
SLOTS, LENGTHS, ACCEPTED = [3, 1, 8, 2], [64, 2049, 7, 1], [1, 4, 2, 3]
BATCHES = [(1, [row]) for row in range(4)] + [(4, [0, 1, 2, 3]), (4, [2, 0, 1])]  # the last one is padded


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def req_to_token(upstream) -> torch.Tensor:
    tokens = torch.randperm(9 * WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return tokens.view(9, WIDTH).to(upstream.device)


def rows_of(mode: str, lengths: list[int], accepted: list[int]) -> list[tuple[int, int]]:
    """(request, visible tokens) of each row that the graph computes."""
    if mode == "DECODE":
        return list(enumerate(lengths))
    counts = accepted if mode == "DRAFT_EXTEND" else [DRAFT_TOKENS] * len(lengths)
    return [(request, n - count + 1 + i) for request, (n, count) in enumerate(zip(lengths, counts)) for i in range(count)]


def check(upstream, metadata, mode, slots, lengths, accepted, req_to_token, sm100=False):
    """lengths: with the tokens that the mode adds."""
    names, form = upstream.form.names, upstream.form
    rows = rows_of(mode, lengths, accepted)
    expanded = [n for _, n in rows]
    if stand_ins.base(upstream.version) >= (0, 5, 15):
        expanded = [max(n, 0) for n in expanded]
    selected = [min(n, INDEX_TOPK) for n in expanded]
    expected = {
        "cache_seqlens_int32": lengths,
        "cu_seqlens_k": [0, *accumulate(lengths)],
        f"{names}_seqlens_expanded": expanded,
        f"{names}_cache_seqlens_int32": selected,
        f"{names}_cu_seqlens_k": [0, *accumulate(selected)],
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
    if sm100 and mode == "TARGET_VERIFY" and form.ctx_lens_2d:
        context, shape = [n for n in lengths for _ in range(DRAFT_TOKENS)], (-1, DRAFT_TOKENS)
    context = torch.tensor(context, dtype=torch.int32, device=upstream.device).view(shape)
    if form.ctx_lens_2d:
        assert torch.equal(metadata.paged_mqa_ctx_lens_2d, context)
    if form.draft_schedule or mode in ("TARGET_VERIFY", "DRAFT_EXTEND"):
        import deep_gemm

        schedule = deep_gemm.get_paged_mqa_logits_metadata(context, 64, deep_gemm.get_num_sms())
        assert torch.equal(metadata.paged_mqa_schedule_metadata, schedule)
    if form.topk_v2_plan and upstream.device == "cpu":  # a GPU's planner leaves plans that it does not need unwritten
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
    values = stand_ins.attributes(upstream.version, upstream.module, upstream.device, req_to_token, DRAFT_TOKENS, True)
    assert values.keys() <= read


@pytest.mark.parametrize("flashmla", [False, True])
def test_draft_steps(upstream, req_to_token, flashmla):
    with upstream.cuda():
        runner = Runner(upstream, upstream.multi_step_backend(req_to_token, 3, flashmla), "DECODE", 4, 1)
        assert len(runner.step_backends()) == 2 + upstream.form.extra_backends
        for bs in (4, 1):
            runner.capture(bs)
        for bs, batch in BATCHES:
            slots, lengths = [SLOTS[row] for row in batch], [LENGTHS[row] for row in batch]
            runner.replay(slots, lengths, bs)
            padding = bs - len(batch)
            for backend in runner.step_backends():
                metadata = backend.decode_cuda_graph_metadata[bs]
                assert backend.forward_metadata is metadata
                args = (slots + [0] * padding, lengths + [1] * padding, [])
                check(upstream, metadata, "DECODE", *args, req_to_token)
                assert (metadata.flashmla_metadata is not None) == flashmla


@pytest.mark.parametrize("sm100", [False, True])
@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "draft extend"])
def test_step_backend(upstream, req_to_token, mode, sm100):
    if mode == "draft extend":
        mode = upstream.form.draft_extend
    if mode is None:
        pytest.skip(f"sglang {upstream.version} runs the draft extend of this backend without a graph")
    if sm100 and upstream.device == "cuda":
        pytest.skip("the schedule of another GPU")
    verify = mode == "TARGET_VERIFY"
    with upstream.cuda(sm100):
        runner = Runner(upstream, upstream.step_backend(req_to_token, DRAFT_TOKENS), mode, 4, DRAFT_TOKENS)
        for bs in (4, 1):
            runner.capture(bs)
        for bs, batch in BATCHES:
            padding = bs - len(batch)
            slots, accepted = [SLOTS[row] for row in batch], [ACCEPTED[row] for row in batch]
            grown = accepted if mode == "DRAFT_EXTEND" else [DRAFT_TOKENS] * len(batch)
            lengths = [LENGTHS[row] + n for row, n in zip(batch, grown)]
            runner.replay(slots, [LENGTHS[row] for row in batch] if verify else lengths, bs, accepted)
            lengths += [1 + DRAFT_TOKENS if verify else 1] * padding
            args = (slots + [0] * padding, lengths, accepted + [DRAFT_TOKENS] * padding, req_to_token)
            check(upstream, runner.backend.decode_cuda_graph_metadata[bs], mode, *args, sm100)


def test_draft_extend_without_a_graph(upstream, req_to_token):
    with upstream.cuda():
        runner = Runner(upstream, upstream.step_backend(req_to_token, DRAFT_TOKENS), "DRAFT_EXTEND_V2", 4, DRAFT_TOKENS)
        lengths = [n + DRAFT_TOKENS for n in LENGTHS]
        runner.eager(SLOTS, lengths, [DRAFT_TOKENS] * 4)
        metadata = runner.backend.forward_metadata
        check(upstream, metadata, "DRAFT_EXTEND_V2", SLOTS, lengths, None, req_to_token)


def test_the_stand_ins_give_what_upstream_gives_without_cuda(upstream, req_to_token):
    """Upstream's own torch branches, which a CPU takes, against its CUDA branches over the stand-ins."""
    if upstream.device == "cuda":
        pytest.skip("stand-ins are for a CPU")
    found = []
    for pretend in (False, True):
        for mode in filter(None, ("DECODE", "TARGET_VERIFY", upstream.form.draft_extend)):
            with upstream.cuda():
                runner = Runner(upstream, upstream.step_backend(req_to_token, DRAFT_TOKENS), mode, 4, DRAFT_TOKENS)
                runner.capture(4)
                with pytest.MonkeyPatch.context() as patch:
                    if not pretend:
                        patch.setattr(upstream.module, "is_cuda", lambda: False)
                    runner.replay(SLOTS, [n + DRAFT_TOKENS for n in LENGTHS], 4, ACCEPTED)
            metadata = vars(runner.backend.decode_cuda_graph_metadata[4])
            found.append({k: v for k, v in metadata.items() if isinstance(v, torch.Tensor)})
    for without, over in zip(found, found[len(found) // 2 :]):
        for name in without.keys() - {"paged_mqa_schedule_metadata", "paged_mqa_ctx_lens_2d", "topk_v2_plan"}:
            assert torch.equal(without[name], over[name]), name
