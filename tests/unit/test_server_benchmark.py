"""benchmarks/server.py with tests/fake_server.py in place of sglang."""

import itertools
import json
import os

import pytest
from stand_in import FAKE, NO_GPU, free_port, stub_site

from sglang_nsa_fused.tools.bench import process
from sglang_nsa_fused.tools.bench.measure import OBSERVED


@pytest.fixture
def server(benchmarks):
    from benchmarks import server

    return server


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "SETTLE_SECONDS", 0)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", NO_GPU)
    monkeypatch.setenv("PYTHONPATH", str(stub_site(tmp_path / "site")))

    def call(*more, **env) -> tuple[int, dict]:
        for name, value in env.items():
            monkeypatch.setenv(f"FAKE_{name}", value)
        out = tmp_path / "server.json"
        own = {"--server-command": FAKE, "--log-dir": tmp_path / "logs", "--out": out, "--port": free_port()}
        case = "--draft-steps 3 --case 2x64 --starts 2 --repeats 4 --warmup 1 --output-tokens 9 --commit c".split()
        status = server.main([*map(str, itertools.chain(*own.items())), *case, *more])
        return status, json.loads(out.read_text())

    return call


def test_one_server_at_a_time_and_each_metric_of_a_case(run, tmp_path):
    status, found = run("--context-length", "163840")
    assert status == 0
    each = 1 + 4 + OBSERVED
    calls = (tmp_path / "calls").read_text().split()
    assert calls == [one for side in ("off", "on", "on", "off") for one in [f"start-{side}"] + [side] * each]
    cases = {(one["name"], one["metric"]): one for one in found["cases"]}
    name = "n3-bs2-len64-width163840-bf16"
    metrics = ("step_ms", "decode_step_ms", "gpu_draft_us", "tokens_per_s", "accept_length")
    assert cases.keys() == {(name, metric) for metric in metrics} | {
        (f"{name}-{kind}", "host_us") for kind in ("draft", "verify", "extend")
    }
    steps, intervals = cases[name, "step_ms"], cases[name, "decode_step_ms"]  # of a call's five one has no step after it
    assert steps["samples"] == 2 * 4 and intervals["samples"] == 2 * 4 * (5 - 1)
    graph = cases[name, "gpu_draft_us"]
    assert (graph["upstream"], graph["ours"], graph["samples"]) == (4000, 3000, 2 * 5 * OBSERVED)
    assert graph["processes"] == {"upstream": [4000, 4000], "ours": [3000, 3000]}
    (configuration,) = found["configurations"]
    assert (configuration["start"], configuration["starts"], configuration["warmup"]) == ("alone", 2, 1)
    assert configuration["table_bytes"] == {"upstream": 3 << 20, "ours": 2 << 20}
    assert configuration["free_gib"] == {"upstream": 90.5, "ours": 92.5}
    assert configuration["plugin"].startswith("sglang-nsa-fused 0.1.0 active")
    assert all(len(set(one[sha].values())) == 1 for one in cases.values() for sha in ("output_sha", "draft_sha"))


def test_clocks_and_power_are_those_of_the_runs_that_count(run, tmp_path, monkeypatch):
    stub = tmp_path / "bin/nvidia-smi"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\ncase "$*" in *clocks.sm*) printf "1980, 412.5\\n1950, 698.1\\n19"; exec sleep 60;; esac\nexit 6\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent), prepend=os.pathsep)
    status, found = run()
    assert status == 0
    cases = {one["metric"]: one for one in found["cases"]}
    assert (cases["sm_mhz"]["upstream"], cases["watts"]["ours"], cases["watts"]["samples"]) == (1965, 555.3, 2 * 2)


def test_another_model_has_its_layers_in_the_name_and_a_file_of_its_own(run, tmp_path):
    model = tmp_path / "rank8"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 61}')
    status, found = run("--model-path", str(model), "--starts", "1", "--server-flags", "--mem-fraction-static 0.8")
    assert (status, found["model"]) == (0, "rank8")
    assert {one["name"] for one in found["configurations"]} == {"n3-width32768-bf16-layers61"}
    log = (tmp_path / "logs/n3-width32768-bf16-layers61-on-1.log").read_text()
    assert f"'--model-path', '{model}'" in log and "'--mem-fraction-static', '0.8'" in log and "'dummy'" in log
    with pytest.raises(SystemExit, match="give another --out"):
        run("--starts", "1")


def test_no_start_that_would_end_too_late(run, server, capsys, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("--max-minutes", "0")
    assert "nothing was measured\nFAILED n3-width32768-bf16: n3-width32768-bf16-off-1: " in capsys.readouterr().err


def test_other_drafts_of_the_same_output_fail(run, capsys):
    status, found = run(DRAFT="on")
    assert status == 1 and "the draft tokens differ in 10 of 10 and 10 rows" in capsys.readouterr().err
    assert all(len(set(one["output_sha"].values())) == 1 < len(set(one["draft_sha"].values())) for one in found["cases"])


def test_other_tokens_fail(run, capsys):
    status, _ = run(TOKEN="on")
    assert status == 1 and "the output ids differ" in capsys.readouterr().err
