"""`bench server` with tests/fake_server.py in place of sglang."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import FAKE, NO_GPU, free_port, stub_site, until
from typer.testing import CliRunner

import sglang_nsa_fused
from sglang_nsa_fused.tools.bench import measure, process
from sglang_nsa_fused.tools.cli import app

METRICS = {"step_ms", "tokens_per_s", "accept_length"}
PROBED = {"decode_step_ms", "gpu_draft_us"}


class Bench:
    """The command, in this process; its servers are others."""

    def __init__(self, folder: Path):
        self.folder, self.json, self.port = folder, folder / "results.json", free_port()
        self.path = os.pathsep.join([str(stub_site(folder / "site")), os.environ.get("PYTHONPATH", "")])
        self.calls = folder / "calls"  # what the servers did, in order

    def arguments(self, *more) -> list[str]:
        small = [
            "--concurrency",
            "1",
            "--length",
            "64",
            "--output-tokens",
            "9",
            "--starts",
            "1",
            "--warmup",
            "1",
            "--repeats",
            "2",
        ]
        own = ["--log-dir", self.folder / "logs", "--json", self.json, "--port", self.port, "--server-command", FAKE]
        return [str(argument) for argument in ["bench", "server", *own, *small, *more]]

    def env(self, fakes: dict[str, str]) -> dict[str, str]:
        own = {"PYTHONPATH": self.path, "FAKE_CALLS": str(self.calls), "CUDA_VISIBLE_DEVICES": NO_GPU}
        return own | {f"FAKE_{name}": side for name, side in fakes.items()}

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
    monkeypatch.setattr(process, "SETTLE_SECONDS", 0)
    return Bench(tmp_path)


def failure(result) -> str:
    """The line that says what failed."""
    assert not isinstance(result.exception, Exception), result.exception
    return next(line for line in result.stderr.splitlines() if line.startswith("FAILED"))


def test_sides_in_turn_a_table_and_a_result_file(bench):
    result = bench("--concurrency", "1,2", "--starts", "2")
    assert result.exit_code == 0, result.output
    assert bench.processes() == []
    each = 2 * (1 + 2 + measure.OBSERVED)  # of both cases a warm-up, those that count, those that are observed
    calls = bench.calls.read_text().split()
    assert calls == [one for side in ("off", "on", "on", "off") for one in [f"start-{side}"] + [side] * each]

    found = json.loads(bench.json.read_text())
    assert {key: found[key] for key in ("schema", "what", "gpu", "sglang", "torch", "plugin", "commit")} == {
        "schema": 1,
        "what": "server",
        "gpu": "Fake H100",
        "sglang": "0.5.12.post1",
        "torch": "2.11.0",
        "plugin": sglang_nsa_fused.__version__,
        "commit": None,
    }
    cases = bench.cases()
    assert {metric for name, metric in cases if name == "bs2-len64"} == METRICS | PROBED
    assert {name for name, metric in cases if metric == "host_us"} == {
        f"bs{bs}-len64-{kind}" for bs in (1, 2) for kind in ("draft", "verify", "extend")
    }
    step = cases["bs1-len64", "step_ms"]
    assert step["samples"] == 2 * 2 and [len(of) for of in step["processes"].values()] == [2, 2]
    assert step["ratio"] == pytest.approx(step["upstream"] / step["ours"], rel=1e-2)
    accepted = cases["bs2-len64", "accept_length"]
    assert (accepted["upstream"], accepted["ours"]) == (9 / 5, 9 / 5)
    assert (cases["bs1-len64-verify", "host_us"]["upstream"], cases["bs1-len64-verify", "host_us"]["ours"]) == (403, 20)
    graph = cases["bs2-len64", "gpu_draft_us"]
    assert (graph["upstream"], graph["ours"]) == (4000, 3000)
    tables = cases["server", "table_bytes"]
    assert (tables["upstream"], tables["ours"], tables["ratio"]) == (3 << 20, 2 << 20, 1.5)
    text = " ".join(result.stdout.split())
    assert "server tables of the graphs, MiB 3.00 2.00 1.50" in text and "call by its verify steps, ms" in text
    assert text.count(" yes") == 2


def test_the_small_model_and_the_sides_flags(bench):
    assert bench("--layers", "5", "--server-flags", "--other 2").exit_code == 0
    config = json.loads((bench.folder / "logs/model/config.json").read_text())
    assert (config["num_hidden_layers"], config["n_routed_experts"]) == (5, 16)
    off, on = bench.log("off-1"), bench.log("on-1")
    for flags in ("'--load-format', 'dummy'", "'--other', '2'", "'--speculative-num-steps', '4'"):
        assert flags in off and flags in on
    assert "'SGLANG_PLUGINS': 'server_probe'" in off and "'SGLANG_PLUGINS': 'nsa_fused,server_probe'" in on
    assert "MTP_PRECOMPUTE" not in off and "'SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA': '1'" in on


def test_a_real_model_keeps_its_weights_and_sglangs_choices(bench, monkeypatch):
    for name in ("NSA", "DSA"):  # the tester's own
        monkeypatch.delenv(f"SGLANG_{name}_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD", raising=False)
    result = bench("--model-path", "some/model", "--server-flags", "--mem-fraction-static 0.8")
    assert result.exit_code == 0, result.output
    log = bench.log("on-1")
    assert "'--model-path', 'some/model'" in log and "'--mem-fraction-static', '0.8'" in log and "'EAGLE'" in log
    for absent in ("dummy", "max-running", "skip-tokenizer", "max-total-tokens", "kv-cache-dtype", "DENSE_ATTN", "OVERWRITE"):
        assert absent not in log


def test_a_real_model_runs_as_many_requests_as_are_measured(bench):
    assert bench("--model-path", "some/model", "--concurrency", "49").exit_code == 0
    assert "'--max-running-requests', '49'" in bench.log("on-1")


def test_a_case_whose_batches_were_never_full_says_so(bench):
    result = bench("--concurrency", "9")  # the stand-in's batches are of 8
    assert result.exit_code == 0, result.output
    assert "bs9-len64: the probe saw no verify of a full batch" in result.stderr


def test_a_probe_that_is_not_loaded(bench):
    result = bench(PLUGIN_FAILS="off")
    assert result.exit_code == 1
    assert failure(result).startswith("FAILED off-1: sglang did not load a plugin: Failed to load plugin 'server_probe'")
    assert bench.processes() == []


def test_a_release_without_a_loader_gets_no_probe(bench, tmp_path):
    site = stub_site(tmp_path / "old", "0.5.9", loader=False)
    result = bench(site=site, NO_SAMPLES="1")
    assert result.exit_code == 0, result.output
    assert "0.5.9 loads no plugins" in result.stderr and "are not measured" in result.stderr
    assert "'SGLANG_EXTERNAL_MODEL_PACKAGE': 'sglang_nsa_fused.external'" in bench.log("on-1")
    assert "server_probe" not in bench.log("on-1") and "EXTERNAL" not in bench.log("off-1")
    assert {metric for _, metric in bench.cases()} == METRICS


def test_other_tokens_fail(bench):
    result = bench(TOKEN="on")
    assert result.exit_code == 1
    assert "FAILED bs1-len64: the output ids differ: request 0, token 8: " in failure(result)
    assert " NO" in result.stdout


def test_other_drafts_of_the_same_tokens_fail(bench):
    result = bench("--concurrency", "2", DRAFT="on")
    assert result.exit_code == 1
    assert failure(result) == "FAILED bs2-len64: the draft tokens differ in 10 of 10 and 10 rows"


def test_other_tokens_of_an_sglang_that_does_not_repeat_itself(bench):
    result = bench(TOKEN="on", UNSTEADY="off")
    assert result.exit_code == 0, result.output
    assert "sglang's own differ" in result.stdout


@pytest.mark.parametrize("each, status", [("1", 0), ("2", 1)], ids=["all calls", "some"])
def test_calls_are_compared_where_they_were_put_together_alike(bench, each, status):
    result = bench("--concurrency", "2", TOKEN="on", APART=each)
    assert result.exit_code == status, result.output
    assert ("no call was put together alike" in result.stdout) == (status == 0)


def test_a_server_that_dies_while_it_starts(bench):
    result = bench(DIE_EARLY="on")
    assert result.exit_code == 1
    assert failure(result) == f"FAILED on-1: the server ended with status 1; from {bench.folder / 'logs/on-1.log'}:"
    assert result.stderr.rstrip().endswith("ValueError: boom") and "nothing was measured" in result.stderr
    assert bench.processes() == []


def test_a_server_that_dies_later_leaves_what_was_measured(bench):
    result = bench("--starts", "2", "--repeats", "4", DIE_LATE="off")  # with the seventh call of its first start
    assert result.exit_code == 1
    assert failure(result).startswith("FAILED off-1: the server ended with status 9; from ")
    assert result.stderr.rstrip().endswith("RuntimeError: caught fire")
    assert bench.processes() == []


def test_out_of_memory_says_what_to_lower(bench):
    result = bench("--repeats", "4", DIE_LATE="on", OOM="1")
    assert result.exit_code == 1
    assert failure(result).startswith("FAILED on-1: out of memory: lower --layers,")


def test_a_port_that_is_taken(bench):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", bench.port))
        taken.listen()
        result = bench()
    assert result.exit_code == 1
    assert failure(result) == f"FAILED port {bench.port} is taken: give another --port"


@pytest.mark.parametrize(
    "fakes, said",
    [
        ({"NO_LINE": "on"}, "on-1: the plugin is not active"),
        ({"LINE_TOO": "1"}, "off-1: the plugin is active, and must not be"),
        (
            {"FALLBACK": "on"},
            "on-1: the server fell back: [2026-01-01 00:00:00] Warning: fused metadata copy",
        ),
    ],
)
def test_the_plugin_on_the_wrong_side(bench, fakes, said):
    result = bench(**fakes)
    assert result.exit_code == 1
    assert failure(result).startswith(f"FAILED {said}")
    assert bench.processes() == []


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


@pytest.mark.parametrize("number, child", [(signal.SIGINT, "on"), (signal.SIGTERM, ""), (signal.SIGHUP, "")])
def test_ctrl_c_leaves_no_process_and_keeps_what_was_measured(bench, number, child):
    arguments = bench.arguments("--starts", "2")
    env = os.environ | bench.env({"CHILD": child, "HANG_AT": "3"})
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
    assert len(bench.processes()) == 1 + bool(child)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert bench.processes() == []
    assert "FAILED interrupted; what was measured is kept" in said and "step, draft to draft" in said
    assert bench.cases()["bs1-len64", "step_ms"]["samples"] == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--length", "40000"], ["--length 40000", "--context-length 32768"]),
        (["--cache", "fp4"], ["--cache", "bf16, fp8", "fp4"]),
        (["--concurrency", "1,x"], ["1,4,16", "1,x"]),
        (["--draft-steps", "1"], ["--draft-steps"]),
        (["--model-path", ""], ["--model-path", "got an empty one"]),
        (["--model-path", "/nowhere"], ["--model-path", "config.json", "got /nowhere"]),
        (["--server-flags", 'a "b'], ["--server-flags", "No closing quotation"]),
        (["--json", "/proc/no/where.json"], ["--json", "cannot be written"]),
        (["--json", "/tmp"], ["--json", "it is a folder"]),
        (["--log-dir", "/dev/null"], ["--log-dir", "cannot be written"]),
    ],
)
def test_bad_options_are_named(arguments, said):
    result = CliRunner().invoke(app, ["bench", "server", *arguments], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert all(part in text for part in said), text


def test_the_command_line_imports_no_torch():
    code = "import sys, sglang_nsa_fused.tools.cli; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(sglang_nsa_fused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_a_half_written_sample_waits_for_its_end(tmp_path):
    server = measure.Setup(tmp_path, (), 30_000).server("ours", 2)
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
    assert process.gpu_memory_by_process() == expected
