import json

import torch
from typer.testing import CliRunner

import sglang_nsa_fused
from sglang_nsa_fused.cli import app
from sglang_nsa_fused.settings import ALLOWLIST, GATE

CHECKS = [
    "Python", "torch", "tvm-ffi", "sglang", "entry point", "loader", "allowlist", "gate", "library", "GPU", "upstream names",
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
