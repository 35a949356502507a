"""`bench server` with tests/fake_server.py in place of sglang."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import FAKE, free_port, is_free, stub_site, until
from typer.testing import CliRunner

import sglang_nsa_fused
from sglang_nsa_fused.tools.bench import probed, servers, sides
from sglang_nsa_fused.tools.cli import app

METRICS = {"tokens_per_s", "accept_length", "tpot_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "ttft_ms", "step_ms"}


class Bench:
    """The command, in this process; its servers are others."""

    def __init__(self, folder: Path):
        self.folder, self.json, self.port = folder, folder / "results.json", free_port()
        self.path = os.pathsep.join([str(stub_site(folder / "site")), os.environ.get("PYTHONPATH", "")])
        self.calls = folder / "calls"  # what the servers did, in order

    def arguments(self, *more) -> list[str]:
        small = ["--concurrency", "1", "--length", "64", "--output-tokens", "9", "--rounds", "6", "--warmup", "1"]
        own = ["--log-dir", self.folder / "logs", "--json", self.json]
        if "--read-off" not in more:
            own += small
            own += [] if "--attach" in more else ["--port", self.port, "--server-command", FAKE]
        return [str(argument) for argument in ["bench", "server", *own, *more]]

    def env(self, fakes: dict[str, str]) -> dict[str, str]:
        return {"PYTHONPATH": self.path, "FAKE_CALLS": str(self.calls), **{f"FAKE_{name}": side for name, side in fakes.items()}}

    def __call__(self, *more, site: Path | None = None, **fakes):
        env = self.env(fakes) | ({"PYTHONPATH": str(site)} if site else {})
        self.calls.write_text("")
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return CliRunner().invoke(app, self.arguments(*more), env=env)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def cases(self) -> dict[tuple[str, str], dict]:
        return {(one["name"], one["metric"]): one for one in json.loads(self.json.read_text())["cases"]}

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()

    def processes(self) -> list[str]:
        """Those that the servers started, and the servers: all have the samples' path in their environment."""
        mine, found = str(self.folder).encode(), []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if b"SERVER_PROBE_FILE=" + mine in environ.read_bytes():
                    found.append(environ.parent.name)
            except OSError:
                pass
        return found


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr(probed, "SETTLE_SECONDS", 0)
    return Bench(tmp_path)


def failure(result) -> str:
    """The line that says what failed."""
    assert not isinstance(result.exception, Exception), result.exception
    return next(line for line in result.stderr.splitlines() if line.startswith("FAILED"))


def test_both_sides_in_turn_a_table_a_result_file_and_pictures(bench, tmp_path):
    result = bench("--concurrency", "1,2", "--plot", tmp_path / "gain")
    assert result.exit_code == 0, result.output
    assert bench.processes() == []

    calls = bench.calls.read_text().split()
    assert set(calls[:2]) == {"start-off", "start-on"}
    order = ["off", "on", "on", "off"]
    # A warm-up and six rounds of one request, the warm-up as the last of an earlier pair; then three repeats of each side.
    assert calls[2:16] == (order[2:] + order * 3)
    assert calls[16:22] == ["off"] * 3 + ["on"] * 3

    found = json.loads(bench.json.read_text())
    assert {key: found[key] for key in ("schema", "what", "gpu", "sglang", "torch", "plugin", "commit", "mode")} == {
        "schema": 1,
        "what": "server",
        "gpu": "Fake H100",
        "sglang": "0.5.12.post1",
        "torch": "2.11.0",
        "plugin": sglang_nsa_fused.__version__,
        "commit": None,
        "mode": "interleaved",
    }
    assert found["same_tokens"] == {name: {"same": True, "why": ""} for name in ("bs1-len64", "bs2-len64")}
    cases = bench.cases()
    assert {metric for name, metric in cases if name == "bs2-len64"} == METRICS | {"gpu_draft_us"}
    assert {name for name, metric in cases if metric == "host_us"} == {
        f"bs{bs}-len64-{kind}" for bs in (1, 2) for kind in ("draft", "verify", "extend")
    }
    for one in cases.values():
        samples = {"peak_mib": 1, "table_bytes": 1, "gpu_draft_us": 3}.get(one["metric"], 6)
        assert one["samples"] == samples == len(one["rounds"]["upstream"]) == len(one["rounds"]["ours"])
        assert one["ratio"] == pytest.approx(one["upstream"] / one["ours"], rel=1e-2)
    accepted = cases["bs1-len64", "accept_length"]
    assert (accepted["upstream"], accepted["ours"], accepted["verdict"]) == (9 / 4, 9 / 4, "no difference shown")
    verify = cases["bs1-len64-verify", "host_us"]
    assert (verify["ours"], verify["verdict"], verify["p"]) == (20, "gain", 0.03125)
    graph = cases["bs2-len64", "gpu_draft_us"]
    assert (graph["upstream"], graph["ours"], graph["verdict"]) == (4000, 3000, "too few rounds")
    assert cases["server", "peak_mib"]["upstream"] == 5120 and cases["server", "peak_mib"]["ours"] == 5121

    tables = cases["server", "table_bytes"]
    assert (tables["upstream"], tables["ours"], tables["ratio"]) == (3 << 20, 2 << 20, 1.5)
    assert re.search(r"tables of the graphs, MiB +3\.00 \(3\.00-3\.00\) +2\.00 \(2\.00-2\.00\) +1\.50", result.stdout)

    metrics = ("time per output token, ms", "inter-token latency p99, ms", "verify refresh, host us", "peak memory, MiB")
    for text in (*metrics, "no difference shown", "bs2-len64, 6 rounds"):
        assert text in result.stdout
    assert "The same tokens on both sides: bs1-len64, bs2-len64." in result.stderr
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "gain.svg").read_text()


def test_one_at_a_time_starts_off_on_on_off(bench):
    result = bench("--one-at-a-time", "--rounds", "2", "--repeats", "1")
    assert result.exit_code == 0, result.output
    calls = bench.calls.read_text().split()
    assert [call for call in calls if call.startswith("start")] == ["start-off", "start-on", "start-on", "start-off"]
    assert calls[:6] == ["start-off"] + ["off"] * 5  # a warm-up, one that counts, three repeats
    assert calls[-3:] == ["start-off", "off", "off"]
    assert bench.cases()["bs1-len64", "tpot_ms"]["verdict"] == "too few rounds"
    assert bench.processes() == []


def test_the_small_model_and_the_sides_flags(bench):
    assert bench("--layers", "5", "--experts", "32", "--rounds", "1", "--server-flags", "--tp 2").exit_code == 0
    config = json.loads((bench.folder / "logs/model/config.json").read_text())
    assert (config["num_hidden_layers"], config["n_routed_experts"]) == (5, 32)
    off, on = bench.log("off"), bench.log("on")
    for flags in ("'--load-format', 'dummy'", "'--tp', '2'", "'--speculative-num-steps', '4'"):
        assert flags in off and flags in on
    assert "'SGLANG_PLUGINS': 'server_probe'" in off and "'SGLANG_PLUGINS': 'nsa_fused,server_probe'" in on
    assert "MTP_PRECOMPUTE" not in off and "'SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA': '1'" in on


def test_a_real_model_keeps_its_weights_and_sglangs_choices(bench):
    result = bench("--model-path", "some/model", "--rounds", "1", "--mem-fraction", "0.8")
    assert result.exit_code == 0, result.output
    log = bench.log("on")
    assert "'--model-path', 'some/model'" in log and "'--mem-fraction-static', '0.8'" in log and "'EAGLE'" in log
    for absent in ("dummy", "max-running", "skip-tokenizer", "max-total-tokens", "kv-cache-dtype", "DENSE_ATTN"):
        assert absent not in log


def test_a_real_model_runs_as_many_requests_as_are_measured(bench):
    assert bench("--model-path", "some/model", "--rounds", "1", "--concurrency", "1,49").exit_code == 0
    assert "'--max-running-requests', '49'" in bench.log("on")


def test_a_case_whose_batches_were_never_full_says_so(bench):
    result = bench("--concurrency", "9", "--rounds", "1")  # the stand-in's batches are of 8
    assert result.exit_code == 0, result.output
    assert "No host time of refreshes in bs9-len64: no batch had all its requests." in result.stderr


def test_a_probe_that_is_not_loaded(bench):
    result = bench(PLUGIN_FAILS="off")
    assert result.exit_code == 1
    assert failure(result).startswith("FAILED off: sglang did not load a plugin: Failed to load plugin 'server_probe'")
    assert bench.processes() == []


def test_simulated_acceptance_compares_no_tokens(bench):
    result = bench("--simulate-acceptance", "2.5", "--rounds", "1", TOKENS="on")
    assert result.exit_code == 0, result.output
    assert "acceptance is simulated: the tokens of both sides are not compared" in result.stderr
    assert "'SGLANG_SIMULATE_ACC_LEN': '2.5'" in bench.log("off") and "'SGLANG_SIMULATE_ACC_LEN': '2.5'" in bench.log("on")
    assert json.loads(bench.json.read_text())["same_tokens"] == {}


def test_a_release_without_a_loader_gets_no_probe(bench, tmp_path):
    site = stub_site(tmp_path / "old", "0.5.9", loader=False)
    result = bench("--rounds", "1", site=site, NO_SAMPLES="1")
    assert result.exit_code == 0, result.output
    assert "0.5.9 loads no plugins" in result.stderr and "are not measured" in result.stderr
    assert "'SGLANG_EXTERNAL_MODEL_PACKAGE': 'sglang_nsa_fused.external'" in bench.log("on")
    assert "server_probe" not in bench.log("on") and "EXTERNAL" not in bench.log("off")
    assert {metric for _, metric in bench.cases()} == METRICS


def test_other_tokens_fail(bench):
    result = bench("--rounds", "3", TOKENS="on")
    assert result.exit_code == 1
    assert "FAILED bs1-len64: the tokens of off and on differ: round 2, request 0, token 3: " in failure(result)


def test_other_tokens_of_an_sglang_that_does_not_repeat_itself(bench):
    result = bench("--rounds", "3", TOKENS="on", UNSTEADY="off")
    assert result.exit_code == 0
    assert "Tokens not compared in bs1-len64: sglang's own outputs differ from repeat to repeat." in result.stderr


def test_requests_that_meet_in_other_batches_are_not_compared_but_those_of_one_call_are(bench):
    result = bench("--concurrency", "2", "--rounds", "1", ROUNDS="1")
    assert result.exit_code == 0, result.output
    assert json.loads(bench.json.read_text())["same_tokens"] == {"bs2-len64": {"same": True, "why": ""}}
    result = bench("--concurrency", "2", "--rounds", "1", TOKENS="on")
    assert result.exit_code == 1
    assert "the tokens of off and on differ: repeats, request 0, token 3: " in failure(result)


def test_calls_in_other_batches_are_not_compared(bench):
    result = bench("--concurrency", "2", TOKENS="on", APART="on")
    assert result.exit_code == 0, result.output
    same = json.loads(bench.json.read_text())["same_tokens"]["bs2-len64"]
    assert same == {"same": None, "why": "no repeat of one call was put together in the same batches on both sides"}


def test_ranks_that_split_a_call_are_not_compared(bench):
    result = bench("--concurrency", "1,2", "--rounds", "1", DP_SIZE="2", TOKENS="on")
    assert result.exit_code == 1  # for one request
    assert "Tokens not compared in bs2-len64: data-parallel ranks batch the requests of one call as they come." in result.stderr


def test_a_cache_that_is_not_emptied(bench):
    result = bench("--rounds", "1", KEEPS_CACHE="on")
    assert result.exit_code == 1
    assert "/flush_cache: the prefix cache was not emptied" in failure(result)
    assert "Tokens not compared in bs1-len64: it ended before." in result.stderr


def test_a_server_that_dies_while_it_starts(bench):
    result = bench(DIE_EARLY="on")
    assert result.exit_code == 1
    assert failure(result) == f"FAILED on: the server ended with status 3; from {bench.folder / 'logs/on.log'}:"
    assert result.stderr.rstrip().endswith("ValueError: boom") and "nothing was measured" in result.stderr
    assert bench.processes() == []


def test_a_server_that_dies_later_leaves_what_was_measured(bench):
    result = bench(DIE_LATE="off")  # with the seventh request: the sixth round
    assert result.exit_code == 1
    assert failure(result).startswith("FAILED off: the server ended with status 9; from ")
    assert result.stderr.rstrip().endswith("RuntimeError: caught fire")
    assert bench.cases()["bs1-len64", "tpot_ms"]["samples"] == 5
    assert bench.processes() == []


def test_out_of_memory_says_what_to_lower(bench):
    result = bench(DIE_LATE="on", OOM="1")
    assert result.exit_code == 1
    assert failure(result).startswith("FAILED on: out of memory: lower --mem-fraction, --layers,")


@pytest.mark.parametrize("mode", [[], ["--one-at-a-time"]])
def test_a_port_that_is_taken(bench, mode):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", bench.port + servers.PORTS_APART))
        taken.listen()
        result = bench(*mode)
    assert result.exit_code == 1
    assert failure(result) == f"FAILED port {bench.port + servers.PORTS_APART} is taken: give another --port"


@pytest.mark.parametrize(
    "fakes, said",
    [
        ({"NO_LINE": "1"}, "on: the plugin is not active"),
        ({"LINE_TOO": "1"}, "off: the plugin is active, and must not be"),
        ({"FALLBACK": "on"}, "on: the server fell back: Warning: fused metadata copy kernel not available"),
    ],
)
def test_the_plugin_on_the_wrong_side(bench, fakes, said):
    result = bench(**fakes)
    assert result.exit_code == 1
    assert failure(result).startswith(f"FAILED {said}")
    assert bench.calls.read_text().split()[2:] == [] and bench.processes() == []


@pytest.mark.parametrize(
    "site, said",
    [
        ({"gpu": False}, "no GPU: torch.cuda.is_available() is False"),
        ({"sglang": "0.5.6"}, "sglang 0.5.6 is not supported; supported are 0.5.7 to "),
    ],
)
def test_a_machine_that_runs_no_server(bench, tmp_path, site, said):
    result = bench(site=stub_site(tmp_path / "other", **site))
    assert result.exit_code == 1
    assert failure(result).startswith(f"FAILED {said}")
    assert bench.calls.read_text() == ""


def test_no_torch_at_all(bench, tmp_path):
    site = stub_site(tmp_path / "other")
    (site / "torch/__init__.py").write_text("raise ModuleNotFoundError('no torch here')")
    result = bench(site=site)
    assert result.exit_code == 1
    assert failure(result) == "FAILED torch and sglang are not both installed: ModuleNotFoundError: no torch here"


@pytest.fixture
def running(bench):
    """Two servers that nobody here stops."""
    env = os.environ | {"FAKE_CALLS": str(bench.calls)}
    command = [*shlex.split(FAKE), "--port"]
    gate = {"SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": "1"}
    started = [
        subprocess.Popen([*command, str(bench.port + at)], env=env | more, stdout=subprocess.DEVNULL)
        for at, more in enumerate(({}, gate))
    ]
    until(lambda: not is_free(bench.port) and not is_free(bench.port + 1), *started)
    yield [f"http://127.0.0.1:{bench.port + at}/" for at in (0, 1)], started
    for process in started:
        process.kill()
        process.wait()


def test_attached_servers_are_driven_and_left_alone(bench, running):
    urls, started = running
    result = bench("--attach", *urls)
    assert result.exit_code == 0, result.output
    assert "refreshes and peak memory are not measured" in result.stderr
    assert {metric for _, metric in bench.cases()} == METRICS
    assert json.loads(bench.json.read_text())["mode"] == "attached"
    assert [process.poll() for process in started] == [None, None]


def test_nobody_at_an_attached_url(bench):
    result = bench("--attach", f"http://127.0.0.1:{bench.port}", f"http://127.0.0.1:{bench.port + 1}")
    assert result.exit_code == 1
    assert failure(result).startswith(f"FAILED off: no answer from http://127.0.0.1:{bench.port}: ")


@pytest.mark.parametrize("number, child", [(signal.SIGINT, "on"), (signal.SIGTERM, ""), (signal.SIGHUP, "")])
def test_ctrl_c_leaves_no_process_and_keeps_what_was_measured(bench, number, child):
    arguments = bench.arguments("--concurrency", "1,2", "--rounds", "2", "--output-tokens", "5")
    env = os.environ | bench.env({"CHILD": child, "HANG": "1"})
    env["PYTHONPATH"] += os.pathsep + str(Path(sglang_nsa_fused.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_nsa_fused", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored where the tests run under nohup
    )
    until(lambda: bench.calls.exists() and "hang" in bench.calls.read_text(), process)
    assert len(bench.processes()) == 2 + bool(child)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert bench.processes() == []
    assert "FAILED interrupted; what was measured is kept" in said and "time per output token" in said
    assert bench.cases()["bs1-len64", "tpot_ms"]["samples"] == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--length", "40000"], ["--length 40000", "--context-length 32768"]),
        (["--experts", "20"], ["--experts", "multiple of 8", "20"]),
        (["--cache", "fp4"], ["--cache", "bf16, fp8", "fp4"]),
        (["--concurrency", "1,x"], ["1,4,16", "1,x"]),
        (["--attach", "localhost:1", "http://b"], ["--attach", "localhost:1"]),
        (["--attach", "http://a", "http://b", "--one-at-a-time"], ["--attach", "--one-at-a-time", "got several"]),
        (
            ["--attach", "http://a", "http://b", "--simulate-acceptance", "2"],
            ["--simulate-acceptance", "SGLANG_SIMULATE_ACC_LEN"],
        ),
        (["--attach", "http://a", "http://b", "--layers", "2"], ["--layers is not for --attach"]),
        (["--attach", "http://a", "http://b", "--port", "1"], ["--port is not for --attach"]),
        (["--model-path", "org/model", "--experts", "32"], ["--experts is not for --model-path"]),
        (["--repeats", "2"], ["--repeats is not for two servers at once"]),
        (["--read-off", "a", "--read-on", "b", "--rounds", "7"], ["--rounds is not for --read-off"]),
        (["--read-off", "a.jsonl"], ["--read-on", "got one"]),
        (["--draft-steps", "1"], ["--draft-steps"]),
        (["--mem-fraction", "5"], ["--mem-fraction"]),
        (["--attach", "http://a", "http://a"], ["--attach", "http://a twice"]),
        (["--model-path", ""], ["--model-path", "got an empty one"]),
        (["--model-path", "/nowhere"], ["--model-path", "config.json", "got /nowhere"]),
        (["--server-flags", 'a "b'], ["--server-flags", "No closing quotation"]),
        (["--json", "/proc/no/where.json"], ["--json", "cannot be written"]),
        (["--json", "/tmp"], ["--json", "it is a folder"]),
        (["--plot", "/dev/null/a.png"], ["--plot", "cannot be written"]),
        (["--log-dir", "/dev/null"], ["--log-dir", "cannot be written"]),
    ],
)
def test_bad_options_are_named(arguments, said):
    result = CliRunner().invoke(app, ["bench", "server", *arguments], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert all(part in text for part in said), text


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    result = CliRunner().invoke(app, ["bench", "server"])
    assert result.exit_code == 1
    assert "scipy is missing: pip install aiohttp matplotlib 'scipy>=1.9'" in str(result.exception.args) + result.output


def test_the_command_line_imports_no_torch():
    code = (
        "import sys, sglang_nsa_fused.tools.cli; sys.exit(bool({'torch', 'scipy', 'aiohttp', 'matplotlib'} & set(sys.modules)))"
    )
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(sglang_nsa_fused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def serving_result(**more) -> dict:
    """A line of sglang's bench_serving, without what we do not read."""
    return {
        "backend": "sglang",
        "dataset_name": "random",
        "request_rate": float("inf"),
        "max_concurrency": 8,
        "random_input_len": 1024,
        "random_output_len": 128,
        "output_throughput": 500.0,
        "median_ttft_ms": 90.0,
        "median_tpot_ms": 9.0,
        "median_itl_ms": 8.0,
        "p99_itl_ms": 30.0,
        "accept_length": 2.5,
        **more,
    }


def write_lines(path: Path, results: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in results))
    return path


def test_results_of_bench_serving_are_read_and_paired(bench, tmp_path):
    off = [serving_result(median_tpot_ms=9.0 + at / 10, accept_length=None) for at in range(6)]
    on = [serving_result(median_tpot_ms=6.0 + at / 10, accept_length=None) for at in range(6)]
    files = [write_lines(tmp_path / f"{name}.jsonl", part) for name, part in (("a", off[:2]), ("b", off[2:]), ("c", on))]
    result = bench("--read-off", files[0], "--read-off", files[1], "--read-on", files[2], "--plot", tmp_path / "read.svg")
    assert result.exit_code == 0, result.output
    case = bench.cases()["random-bs8-len1024-out128", "tpot_ms"]
    assert (case["upstream"], case["ours"], case["p"], case["verdict"]) == (9.25, 6.25, 0.03125, "gain")
    assert case["rounds"]["upstream"] == [9.0, 9.1, 9.2, 9.3, 9.4, 9.5]
    assert bench.cases()["random-bs8-len1024-out128", "ttft_ms"]["verdict"] == "no difference shown"
    assert {metric for _, metric in bench.cases()} == METRICS - {"accept_length", "itl_p90_ms", "step_ms"}
    assert (tmp_path / "read.svg").exists() and not (tmp_path / "read.png").exists()
    assert json.loads(bench.json.read_text())["mode"] == "bench_serving"


@pytest.mark.parametrize(
    "on, said",
    [
        ("", "on.jsonl: expected results of bench_serving, and there are none"),
        (
            2 * (json.dumps(serving_result()) + "\n"),
            "expected as many results of both sides, got 1 of --read-off and 2 of --read-on",
        ),
        ("{}\n", "on.jsonl:1: expected a result of bench_serving, and it has no output_throughput"),
        ("no JSON\n", "on.jsonl:1: expected a result of bench_serving"),
        ("[1]\n", "on.jsonl:1: expected a result of bench_serving, and it has no JSON"),
        (json.dumps(serving_result(output_throughput="fast")), "on.jsonl:1: expected a result .* no output_throughput"),
        (None, "on.jsonl: No such file or directory"),
    ],
)
def test_files_that_do_not_pair(bench, tmp_path, on, said):
    if on is not None:
        (tmp_path / "on.jsonl").write_text(on)
    result = bench("--read-off", write_lines(tmp_path / "off.jsonl", [serving_result()]), "--read-on", tmp_path / "on.jsonl")
    assert result.exit_code == 1
    assert re.search(said, failure(result))


def test_a_half_written_sample_waits_for_its_end(tmp_path):
    server = sides.Setup(tmp_path, (), 30_000, loader=True, dense_prefill=False).server("ours", 2)
    server.samples_file.write_text('{"at": 1}\n{"at": ')
    assert server.name == "on-3" and server.samples() == [{"at": 1}]


@pytest.mark.parametrize(
    "said, expected",
    [("7, 100\n9, 3\n7, 20\n", {7: 120, 9: 3}), ("7, [N/A]\n", {}), ("", {})],
    ids=["on two GPUs", "not told", "nothing on the GPU"],
)
def test_gpu_memory_by_process(tmp_path, monkeypatch, said, expected):
    stub = tmp_path / "nvidia-smi"
    stub.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert servers.gpu_memory_by_process() == expected
