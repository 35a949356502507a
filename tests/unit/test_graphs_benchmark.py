"""What benchmarks.graphs reads from a profile."""

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def measures(trace: dict) -> dict:
    from benchmarks import graphs

    return graphs.measures(trace)


class Trace:
    def __init__(self):
        self.events, self.at, self.correlation = [], 0, 0

    def launch(self, *kernels, gap=10):
        """One call of the host, and what it runs on the GPU: each kernel takes 5 us, the first one begins after the gap."""
        self.correlation += 1
        call = "cudaGraphLaunch" if len(kernels) > 1 else "cudaLaunchKernel"
        of = {"correlation": self.correlation, "stream": 7}
        self.events.append({"ph": "X", "cat": "cuda_runtime", "name": call, "ts": 0, "dur": 1, "args": of})
        for kernel in kernels:
            self.events.append({"ph": "X", "cat": "kernel", "name": kernel, "ts": self.at + gap, "dur": 5, "args": of})
            self.at, gap = self.at + gap + 5, 0


def profile(inside: bool) -> dict:
    trace, ours = Trace(), "void nsa_fused::generate_kernel<4, false>(...)"
    for _ in range(3):
        for size in (8, 20, 3):  # draft, verify, extend
            trace.launch("copy")
            if inside:
                trace.launch(ours, *["gemm"] * size)
            else:
                trace.launch(ours)
                trace.launch(*["gemm"] * size)
    return {"traceEvents": trace.events}


def test_launches_are_told_from_nodes():
    before, within = measures(profile(False)), measures(profile(True))
    assert (before["plugin_launches"], before["plugin_nodes"], before["launches"]) == (3, 0, 6)
    assert (within["plugin_launches"], within["plugin_nodes"], within["launches"]) == (0, 3, 3)
    assert [before["launches_us"], within["launches_us"]] == [30, 15]
    assert [before["steps"], within["steps"]] == [3, 3]


def test_the_gap_is_from_what_ran_before_to_the_model():
    """The plugin's kernel takes 5 us after 10, and outside the graph's first kernel waits for another 10."""
    assert [measures(profile(False))[f"gap_{name}_us"] for name in ("draft", "verify", "extend")] == [25] * 3
    assert [measures(profile(True))[f"gap_{name}_us"] for name in ("draft", "verify", "extend")] == [15] * 3


def test_the_time_of_a_graph_is_the_models():
    for inside in (False, True):
        assert [measures(profile(inside))[f"graph_{name}_us"] for name in ("draft", "verify", "extend")] == [40, 100, 15]


def test_a_profile_without_the_three_graphs_is_refused():
    trace = Trace()
    trace.launch("gemm", "gemm")
    with pytest.raises(ValueError, match="expected graphs of 3 sizes"):
        measures({"traceEvents": trace.events})


def test_sides_are_compared_where_both_were_profiled():
    from benchmarks.graphs import compared
    from sglang_nsa_fused.tools.bench.measure import Case

    cases = [Case(1, 512), Case(8, 512)]
    results = {("off", "bs1-len512"): {"steps": 20, "launches": 40.0}, ("before", "bs1-len512"): {"steps": 20, "launches": 38.0}}
    assert compared(results, cases, 5) == []
    results["in", "bs1-len512"] = {"steps": 19, "launches": 35.0}
    [found] = compared(results, cases, 5)
    assert (found["name"], found["metric"], found["samples"]) == ("n5-bs1-len512", "launches", 19)
    assert (found["upstream"], found["before"], found["ours"]) == (40, 38, 35)
