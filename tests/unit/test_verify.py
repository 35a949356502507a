"""The comparison passes what is right in every mode, and names what is not."""

import cases
import generated
import pytest
import torch

from sglang_nsa_fused import kernels, reference
from sglang_nsa_fused.verify import NAMES, verified


def broken(run, tensor):
    def refresh(*args):
        run(*args)
        tensor.view(-1)[-1] += 1

    return refresh


@pytest.mark.parametrize("mode", generated.MODES)
def test_generation(device, mode):
    case = generated.make(device, mode, num_dst=2)
    engine = verified(kernels.select(device))
    expected = case.expected()
    engine.generate_plan(mode, case.values, case.destinations)(*case.batch)
    case.check(expected)


@pytest.mark.parametrize("name", ["cache_seqlens", "nsa_cu_seqlens_k", "paged_mqa_schedule"])
def test_a_wrong_generation_is_named(device, name):
    case = generated.make(device, reference.TARGET_VERIFY, num_dst=2)
    native, wrong = kernels.select(device), case.destinations[1][NAMES.index(name)]
    engine = native._replace(generate_plan=lambda *args: broken(native.generate_plan(*args), wrong))
    with pytest.raises(
        RuntimeError, match=rf"{name} of step backend 1 differs from the reference in 1 of \d+ places, first at \["
    ):
        verified(engine).generate_plan(case.mode, case.values, case.destinations)(*case.batch)


@pytest.mark.parametrize("mode", generated.MODES)
def test_copies(device, mode):
    case = cases.make(device, mode, num_dst=2, flashmla=True, schedule=True)
    native, expected = kernels.select(device), case.expected()
    verified(native).copy_plan(mode, case.destinations)(*case.sources, *case.sizes)
    case.check(expected)
    engine = native._replace(copy_plan=lambda *args: broken(native.copy_plan(*args), case.destinations[0][8]))
    with pytest.raises(RuntimeError, match="flashmla_metadata of step backend 0 differs"):
        verified(engine).copy_plan(mode, case.destinations)(*case.sources, *case.sizes)


def test_lengths_that_are_their_own_destination(device):
    case = generated.make(device, reference.DECODE)
    lengths = case.destinations[0][0]
    lengths.copy_(case.batch[0][: len(lengths)])
    before = lengths.clone()
    generate = verified(kernels.select(device)).generate_plan(case.mode, case.values, case.destinations)
    generate(lengths, *case.batch[1:])
    assert torch.equal(lengths, before)


@pytest.mark.parametrize("segment_len", [0, 256])
def test_draft_extends_without_a_graph(device, segment_len):
    case = generated.make(device, reference.DRAFT_EXTEND, segment_len=segment_len)
    case.run_without_a_graph(cols=300)
    native, (_, of_call) = kernels.select(device), case.workspace(300, 5)
    engine = native._replace(draft_extend_plan=lambda *args: broken(native.draft_extend_plan(*args), of_call[0]))
    with pytest.raises(RuntimeError, match="nsa_cu_seqlens_k of step backend 0 differs from the reference in 1 of"):
        verified(engine).draft_extend_plan(case.values, 5)(*case.batch, *of_call)


def test_an_engine_that_only_copies_stays_one(device):
    engine = verified(kernels.Engine("sgl_kernel", kernels._native_plan))
    assert engine.generate_plan is None and engine.draft_extend_plan is None
