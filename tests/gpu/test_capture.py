"""The copy inside CUDA graphs and on side streams."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import make

from sglang_nsa_fused import ReplayPlan, fused_metadata_copy_cuda, kernels
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND, TARGET_VERIFY


@pytest.fixture(autouse=True)
def native():
    assert kernels.select("cuda").name == "native", kernels.select("cuda").reason


def repoison(case):
    for one in case.buffers:
        for buffer in one:
            buffer.fill_(-7)


@pytest.mark.parametrize("num_dst", [1, 3, 7])
@pytest.mark.parametrize("mode", [DECODE, TARGET_VERIFY, DRAFT_EXTEND])
def test_capture_once_replay_other_values(mode, num_dst):
    case = make("cuda", mode, bs=6, columns=700, num_dst=num_dst, flashmla=True, schedule=True)
    plan = ReplayPlan(mode, case.destinations)
    plan.copy(*case.sources, *case.sizes)  # modules load before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.copy(*case.sources, *case.sizes)
    for seed in range(3):
        for at, source in enumerate(make("cuda", mode, bs=6, columns=700, flashmla=True, schedule=True, seed=seed).sources):
            case.sources[at].copy_(source)
        repoison(case)
        expected = case.expected()
        graph.replay()
        case.check(expected)


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("num_dst", [1, 5])
def test_the_first_launch_of_a_process_may_be_captured(num_dst, generates):
    """Of the plan's kernel: to load it is not allowed there."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import torch, cases, generated; from sglang_nsa_fused import ReplayPlan\n"
        f"case = {'generated' if generates else 'cases'}.make('cuda', num_dst={num_dst})\n"
        f"plan = {'case.plan()' if generates else 'ReplayPlan(case.mode, case.destinations)'}\n"
        "expected, graph = case.expected(), torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        f"    {'plan.generate(*case.batch)' if generates else 'plan.copy(*case.sources, *case.sizes)'}\n"
        "case.check_untouched(); graph.replay(); case.check(expected); print('replayed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "replayed" in done.stdout, done.stderr


def test_a_plan_made_in_a_capture_says_what_to_do_and_decides_nothing():
    case = make("cuda")
    kernels.select.cache_clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match="make a plan on this GPU once before"):
            ReplayPlan(DECODE, case.destinations)
    ReplayPlan(DECODE, case.destinations).copy(*case.sources, *case.sizes)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        ReplayPlan(DECODE, case.destinations).copy(*case.sources, *case.sizes)


def test_upstreams_signature_captures():
    case = make("cuda", bs=4)
    fused_metadata_copy_cuda(*case.upstream_args())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_metadata_copy_cuda(*case.upstream_args())
    repoison(case)
    expected = case.expected()
    graph.replay()
    case.check(expected)


def test_runs_on_torchs_current_stream():
    """Behind a long wait on a side stream: had the copy gone elsewhere, it would read the old source."""
    case = make("cuda", bs=5, columns=3000, num_dst=3)
    plan = ReplayPlan(DECODE, case.destinations)
    fresh = make("cuda", bs=5, columns=3000, seed=9).sources
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for source, new in zip(case.sources, fresh):
            if source is not None:
                source.copy_(new)
        plan.copy(*case.sources, *case.sizes)
    assert not side.query()
    side.synchronize()
    written = [[buffer.clone() for buffer in one] for one in case.buffers]
    repoison(case)
    expected = case.expected()
    for one, right in zip(written, expected):
        assert all(torch.equal(a, b) for a, b in zip(one, right))


def test_one_launch_no_sync_no_allocation():
    case = make("cuda", bs=64, columns=5000, num_dst=7, flashmla=True, schedule=True)
    plan = ReplayPlan(DECODE, case.destinations)
    plan.copy(*case.sources, *case.sizes)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            plan.copy(*case.sources, *case.sizes)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    launched = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(launched) == 1 and "copy_kernel" in launched[0], launched


def test_the_cpu_and_the_gpu_agree():
    on_gpu, on_cpu = (make(device, bs=9, columns=2500, num_dst=4, flashmla=True) for device in ("cuda", "cpu"))
    for case in (on_gpu, on_cpu):
        ReplayPlan(DECODE, case.destinations).copy(*case.sources, *case.sizes)
    for left, right in zip(on_gpu.buffers, on_cpu.buffers):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(left, right))
