"""Generation inside CUDA graphs and on side streams, and upstream's real classes under a ban of syncs."""

import pytest
import torch
from generated import MODES, make
from upstream import CAPTURE_BS, Upstream, batches

from sglang_nsa_fused import kernels
from sglang_nsa_fused.reference import DECODE, DRAFT_EXTEND
from sglang_nsa_fused.tools import bare


@pytest.fixture(autouse=True)
def native_alone(monkeypatch):
    assert kernels.select("cuda").generate_plan is not None, kernels.select("cuda").reason


def repoison(case):
    for one in case.buffers:
        for buffer in one:
            buffer.fill_(-7)


@pytest.mark.parametrize("num_dst", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_capture_once_replay_other_values(mode, num_dst):
    case = make("cuda", mode, bs=6, longest=3000, num_dst=num_dst)
    plan = case.plan()
    plan.generate(*case.batch)  # modules load before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.generate(*case.batch)
    for seed in range(1, 5):
        for mine, new in zip(case.batch[:3], make("cuda", mode, bs=6, longest=3000, seed=seed).batch):
            if mine is not None:
                mine.copy_(new)
        repoison(case)
        expected = case.expected()
        graph.replay()
        case.check(expected)


def test_runs_on_torchs_current_stream():
    """Behind a long wait on a side stream: had the launch gone elsewhere, it would read the old lengths."""
    case, other = (make("cuda", bs=5, longest=3000, seed=seed) for seed in (0, 9))
    plan = case.plan()
    plan.generate(*case.batch)
    repoison(case)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        case.batch[0].copy_(other.batch[0])
        plan.generate(*case.batch)
    assert not side.query()
    side.synchronize()
    written = [[buffer.clone() for buffer in one] for one in case.buffers]
    repoison(case)
    case.buffers, poisoned = written, case.buffers
    clones = make("cuda", bs=5, longest=3000, seed=0)
    clones.batch[0].copy_(other.batch[0])
    case.check(clones.expected())
    assert all(bool((buffer == -7).all()) for one in poisoned for buffer in one)


def test_the_cpu_and_the_gpu_agree():
    on_gpu, on_cpu = (make(device, DRAFT_EXTEND, bs=300, longest=2500, num_dst=2) for device in ("cuda", "cpu"))
    for case in (on_gpu, on_cpu):
        case.plan().generate(*case.batch)
    for left, right in zip(on_gpu.buffers, on_cpu.buffers):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(left, right))


def test_the_same_result_many_times():
    """Blocks run in any order; none may read what another writes."""
    case = make("cuda", DECODE, bs=8, longest=5000, length_dtype=torch.int32)
    case.destinations[0][0].copy_(case.batch[0])
    case.batch = (case.destinations[0][0], *case.batch[1:])  # upstream's alias
    expected, plan = case.expected(), case.plan()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(3000):
        for buffer in case.buffers[0][1:]:
            buffer.fill_(-7)
        plan.generate(*case.batch)
        for buffer, right in zip(case.buffers[0], expected[0]):
            different += (buffer != right).sum()
    assert int(different) == 0


def launched(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


def allocations():
    return torch.cuda.memory_stats()["allocation.all.allocated"]


@pytest.fixture(scope="module")
def upstream():
    return Upstream("cuda")


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("draft_steps", [2, 4, 6])
def test_a_draft_replay_is_one_launch(upstream, draft_steps, flashmla):
    multi = upstream.multi(upstream.fused(), draft_steps, flashmla)
    for slots, lengths, bs in batches(4):
        batch = bare.forward_batch(multi, slots, lengths, bs)
        before = allocations()
        names = launched(lambda: bare.replay(multi, batch))
        assert len(names) == 1 and "generate_kernel" in names[0], names
        assert allocations() == before


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY", "DRAFT_EXTEND", "DRAFT_EXTEND_V2"])
def test_a_graphs_replay_is_one_launch(upstream, mode, flashmla):
    if mode.startswith("DRAFT_EXTEND") and mode not in upstream.release.draft_extend:
        pytest.skip(f"sglang {upstream.version} captures no graph in this mode")
    if mode.startswith("DRAFT_EXTEND") and flashmla and upstream.release.accepted is not None:
        pytest.skip("its FlashMLA plan needs the number of rows, which only the device knows: upstream's path")
    off, on = upstream.graphs(mode, 4, flashmla)
    for slots, lengths, bs in batches(4):
        accepted = [2] * len(slots) if mode.startswith("DRAFT_EXTEND") else []
        batch = bare.graph_batch(on, upstream.module, mode, slots, [n + 4 for n in lengths], bs, accepted)
        before = allocations()
        names = launched(lambda: bare.replay_graph(on, batch))
        assert len(names) == 1 and "generate_kernel" in names[0], names
        assert allocations() == before


@pytest.mark.parametrize("flashmla", [False, True])
@pytest.mark.parametrize("mode", ["DRAFT_EXTEND", "DRAFT_EXTEND_V2"])
def test_a_draft_extend_is_one_launch_and_one_allocation(upstream, mode, flashmla):
    if not hasattr(upstream.module.ForwardMode, mode):
        pytest.skip(f"sglang {upstream.version} has no such mode")
    off, on = upstream.graphs("TARGET_VERIFY", 4, flashmla)  # its captures compare the planners
    for slots, lengths, _ in batches(4):
        batch = bare.draft_extend_batch(on, upstream.module, mode, slots, [n + 4 for n in lengths])
        on.init_forward_metadata(batch)  # flash_mla is asked once for each number of rows
        before = allocations()
        names = launched(lambda: on.init_forward_metadata(batch))
        plan = upstream.release.topk_v2_plan is not None  # upstream's planner makes it, and for few rows not at all
        assert 1 <= len(names) <= 1 + plan and "generate_kernel" in names[0], names
        assert allocations() == before + 1 + plan


def test_the_captured_schedule_is_deep_gemms_for_these_lengths(upstream):
    """Upstream's is that of the capture, of length 1, above three draft steps."""
    off, on = upstream.multi(upstream.classes, 4), upstream.multi(upstream.fused(), 4)
    stale = 0
    for slots, lengths, bs in batches(20):
        for multi in (off, on):
            bare.replay(multi, bare.forward_batch(multi, slots, lengths, bs))
        right = upstream.schedule(torch.tensor(lengths + [1] * (bs - len(lengths)), device="cuda"))
        for backend in on.attn_backends:
            assert torch.equal(backend.decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata, right)
        stale += not torch.equal(off.attn_backends[0].decode_cuda_graph_metadata[bs].paged_mqa_schedule_metadata, right)
    assert stale > 0


def test_all_planners_are_ours(upstream):
    """On this GPU with the installed deep_gemm, flash_mla and top-k; the fallback would hide a change of theirs."""
    off, on = upstream.graphs("TARGET_VERIFY", 4, flashmla=True)
    assert not any(on._replays[bs]._after for bs in CAPTURE_BS)


def test_a_slot_outside_the_pool_traps():
    """In a process of its own: a trap ends its CUDA context."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from generated import make; import torch\n"
        "case = make('cuda', lengths=[1, 2, 0]); plan = case.plan(); case.batch[1].fill_(99)\n"
        "plan.generate(*case.batch)\n"
        "try: torch.cuda.synchronize()\n"
        "except Exception as error: print('trapped', type(error).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "trapped" in result.stdout, result.stdout + result.stderr
