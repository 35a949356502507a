import json

import pytest
import torch
from typer.testing import CliRunner

import sglang_nsa_fused
from sglang_nsa_fused import plugin, releases
from sglang_nsa_fused.settings import ALLOWLIST, GATE, KEEP_WIDE_TABLE
from sglang_nsa_fused.tools.cli import app

CHECKS = [
    "Python",
    "torch",
    "tvm-ffi",
    "sglang",
    "entry point",
    "loader",
    "allowlist",
    "gate",
    "library",
    "GPU",
    "upstream names",
]


def doctor(**env):
    result = CliRunner().invoke(app, ["doctor", "--json"], env={GATE: None, ALLOWLIST: None, **env})
    return result.exit_code, json.loads(result.stdout)


def test_version_and_help():
    assert CliRunner().invoke(app, ["--version"]).output == f"sglang-nsa-fused {sglang_nsa_fused.__version__}\n"
    assert "refreshes the sparse-attention metadata" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output


def test_doctor_reports_every_check():
    status, findings = doctor(**{GATE: "1"})
    assert list(findings) == CHECKS
    failed = {check for check, finding in findings.items() if not finding["ok"]}
    assert failed == (set() if torch.cuda.is_available() else {"GPU"})
    assert status == bool(failed)


def test_doctor_without_the_gate_fails_and_says_what_to_do():
    status, findings = doctor()
    assert status == 1
    assert findings["gate"] == {"ok": False, "detail": f"not set; export {GATE}=1"}


def test_doctor_sees_an_allowlist_that_leaves_the_plugin_out():
    _, findings = doctor(**{GATE: "1", ALLOWLIST: "other"})
    assert findings["allowlist"] == {"ok": False, "detail": "SGLANG_PLUGINS=other leaves nsa_fused out; add it"}


def test_doctor_in_words():
    result = CliRunner().invoke(app, ["doctor"], env={GATE: "1"})
    assert [line.split("  ")[0].split()[0] for line in result.stdout.splitlines()].count("ok") >= len(CHECKS) - 1
    assert len(result.stdout.splitlines()) == len(CHECKS)


SERVER = "--context-length", "1048576", "--max-bs", "256", "--draft-tokens", "6"


def test_doctor_tells_what_page_tables_take(monkeypatch):
    monkeypatch.setattr(plugin, "find_release", lambda: (releases.RELEASES[-1], releases.RELEASES[-1].versions[-1]))
    result = CliRunner().invoke(app, ["doctor", *SERVER], env={GATE: "1"})
    last = result.stdout.splitlines()[len(CHECKS) :]
    assert last[0] == "page tables of the graphs, GiB on each GPU without → with the plugin"
    assert [line.split() for line in last[1:]] == [
        ["target", "verify", "7.68", "→", "0.09"],
        ["draft", "steps", "5.12", "→", "0.02"],
        ["draft", "extend", "7.68", "→", "0.09"],
        ["sum", "20.48", "→", "0.20"],
    ]
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json", *SERVER], env={GATE: "1"}).stdout)["page tables"]
    assert found["sum"] == {side: sum(one[side] for name, one in found.items() if name != "sum") for side in found["sum"]}


@pytest.mark.parametrize("version", ["0.5.12.post1", "9.9.9"])
def test_doctor_says_where_page_tables_stay(monkeypatch, version):
    found = releases.find(version) or releases.newest(version), version
    monkeypatch.setattr(plugin, "find_release", lambda: found)
    result = CliRunner().invoke(app, ["doctor", *SERVER], env={GATE: "1"})
    why = f"they stay as they are: the plugin leaves out the wide ones of sglang 0.5.15 to 0.5.23, this is {version}"
    assert result.stdout.splitlines()[-1].endswith(why)
    result = CliRunner().invoke(app, ["doctor", "--json", *SERVER], env={GATE: "1"})
    assert json.loads(result.stdout)["page tables"] == {"detail": why}


def test_doctor_says_that_page_tables_are_kept(monkeypatch):
    monkeypatch.setattr(plugin, "find_release", lambda: (releases.RELEASES[-1], releases.RELEASES[-1].versions[-1]))
    result = CliRunner().invoke(app, ["doctor", *SERVER], env={GATE: "1", KEEP_WIDE_TABLE: "1"})
    assert result.stdout.splitlines()[-1].endswith("they stay as they are: SGLANG_NSA_FUSED_KEEP_WIDE_TABLE is set")


def test_doctor_wants_the_whole_server():
    result = CliRunner().invoke(app, ["doctor", *SERVER[2:]], env={"COLUMNS": "200"})
    text = "expected all of --context-length, --max-bs, --draft-tokens, or none; --context-length is missing"
    assert result.exit_code == 2 and text in result.output


def test_demo_compares_and_prints_one_table():
    result = CliRunner().invoke(app, ["demo", "--steps", "5", "--requests", "3", "--longest", "300"])
    assert result.exit_code == 0, result.output
    for refresh in ("draft steps", "target verify", "draft extend"):
        assert refresh in result.output
    # 5 steps of 3 backends; a schedule is one field more on a GPU, though not for the draft steps, where it is stale.
    assert " 105 " in result.output


def test_demo_refuses_a_count_out_of_range():
    result = CliRunner().invoke(app, ["demo", "--draft-steps", "1"])
    assert result.exit_code == 2
    assert "--draft-steps" in result.output
