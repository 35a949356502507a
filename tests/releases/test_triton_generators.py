"""From 0.5.15 on upstream's metadata comes from Triton kernels. Here they run, by Triton's interpreter: against ours, and against
the torch forms that stand in for them in all other tests."""

import inspect

import pytest
import torch
import triton_kernels
import upstream as sides
from test_modes import row_lengths, used_rows
from upstream import assert_equal_fields, assert_same_fields

from sglang_nsa_fused.tools import bare, stand_ins, torch_forms

GENERATORS = [name for name in stand_ins.KERNELS if name.startswith("fused_")]
# The kernels of 0.5.15 and 0.5.16 are the same, as are those of 0.5.17 to 0.5.19, of 0.5.20 and 0.5.21, and of 0.5.22 and 0.5.23.
FORMS = ("0.5.15.post1", "0.5.17", "0.5.20", "0.5.23")
CASES = {  # captured batch size, the longest request, batches: an interpreted kernel takes some milliseconds for 128 columns
    "long": (1, 2100, [([3], [2100])]),
    "short": (4, 200, [([1, 7, 3, 2], [0, 1, 64, 130]), ([4, 9], [65, 200])]),
}


@pytest.fixture(autouse=True)
def on_a_cpu(upstream):
    if upstream.device == "cuda":
        pytest.skip("upstream's kernels run in all other tests")


@pytest.fixture
def generators(upstream, tmp_path):
    if upstream.version not in FORMS:
        pytest.skip(f"upstream's generators are those of one of {', '.join(FORMS)}, or none")
    return {name: triton_kernels.load(name, tmp_path) for name in GENERATORS}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    bs, longest, batches = CASES[request.param]
    monkeypatch.setattr(sides, "CAPTURE_BS", [bs])
    monkeypatch.setattr(sides, "LONGEST", longest)
    return bs, batches


@pytest.fixture
def use(upstream, generators, monkeypatch):
    """From this call on upstream's backends run upstream's generators, and each must have run at the end of the test."""
    ran = set()

    def counted(name):
        def generate(*args, **kwargs):
            ran.add(name)
            generators[name](*args, **kwargs)

        return generate

    def use(backends, *names):
        for name in GENERATORS:
            for module in triton_kernels.places(name, upstream.module, upstream.release):
                monkeypatch.setattr(module, name, counted(name))
        for backend in backends:
            getattr(backend, "_init_kpool_metadata_fusion", lambda: None)()  # it remembers them
        expected.update(names)

    expected: set = set()
    yield use
    assert ran == expected


@pytest.mark.parametrize(
    "case, draft_steps, flashmla",
    [("long", 2, False), ("short", 3, True), ("short", 4, False), ("long", 5, True), ("short", 6, False)],
    indirect=["case"],
)
def test_draft_steps(upstream, deep_gemm, use, case, draft_steps, flashmla):
    bs, batches = case
    off, on = (upstream.multi(classes, draft_steps, flashmla) for classes in (upstream.classes, upstream.fused()))
    use(off.attn_backends, "fused_dsa_decode_metadata")
    for slots, lengths in batches:
        for multi in (off, on):
            bare.replay(multi, bare.forward_batch(multi, slots, lengths, bs))
        assert_same_fields(off, on, bs, torch.tensor(lengths + [1] * (bs - len(lengths))))


@pytest.mark.parametrize(
    "case, draft_tokens, flashmla", [("long", 2, True), ("short", 3, True), ("short", 6, False)], indirect=["case"]
)
@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2"])
def test_one_backend(upstream, deep_gemm, use, case, mode, draft_tokens, flashmla):
    bs, batches = case
    off, on = upstream.graphs(mode, draft_tokens, flashmla)
    kernel = {"DECODE": "decode", "TARGET_VERIFY": "target_verify", "DRAFT_EXTEND_V2": "draft_extend"}[mode]
    use([off], f"fused_dsa_{kernel}_metadata")
    for slots, lengths in batches:
        if mode == "DRAFT_EXTEND_V2":
            lengths = [max(length, draft_tokens) for length in lengths]
        pad, accepted = bs - len(slots), [draft_tokens] * bs
        for backend in (off, on):
            batch = bare.graph_batch(backend, upstream.module, mode, slots, lengths, bs, accepted[: len(slots)])
            bare.replay_graph(backend, batch)
        live = row_lengths(upstream, mode, lengths + [1] * pad, accepted, draft_tokens)
        both = bare.both_fields(off.forward_metadata, on.forward_metadata, live)
        assert_equal_fields(*(used_rows(fields, len(live), bs) for fields in both))


def made(function, release, lengths, draft_tokens, width):
    """All that a generator writes for these lengths, by name, into memory full of -7."""
    bs, mode = len(lengths), function.__name__.split("_")[2]
    rows = bs * (1 if mode == "decode" else draft_tokens)
    pages = -(-width // 64)
    shapes = dict(cache_seqlens=(bs,), cu_seqlens_k=(bs + 1,), page_table_1=(rows, width), seqlens_expanded=(rows,))
    shapes |= dict(dsa_cache_seqlens=(rows,), dsa_cu_seqlens_k=(rows + 1,), real_page_table=(rows, pages))
    shapes |= dict(paged_mqa_ctx_lens_2d=(bs, draft_tokens))
    table = torch.randperm(9 * width, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(9, width)
    given = dict(seq_lens=torch.tensor(lengths), req_pool_indices=torch.arange(bs) + 2, req_to_token=table, bs=bs)
    given |= dict(max_len=width, max_seqlen_k=width, dsa_index_topk=2048, next_n=draft_tokens, total_len=rows)
    given |= dict(extend_seq_lens=torch.full((bs,), draft_tokens), max_extend_len=draft_tokens, max_total_len=rows)
    given |= dict(static_extend_len=True, **{release.page_size: 64})
    written = {name: torch.full(shape, -7, dtype=torch.int32) for name, shape in shapes.items()}
    return given | written, written


@pytest.mark.parametrize("name", GENERATORS)
def test_the_stand_in_gives_what_the_generator_gives(upstream, generators, name, case):
    found = []
    bs, batches = case
    lengths, width = batches[0][1], max(batches[0][1]) + 9
    grown = [length + 1 for length in lengths] if "extend" in name else lengths
    for function in (generators[name], getattr(torch_forms, name)):
        given, written = made(generators[name], upstream.release, grown, 3, width)
        wanted = inspect.signature(generators[name]).parameters
        function(**{key: value for key, value in given.items() if key in wanted})
        found.append(written)
    theirs, ours = found
    cache = theirs["cache_seqlens"]
    columns = cache.repeat_interleave(len(theirs["page_table_1"]) // bs).view(-1, 1)
    for key, page in (("page_table_1", 1), ("real_page_table", 64)):
        live = torch.arange(theirs[key].shape[1]) * page < columns
        assert live.any()
        for written in found:
            written[key] = written[key].where(live, -7)
    assert_equal_fields(theirs, ours)


def test_the_stand_in_of_the_lengths(upstream, tmp_path):
    theirs = triton_kernels.load("seqlens_expand_triton", tmp_path)
    if theirs is None:
        pytest.skip("this release has no such kernel")
    extend, lengths = torch.tensor([3, 1, 4, 2], dtype=torch.int32), torch.tensor([3, 70, 1, 2100], dtype=torch.int32)
    expected = theirs(extend, lengths, 10, 4)
    assert torch.equal(torch_forms.seqlens_expand_triton(extend, lengths, 10, 4, floor=upstream.release.floor), expected)
