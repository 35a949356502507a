"""What `bench server` computes, by values worked out by hand."""

import json

import pytest

from sglang_nsa_fused.tools.bench import compare, plots, small_model
from sglang_nsa_fused.tools.bench.measure import Case, Run, Start

CASE = Case(4, 64)
ALIKE = ((4, 256, 0, 0),)


def run(*ids: tuple, at: int = 1000, batches: tuple = ALIKE) -> Run:
    return Run(at, at + 10_000_000, 5, 40, 2.0, ids, batches)


def start(side: str, *runs: Run, observed: tuple = (), samples: tuple = ()) -> Start:
    return Start(side, None, {CASE: list(runs)}, {CASE: list(observed)}, list(samples))


def refresh(at: int, bs: int = 4, kind: str = "draft", ns: int = 3000) -> dict:
    return {"at": at, "kind": kind, "bs": bs, "ns": ns}


def test_prompts_are_the_same_each_time_and_other_ones_for_another_case():
    assert CASE.prompts() == CASE.prompts() != Case(4, 65).prompts()
    assert [len(prompt) for prompt in CASE.prompts()] == [64] * 4


def test_steps_are_those_of_full_batches_within_a_run():
    run_ms = 10_000_000
    samples = [refresh(at) for at in (999, 2_001_000, 5_001_000, 9_001_000, 1000 + run_ms + 1)]
    samples += [refresh(3_001_000, bs=3), refresh(4_001_000, kind="verify"), {"at": 2000, "table_bytes": 5}]
    assert compare.decode_steps(samples, [run((1,))], 4) == [3, 4]


def test_samples_are_pooled_and_starts_are_told_apart():
    found = compare.result("a", "step_ms", {"upstream": [[1, 2, 9], [4, 5]], "ours": [[2, 2], [2]]})
    assert (found["upstream"], found["ours"], found["ratio"], found["samples"]) == (4, 2, 2, 3)
    assert found["processes"] == {"upstream": [2, 4.5], "ours": [2, 2]} and found["spread"]["ours"] == [2, 2]


def test_nothing_is_said_of_one_side_alone():
    assert compare.cases("a", CASE, [start("upstream", run((1,)))]) == ([], [], [])


@pytest.mark.parametrize(
    "upstream, ours, said, alike",
    [
        ([run((1, 2), (3, 4))], [run((1, 2), (3, 4))], [], [1, 1]),
        ([run((1, 2), (3, 4))], [run((1, 2), (3, 5))], ["a: the output ids differ: request 1, token 1: 4 and 5"], [1, 1]),
        ([run((1,)), run((2,))], [run((3,))], [], [2, 1]),  # upstream does not repeat itself
        ([run((1,))], [run((2,), batches=())], [], [0, 0]),  # put together otherwise
        ([run((1,)), run((7,), batches=())], [run((8,), batches=((1,),)), run((1,))], [], [1, 1]),
    ],
)
def test_tokens_are_compared_where_that_says_something(upstream, ours, said, alike):
    same, wrong = compare.tokens("a", CASE, [start("upstream", *upstream), start("ours", *ours)])
    assert wrong == said
    assert same["alike"] == (alike if min(alike) else [same["alike"][0], same["alike"][1]])
    assert (compare.same_tokens(same) == "NO") == bool(said)


def test_draft_tokens_are_compared_in_any_order():
    def both(*rows) -> list[Start]:
        samples = [[{"at": 2000, "drafts": list(of)}] for of in rows]
        return [start(side, observed=(run((1,)),), samples=of) for side, of in zip(("upstream", "ours"), samples)]

    assert compare.tokens("a", CASE, both(([1, 2], [3, 4]), ([3, 4], [1, 2])))[1] == []
    same, wrong = compare.tokens("a", CASE, both(([1, 2], [3, 4]), ([3, 4], [1, 9])))
    assert wrong == ["a: the draft tokens differ in 1 of 2 and 2 rows"] and compare.same_tokens(same) == "NO"


def test_a_file_from_before_says_whether_tokens_were_the_same():
    sha = {"upstream": "a", "ours": "a"}
    assert compare.same_tokens({"output_sha": sha, "draft_sha": sha, "distinct_outputs": {"upstream": 1, "ours": 1}}) == "yes"


def test_tables_are_those_of_the_largest_process():
    samples = [[{"at": 1, "table_bytes": size} for size in of] for of in ((1, 5, 3), (2,))]
    up = [start(side, samples=of) for side, of in zip(("upstream", "ours"), samples)]
    assert compare.table_bytes(up) == {"upstream": 5, "ours": 2} and compare.table_bytes([start("ours")]) == {}


def test_the_small_model_is_the_real_one_with_fewer_layers(tmp_path):
    config = json.loads((small_model.write(tmp_path / "model", 4) / "config.json").read_text())
    assert config.pop("num_hidden_layers") == 4
    assert config.items() <= json.loads(small_model.CONFIG.read_text()).items()


def test_host_times_of_replays_can_be_drawn(tmp_path):
    cases = [
        {"name": f"{kind}-n4-bs{bs}-len{length}", "metric": "host_us", "upstream": 400, "ours": 10 * bs}
        for kind in ("draft", "verify")
        for bs in (16, 2)
        for length in (512, 4096)
    ]
    groups, length = plots.by_batch(cases)
    assert length == 512 and set(groups) == {"draft-n4", "verify-n4"}
    assert sorted(bs for bs, _ in groups["draft-n4"]) == [2, 16]
    written = plots.host_by_batch({"gpu": "H100", "sglang": "0.5.12"}, cases, tmp_path / "host.png")
    assert [path.name for path in written] == ["host.png"] and written[0].stat().st_size > 5000
