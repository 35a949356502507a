"""benchmarks/server.py with tests/fake_server.py in place of sglang."""

import itertools
import json

import pytest
from stand_in import FAKE, free_port, stub_site

from sglang_nsa_fused.tools.bench import probed


@pytest.fixture
def server(benchmarks):
    from benchmarks import server

    return server


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(probed, "SETTLE_SECONDS", 0)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    site = stub_site(tmp_path / "site")

    def call(*more, **env) -> tuple[int, dict]:
        for name, value in env.items():
            monkeypatch.setenv(f"FAKE_{name}", value)
        out = tmp_path / "server.json"
        own = {"--server-command": FAKE, "--log-dir": tmp_path / "logs", "--out": out, "--port": free_port(), "--site": site}
        case = "--draft-steps 3 --case 2x64 --pairs 2 --repeats 4 --warmup 1 --output-tokens 9 --commit c".split()
        status = server.main([*map(str, itertools.chain(*own.items())), *case, *more])
        return status, json.loads(out.read_text())

    return call


def test_each_metric_of_a_case(server, run, tmp_path):
    status, found = run()
    assert status == 0
    cases = {(one["name"], one["metric"]): one for one in found["cases"]}
    name = "n3-bs2-len64-bf16"
    assert cases.keys() == {(name, metric) for metric in ("step_ms", "decode_step_ms", "gpu_draft_us")} | {
        (f"{name}-{kind}", "host_us") for kind in ("draft", "verify", "extend")
    }
    steps, intervals = cases[name, "step_ms"], cases[name, "decode_step_ms"]  # of a request's four one has no step after it
    assert steps["samples"] == 2 * 4 and intervals["samples"] == 2 * 4 * (4 - 1)
    assert all(one[side] > 0 for one in (steps, intervals) for side in server.SIDES)
    graph = cases[name, "gpu_draft_us"]
    assert (graph["upstream"], graph["ours"], graph["samples"]) == (4000, 3000, 2 * 4 * server.OBSERVED)
    assert graph["processes"] == {"upstream": [4000, 4000], "ours": [3000, 3000]}
    (configuration,) = found["configurations"]
    assert (configuration["pairs"], configuration["warmup"], set(configuration["seconds_to_ready"])) == (2, 1, set(server.SIDES))
    assert configuration["table_bytes"] == {"upstream": 3 << 20, "ours": 2 << 20}
    assert (tmp_path / "calls").read_text().split()[4:12] == ["off", "on", "on", "off"] * 2  # warm-up, forth and back
    assert all(len(set(one[sha].values())) == 1 for one in cases.values() for sha in ("output_sha", "draft_sha"))


def test_one_server_is_both_sides(server, run, tmp_path):
    status, found = run("--within", "--pairs", "1")
    assert status == 0
    assert (tmp_path / "calls").read_text().split() == ["start-on"] + ["on"] * 2 * (1 + 4 + server.OBSERVED)
    cases = {(one["name"], one["metric"]): one for one in found["cases"]}
    draft, graph = cases["n3-bs2-len64-bf16-within-draft", "host_us"], cases["n3-bs2-len64-bf16-within", "gpu_draft_us"]
    assert (draft["upstream"], draft["ours"], draft["samples"]) == (402.5, 20, 4 * 4)
    assert graph["upstream"] == graph["ours"] == 3000
    assert cases["n3-bs2-len64-bf16-within", "decode_step_ms"]["samples"] == 4 * (4 - 1)
    assert "table_bytes" not in found["configurations"][0]  # it has those of one side


def test_one_server_at_a_time(server, run, tmp_path):
    status, found = run("--pairs", "1", "--starts", "2", "--context-length", "163840")
    assert status == 0
    calls = (tmp_path / "calls").read_text().split()
    assert [one for one in calls if one.startswith("start")] == ["start-off", "start-on", "start-on", "start-off"]
    each = 1 + 4 + server.OBSERVED
    assert calls == [one for side in ("off", "on", "on", "off") for one in [f"start-{side}"] + [side] * each]
    cases = {(one["name"], one["metric"]): one for one in found["cases"]}
    steps = cases["n3-bs2-len64-width163840-bf16", "decode_step_ms"]
    assert steps["samples"] == 2 * 4 * 3 and [len(of) for of in steps["processes"].values()] == [2, 2]
    assert (found["configurations"][0]["start"], found["configurations"][0]["starts"]) == ("alone", 2)


def test_another_process_writes_the_same_file(server, tmp_path):
    head = {"schema": 1, "what": "server"}
    one, other = (server.Results(tmp_path / "both.json", head) for _ in range(2))
    for results, name in ((one, "a"), (other, "b"), (one, "c")):
        results.add([{"name": name, "metric": "step_ms"}], {"name": name})
        results.write()
    assert [case["name"] for case in json.loads((tmp_path / "both.json").read_text())["cases"]] == ["a", "b", "c"]


def test_other_drafts_of_the_same_output_fail(run, capsys):
    status, found = run(DRAFTS="on")
    assert status == 1 and "the draft tokens differ in 8 of 8 and 8 rows" in capsys.readouterr().out
    assert all(len(set(one["output_sha"].values())) == 1 < len(set(one["draft_sha"].values())) for one in found["cases"])


def test_other_tokens_fail(run, capsys):
    status, _ = run(TOKENS="on")
    assert status == 1 and "the output ids differ" in capsys.readouterr().out
