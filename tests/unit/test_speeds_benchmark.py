"""benchmarks/speeds.py with tests/fake_server.py in place of sglang, and a profile made here in place of sglang's."""

import gzip
import json

import pytest
from stand_in import FAKE, NO_GPU, free_port, stub_site

from sglang_nsa_fused.tools.bench import process


def kernels(count: int, replay: int, start: float, gemm_us: float) -> list[dict]:
    """A graph of layers of four kernels. The routed experts' first kernel begins 0.4 us after the end of the norm and 2 after the
    start of the GEMM, which runs beside it where it takes longer."""
    shape = {"grid": [1, 1, 1], "block": [32, 1, 1], "registers per thread": 32, "shared memory": 0}
    found = []
    for layer in range(count // 4):
        at = start + 100 * layer
        of = (
            ("norm", 7, at, 7.6),
            ("gemm", 8, at + 6, gemm_us),
            ("fused_moe_kernel", 7, at + 8, 50),
            ("fused_moe_kernel", 7, at + 60, 20),
        )
        found += [(name, at, us, {"correlation": replay, "stream": stream} | shape) for name, stream, at, us in of]
    return [{"ph": "X", "cat": "kernel", "name": name, "ts": at, "dur": us, "args": args} for name, at, us, args in found]


def profile(server, case, plan, folder):
    events = []
    for replay, (count, gemm_us) in enumerate([(40, 1), (120, 1), (1000, 9), (40, 1), (120, 1), (1000, 1)]):
        events.append(
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 1, "args": {"correlation": replay}}
        )
        events += kernels(count, replay, 100_000 * replay, gemm_us)
    folder.mkdir()
    path = folder / "one.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


started = []


def server(name, port, flags, env, folder):
    started.append((name, flags, env))
    return process.Server(name, port, flags, env, folder, FAKE)


@pytest.fixture
def run(benchmarks, tmp_path, monkeypatch):
    from benchmarks import graphs, speeds

    monkeypatch.setattr(process, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(graphs, "profile", profile)
    monkeypatch.setattr(speeds, "Server", server)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", NO_GPU)
    monkeypatch.setenv("PYTHONPATH", str(stub_site(tmp_path / "site")))

    def call(*given: str) -> tuple[int, dict]:
        """given: starts, and more flags."""
        out = tmp_path / "speeds.json"
        own = ["--case", "2x64", "1x64", "--commit", "c", "--out", out, "--log-dir", tmp_path / "logs", "--port", free_port()]
        status = speeds.main([*given, *map(str, [*own, "--model-path", tmp_path])])
        return status, json.loads(out.read_text()) if out.exists() else {}

    return call


def test_each_start_and_case_has_its_step_and_its_graphs(run):
    status, found = run("off", "on")
    assert status == 0 and (found["what"], found["draft_steps"]) == ("speeds", 3)
    starts = found["starts"]
    both = ["bs1-len64", "bs2-len64"]  # profiled from the last on
    assert [(one["number"], one["start"], one["case"]) for one in starts] == [
        (number, start, case) for number, start in ((1, "off"), (2, "on")) for case in both
    ]
    for one in starts:
        assert one["decode_step_ms"] > 0
        assert [one[f"graph_{name}_us"] for name in ("extend", "draft", "verify")] == [980, 2980, 24980]
        assert one["between_kernels_us"] == 0.4
        assert (one["experts_beside"], one["experts_alone"], one["experts_alone_us"]) == (250, 250, 50)


def test_starts_of_both_sides_are_compared_where_nothing_is_added(run):
    status, found = run("off", "on", "on+MORE=1", "off")
    assert status == 0
    cases = {(one["name"], one["metric"]): one for one in found["cases"]}
    steps = cases["n3-bs2-len64", "decode_step_ms"]
    of = {start: [one["decode_step_ms"] for one in found["starts"][1::2] if one["start"] == start] for start in ("off", "on")}
    assert steps["processes"] == {"upstream": of["off"], "ours": of["on"]} and [len(of["off"]), len(of["on"])] == [2, 1]
    graph = cases["n3-bs1-len64", "graph_verify_us"]
    assert (graph["upstream"], graph["ours"], graph["ratio"], graph["samples"]) == (24980, 24980, 1, 1)
    assert len(cases) == 2 * 9


def test_a_start_of_one_side_is_compared_with_nothing(run):
    assert run("off")[1]["cases"] == []


def test_starts_are_added_to_those_of_a_run_like_it_and_of_no_other(run, capsys):
    first = run("off")[1]["starts"]
    status, found = run("on", "--add")
    assert status == 0 and found["starts"][:2] == first
    assert [(one["number"], one["start"]) for one in found["starts"]] == [(1, "off")] * 2 + [(2, "on")] * 2
    assert run("off", "--add", "--draft-steps", "5") == (1, found)
    assert "same draft_steps" in " ".join(capsys.readouterr().err.split())


def test_after_the_gpu_switched_once_cases_are_measured_again_and_not_compared(run, monkeypatch):
    from benchmarks import speeds

    switched = []
    monkeypatch.setattr(speeds, "switch", lambda env: switched.append(env["CUDA_VISIBLE_DEVICES"]))
    status, found = run("off", "on", "--switch", "1x64", "2x64")
    assert status == 0 and switched == [NO_GPU] * 2
    both = [("bs1-len64", False), ("bs2-len64", False), ("bs1-len64", True), ("bs2-len64", True)]
    assert [(one["case"], one["switched"]) for one in found["starts"]] == both * 2
    assert {len(of) for case in found["cases"] for of in case["processes"].values()} == {1}


def test_without_another_context_what_was_measured_before_stays(run, capsys):
    status, found = run("off", "--switch", "1x64")
    assert status == 1 and [one["switched"] for one in found["starts"]] == [False, False]
    assert "off: no context of another process" in " ".join(capsys.readouterr().err.split())


def test_what_is_served_before_is_served_first_and_not_recorded(run, monkeypatch):
    from benchmarks import speeds

    served, generate = [], speeds.measure.generate
    monkeypatch.setattr(
        speeds.measure, "generate", lambda server, case, plan: served.append(case.name) or generate(server, case, plan)
    )
    _, found = run("off", "--before", "4x32", "--repeats", "1")
    assert served == [name for name in ("bs4-len32", "bs2-len64", "bs1-len64") for _ in range(2)]
    assert found["before"] == ["bs4-len32"] and {one["case"] for one in found["starts"]} == {"bs2-len64", "bs1-len64"}


def test_what_a_start_adds_reaches_its_server_alone(run):
    started.clear()
    assert run("off+--random-seed=7", "on+MORE=1")[0] == 0
    (_, off_flags, off), (_, on_flags, on) = started
    assert off_flags[-2:] == ["--random-seed", "7"] and "7" not in on_flags
    assert "MORE" not in off and on["MORE"] == "1"


def test_what_the_log_says_of_a_case_is_kept_with_its_time(benchmarks):
    from benchmarks import speeds

    def line(at: str, batch: int, tokens: int, accepted: float, per_second: float, rank: str = "") -> str:
        load = f"#running-req: {batch}, #token: {tokens}, token usage: 0.06, accept len: {accepted:.2f}, accept rate: 0.00"
        speed = f"cuda graph: True, gen throughput (token/s): {per_second:.2f}, #queue-req: 0"
        return f"[2026-11-28 {at}{rank}] Decode batch, {load}, {speed}"

    lines = [
        line("06:28:42", 1, 32_832, 1, 6.63),  # with a prefill in it
        line("06:28:43", 1, 32_896, 1, 50),
        line("06:28:51", 1, 32_960, 2, 105.26, " TP0"),
        line("06:28:52", 2, 65_920, 1, 100),  # another batch, and another length
        line("06:28:53", 1, 131_200, 1, 50),
    ]
    case = speeds.measure.Case(1, 32_768)
    assert speeds.over_time("\n".join(lines), case, 20) == [("06:28:43", 20.0), ("06:28:51", 19.0)]


def test_a_start_that_cannot_be_read_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("off", "of+A=1")
    assert "expected off or on" in capsys.readouterr().err


def test_a_case_that_is_not_measured_is_not_measured_again(run, capsys):
    with pytest.raises(SystemExit):
        run("off", "--switch", "1x64", "4x64")
    assert "--switch: expected cases of --case, got bs4-len64" in capsys.readouterr().err
