"""tests/e2e against a fake server: what passes there must be able to fail."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import NO_GPU, free_port

HERE = Path(__file__).resolve().parent
E2E = HERE.parent / "e2e"


class Run:
    """pytest on tests/e2e in a process of its own, against the fake server."""

    def __init__(self, folder: Path, *args: str, **env: str):
        self.folder = folder
        command = [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", E2E),
            *("--confcutdir", E2E),  # without tests/conftest.py nothing imports torch, which takes seconds
            *("--e2e-log-dir", folder, "--e2e-port", free_port(), "--e2e-requests", 40),
            *("--e2e-command", shlex.join([sys.executable, str(E2E.parent / "fake_server.py")])),
            *("--e2e-cache", "bf16", "--e2e-minutes", 0.05, *args),
        ]
        env = {"FAKE_MARGIN": "1", "FAKE_STEP_SECONDS": "0.04", "COLUMNS": "300", "CUDA_VISIBLE_DEVICES": NO_GPU, **env}
        self.process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | env,
            cwd=HERE.parents[1],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def result(self) -> tuple[str, str]:
        """The summary line and all output."""
        output, _ = self.process.communicate()
        return output.splitlines()[-1], output


def on(*faults: str) -> dict[str, str]:
    return {f"FAKE_{fault}": "on" for fault in faults}


SERVER = ("--e2e-draft-steps", "4", "-k", "test_server")
RUNS = {
    "good": (SERVER, {}),
    "faulty": (SERVER, on("NO_LINE", "DRAFT", "BUSY", "LEAK")),
    "bits": ((*SERVER[:2], "-k", "test_server and (one_call or abort)"), on("LOGPROB", "NO_ABORT")),
    "some apart": ((*SERVER[:2], "-k", "test_server and one_call"), {"FAKE_APART": "2"}),
    "all apart": ((*SERVER[:2], "-k", "test_server and one_call"), {"FAKE_APART": "1"}),
    "tokens": ((*SERVER[:2], "-k", "test_server and (log_line or joining or prefix)"), on("TOKEN", "FALLBACK")),
    "undecided": ((*SERVER[:2], "-k", "test_server and (joining or chunked)"), on("TOKEN") | {"FAKE_MARGIN": "0.01"}),
    "two GPUs": (("-k", "two_gpus"), {"FAKE_REFUSES_DP": "1"}),
    "one rank": (("-k", "two_gpus and ranks"), on("ONE_RANK")),
    "disaggregation": (("-k", "disaggregation"), {}),
    "disaggregation, faulty": (("-k", "disaggregation"), on("TOKEN", "DRAFT", "NO_LINE")),
    "disaggregation, refused": (("-k", "disaggregation", "-rs"), {"FAKE_REFUSES_PD": "1"}),
    "weights": ((*SERVER[:2], "-k", "test_server and log_line"), on("OTHER_WEIGHTS")),
    "terminated": ((*SERVER[:2], "-k", "test_server and load", "--e2e-minutes", "10"), {}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All at once: they mostly wait."""
    found = {name: Run(tmp_path_factory.mktemp("e2e"), *args, **env) for name, (args, env) in RUNS.items()}
    yield found
    for run in found.values():
        run.process.kill()


def failures(output: str) -> dict[str, str]:
    """Test -> what it failed with."""
    return dict(re.findall(r"^FAILED \S+::(\w+)\S* - (.*)$", output, re.M))


def servers_of(run: Run) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{run.folder}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            pass
    return [one for one in found if "fake_server" in one and "--port" in one]


def test_passes(runs):
    summary, output = runs["good"].result()
    assert "8 passed" in summary and "failed" not in summary, output
    assert "of 40 answers identical" in output
    assert not servers_of(runs["good"])


def test_faults_fail(runs):
    _, output = runs["faulty"].result()
    expected = {
        "test_log_line": "expected one line of an active plugin, got \\[\\]",
        "test_one_call": "the draft tokens of one call differ",
        "test_joining_and_leaving": "the output ids differ with the plugin on",
        "test_above_the_largest_graph": "the output ids differ with the plugin on",
        "test_load": "host memory drifts",
    }
    found = failures(output)
    assert found.keys() == expected.keys(), output
    for test, text in expected.items():
        assert re.search(text, found[test]), found[test]
    assert not servers_of(runs["faulty"])


def test_differing_logprobs_and_unaborted_requests_fail(runs):
    _, output = runs["bits"].result()
    found = failures(output)
    assert found.keys() == {"test_one_call", "test_abort"}, output
    assert "the logprobs of one call differ" in found["test_one_call"]
    assert "still decoding after its requests were aborted" in found["test_abort"]


def test_calls_are_compared_where_they_were_batched_alike(runs):
    summary, output = runs["some apart"].result()
    assert "1 passed" in summary and "6 calls of each, [6, 3] in the same batches" in output, output
    _, output = runs["all apart"].result()
    assert "no 3 were put together in the same batches" in failures(output)["test_one_call"], output


def test_differing_tokens_fail(runs):
    _, output = runs["tokens"].result()
    found = failures(output)
    assert "fell back" in found["test_log_line"]
    assert "differs at token" in output and "where upstream is decided by 1.000 nats" in output
    assert found.keys() == {"test_log_line", "test_joining_and_leaving", "test_prefix_reuse"}, output


def test_undecided_tokens_pass_unless_there_are_many(runs):
    summary, output = runs["undecided"].result()
    found = failures(output)
    assert found.keys() == {"test_joining_and_leaving"} and "1 passed" in summary, output
    assert "of upstream's own" in found["test_joining_and_leaving"]
    assert "from an undecided token on, margins up to 0.010" in output


def test_two_gpus(runs):
    summary, output = runs["two GPUs"].result()
    assert "3 passed, 3 skipped" in summary, output
    assert "refuses data-parallel attention here: ValueError: no data-parallel attention" in output
    _, output = runs["one rank"].result()
    assert failures(output).keys() == {"test_active_on_both_ranks"}, output


def test_disaggregation(runs):
    summary, output = runs["disaggregation"].result()
    assert "4 passed" in summary and "32 of 32 answers identical" in output, output
    assert not servers_of(runs["disaggregation"])
    _, output = runs["disaggregation, faulty"].result()
    assert failures(output).keys() == {"test_log_lines", "test_one_by_one", "test_several_at_a_time"}, output
    summary, output = runs["disaggregation, refused"].result()
    assert "4 skipped" in summary and "sglang itself does not start: ImportError: no transfer engine" in output, output


def test_servers_without_the_probes_weights_are_not_compared(runs):
    summary, output = runs["weights"].result()
    assert "1 error" in summary and "passed" not in summary, output
    assert "n4-on: its weights are not the probe's" in output
    assert not servers_of(runs["weights"])


def test_skipped_without_a_gpu():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", E2E]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0 and "passed" not in done.stdout, done.stdout
    assert "needs 1 GPU, there are 0" in done.stdout and "needs 2 GPUs, there are 0" in done.stdout


def test_terminated_run_stops_its_servers(runs):
    run = runs["terminated"]
    while "ready after" not in run.process.stdout.readline():
        assert run.process.poll() is None
    assert len(servers_of(run)) == 2
    run.process.terminate()
    run.result()
    assert run.process.returncode == 2 and not servers_of(run)
