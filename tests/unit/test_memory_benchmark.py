"""benchmarks/memory.py with tests/fake_server.py in place of sglang."""

import itertools
import json

import pytest
from stand_in import FAKE, free_port, stub_site

from sglang_nsa_fused.tools.bench import process


@pytest.fixture
def memory(benchmarks):
    from benchmarks import memory

    return memory


@pytest.fixture
def run(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(memory, "PORTS_APART", 20)
    monkeypatch.setattr(process, "gpu_memory_mib", lambda gpu: 0)  # others use a real one
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 1000}')
    monkeypatch.setenv("PYTHONPATH", str(stub_site(tmp_path / "site")))

    def call(*more, **env) -> tuple[int, dict]:
        for name, value in env.items():
            monkeypatch.setenv(f"FAKE_{name}", value)
        out = tmp_path / "memory.json"
        own = {"--server-command": FAKE, "--log-dir": tmp_path / "logs", "--out": out, "--port": free_port()}
        case = ["--model-path", model, *"--batch 3 --output-tokens 4 --input-tokens 8 --commit c".split()]
        status = memory.main([*map(str, itertools.chain(*own.items(), case)), *more])
        return status, json.loads(out.read_text()) if out.exists() else {}

    return call


def test_the_highest_fraction_of_each_side(run, tmp_path):
    status, found = run("--gpus", "4", "--low", "0.80", "--high", "0.97", FITS_off="86", FITS_on="93")
    assert (status, found["what"], found["finished"], found["sglang"]) == (0, "memory", True, "0.5.12.post1")
    cases = {one["metric"]: one for one in found["cases"]}
    assert (cases["mem_fraction"]["upstream"], cases["mem_fraction"]["ours"]) == (0.86, 0.93)
    assert (cases["pool_tokens"]["upstream"], cases["pool_tokens"]["ours"]) == (86_000, 93_000)
    assert {one["name"] for one in found["cases"]} == {"n5-bs3-context1048576-bf16"}
    tries = {(one["side"], one["hundredths"]): one for one in found["tries"]}
    assert len(tries) == len(found["tries"]) < 2 * 10  # of 2 * 18
    assert tries["upstream", 87]["why"] == "out of memory in its first full batch" and tries["upstream", 87]["seconds_to_ready"]
    early = [one for one in tries.values() if one["why"] == "out of memory in its start"]
    assert early and all(one["seconds_to_ready"] is None for one in early)
    assert {one["gpu"] for one in found["tries"]} == {"0", "1", "2", "3"}
    log = (tmp_path / "logs/ours-93.log").read_text()
    for flags in ("'--context-length', '1048576'", "'--mem-fraction-static', '0.93'", "'--max-running-requests', '3'"):
        assert flags in log
    assert "'SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN': '1'" in log


def test_one_gpu_has_one_server_at_a_time_and_what_is_too_low_is_no_end(run, tmp_path):
    status, found = run("--low", "0.80", "--high", "0.90", FITS_off="88", FITS_on="89", LEAST="87")
    cases = {one["metric"]: one for one in found["cases"]}
    assert status == 0 and (cases["mem_fraction"]["upstream"], cases["mem_fraction"]["ours"]) == (0.88, 0.89)
    assert "no memory for a KV cache" in {one["why"] for one in found["tries"]}
    assert {one["gpu"] for one in found["tries"]} == {"0"}


@pytest.mark.parametrize(
    "fakes, text",
    [
        ({"DIE_EARLY": "on"}, "ours-85: the server ended with status 1"),
        ({"NO_LINE": "on"}, "ours-85: the plugin is not active"),
        ({"FITS_off": "70"}, "upstream: no fraction worked"),
        ({}, "ours: --high 0.85 works; give a higher one"),
    ],
)
def test_what_is_no_result(run, capsys, fakes, text):
    status, _ = run("--gpus", "2", "--low", "0.85", "--high", "0.85", **fakes)
    assert status == 1 and f"FAILED {text}" in capsys.readouterr().err


def test_nothing_is_begun_that_would_end_too_late(run, capsys):
    status, found = run("--low", "0.80", "--high", "0.90", "--max-minutes", "0")
    assert (status, found) == (1, {})
    assert "nothing was measured\nFAILED not finished: too little time is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, text",
    [
        (("--low", "0.9", "--high", "0.8"), "expected 0 < low <= high < 1, got 0.9 and 0.8"),
        (("--gpus", "0"), "--gpus: expected at least 1, got 0"),
        (("--model-path", "nowhere"), "--model-path: expected a folder with a config.json that has a vocab_size, got nowhere"),
    ],
)
def test_options_that_cannot_be(run, capsys, more, text):
    with pytest.raises(SystemExit) as ended:
        run(*more)
    assert ended.value.code == 2 and text in capsys.readouterr().err
