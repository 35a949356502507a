"""What `bench server` computes, by values worked out by hand."""

import json

import pytest

from sglang_nsa_fused.tools.bench import compare, plots, rounds, small_model
from sglang_nsa_fused.tools.bench.drive import Answer, Case, Chunks, Refused, Run

MS = 1_000_000  # nanoseconds


def answer(arrived_ms: list[float], tokens: list[int], steps: int, ids: tuple = ()) -> Answer:
    return Answer(0, tuple(int(at * MS) for at in arrived_ms), tuple(tokens), steps, tuple(ids))


def run(*answers: Answer, seconds: float = 1.0, start: int = 0) -> Run:
    return Run(start, start + int(seconds * 1e9), answers)


def ids_run(*ids: tuple) -> Run:
    return run(*(answer([1, 2], [1, len(one)], 1, one) for one in ids))


def test_latencies_of_a_request():
    # A prefill of 30 ms, then three steps that bring 1, 3 and 2 tokens.
    one = answer([30, 40, 52, 60], [1, 2, 5, 7], steps=3)
    assert one.ttft_ms == 30
    assert one.tpot_ms == 5  # 30 ms for 6 tokens
    assert one.step_ms == 10
    assert one.itl_ms == [10, 4, 4, 4, 4, 4]


def test_latencies_of_a_single_token_and_without_speculation():
    assert answer([30], [1], 0).tpot_ms is None
    assert answer([30, 40], [1, 2], 0).step_ms is None
    found = compare.latencies([run(answer([30, 40], [1, 2], 0))])
    assert set(found) == {"tokens_per_s", "ttft_ms", "tpot_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms"}


def test_latencies_of_several_requests_and_runs():
    slow, fast, other = answer([30, 60], [1, 4], 2), answer([10, 20], [1, 3], 1), answer([20, 50], [1, 4], 2)
    found = compare.latencies([run(slow, fast, seconds=0.5), run(other, seconds=1.5)])
    assert found["tokens_per_s"] == 11 / 2
    assert found["accept_length"] == 11 / 5
    assert found["ttft_ms"] == 20 and found["tpot_ms"] == 10 and found["step_ms"] == 15
    assert found["itl_p50_ms"] == 10 and found["itl_p99_ms"] == 10


@pytest.mark.parametrize("part, value", [(0, 1), (50, 3), (90, 4.6), (100, 5)])
def test_percentiles(part, value):
    assert compare.percentile([1, 2, 3, 4, 5], part) == pytest.approx(value)


def chunk(ids: list[int], total: int, **meta) -> dict:
    return {"output_ids": ids, "meta_info": {"completion_tokens": total, **meta}}


@pytest.mark.parametrize(
    "bodies",
    [
        [([5], 1), ([5, 6, 7], 3), ([5, 6, 7], 3), ([5, 6, 7, 8], 4)],  # cumulative; one without a new token
        [([5], 1), ([6, 7], 3), ([], 3), ([8], 4)],  # --incremental-streaming-output
    ],
)
def test_chunks_are_put_together(bodies):
    chunks = Chunks()
    for at, (ids, total) in enumerate(bodies):
        chunks.add(at, chunk(ids, total, spec_verify_ct=at))
    found = chunks.answer()
    assert (found.output_ids, found.tokens, found.arrived, found.verify_steps) == ((5, 6, 7, 8), (1, 3, 4), (0, 1, 3), 3)


@pytest.mark.parametrize(
    "body, said",
    [
        ({"error": {"message": "too long"}}, "too long"),
        (chunk([], 0, finish_reason={"type": "abort", "message": "no memory"}), "no memory"),
        ({"text": "hello"}, "hello"),
    ],
)
def test_an_error_in_place_of_tokens_is_not_measured(body, said):
    with pytest.raises(Refused, match=said):
        Chunks().add(0, body)


def test_lost_tokens_are_not_measured():
    chunks = Chunks()
    chunks.add(0, chunk([5], 1))
    chunks.add(1, chunk([7], 3))
    with pytest.raises(Refused, match=r"expected the ids of \[3\] output tokens, got 2"):
        chunks.answer()


def test_prompts_are_the_same_for_a_number_and_other_ones_for_another():
    case = Case(2, 5)
    assert case.prompts(1) == case.prompts(1) != case.prompts(2)
    assert [len(prompt) for prompt in case.prompts(-1)] == [5, 5]


@pytest.mark.parametrize("rounds, p", [(5, 0.0625), (6, 0.03125), (9, 2 / 2**9)])
def test_the_exact_p_of_rounds_that_all_agree(rounds, p):
    ours = [1.0 + at / 100 for at in range(rounds)]
    assert compare.paired_p([2.0 + at / 7 for at in range(rounds)], ours) == pytest.approx(p)


def test_rounds_that_do_not_agree_show_nothing():
    assert compare.paired_p([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6.5, 5]) > 0.5
    assert compare.paired_p([1, 2, 3], [1, 2, 3]) == 1


@pytest.mark.parametrize(
    "metric, upstream, ours, p, said",
    [
        ("tpot_ms", 2, 1, 0.01, "gain"),
        ("tpot_ms", 1, 2, 0.01, "loss"),
        ("tokens_per_s", 1, 2, 0.01, "gain"),
        ("tokens_per_s", 2, 1, 0.01, "loss"),
        ("tpot_ms", 2, 1, 0.05, "no difference shown"),
    ],
)
def test_verdicts(metric, upstream, ours, p, said):
    assert compare.verdict(metric, [upstream] * 6, [ours] * 6, p) == said


def test_a_row_leaves_out_rounds_without_a_value():
    row = compare.row("a", "tpot_ms", {"upstream": [4, None, 6, 8], "ours": [2, 3, 2, None]})
    assert row["rounds"] == {"upstream": [4, 6], "ours": [2, 2]}
    assert (row["upstream"], row["ours"], row["ratio"], row["samples"]) == (5, 2, 2.5, 2)
    assert row["ratio_spread"] == [2.1, 2.9] and row["spread"]["upstream"] == [4.2, 5.8]


def test_tokens_are_compared_one_by_one():
    same = {"upstream": [ids_run((1, 2, 3))], "ours": [ids_run((1, 2, 3))]}
    repeats = {"upstream": [((1, 2, 3),)] * 3, "ours": [((1, 2, 3),)] * 3}
    assert compare.same_tokens([same, same], repeats) == (True, "")
    other = {"upstream": [ids_run((7,), (1, 2, 3))], "ours": [ids_run((7,), (1, 5, 3))]}
    assert compare.same_tokens([same, other], repeats) == (False, "round 2, request 1, token 1: 2 and 5")
    assert compare.same_tokens([same], repeats | {"ours": [((1, 2),)] * 3}) == (
        False,
        "repeats, request 0, token 2: 3 and nothing",
    )


def test_tokens_are_not_compared_where_it_says_nothing():
    other = {"upstream": [ids_run((1, 2))], "ours": [ids_run((1, 3))]}
    unsteady = {"upstream": [((1, 2),), ((1, 4),)], "ours": [((1, 2),)] * 2}
    assert compare.same_tokens([other], unsteady)[0] is None
    assert compare.same_tokens([other], {})[0] is None  # interrupted before the repeats


def test_refreshes_are_those_of_full_batches_within_the_runs():
    case, one = Case(4, 64), run(answer([1, 2], [1, 3], 1), seconds=1, start=1000)
    samples = [
        {"at": 2000, "kind": "verify", "bs": 4, "ns": 3000},
        {"at": 3000, "kind": "verify", "bs": 4, "ns": 5000},
        {"at": 3000, "kind": "verify", "bs": 3, "ns": 90_000},
        {"at": 999, "kind": "verify", "bs": 4, "ns": 90_000},
        {"at": 3000, "kind": "decode", "bs": 4, "ns": 90_000},
        {"at": 3000, "peak_bytes": 5},
    ]
    found = rounds.values([one], samples, case)
    assert found["verify", "host_us"] == 4
    assert {part for part, _ in found} == {"", "verify"}


def test_peak_memory_is_that_of_the_largest_process():
    assert rounds.peak_mib([{"peak_bytes": 1 << 20}, {"at": 1}, {"peak_bytes": 3 << 20}, {"peak_bytes": 2 << 20}]) == 3
    assert rounds.peak_mib([{"at": 1, "kind": "draft"}]) is None


def test_sides_take_turns():
    assert [rounds.order(number)[0] for number in range(-1, 4)] == ["ours", "upstream", "ours", "upstream", "ours"]


def test_the_small_model_is_the_real_one_with_fewer_layers_and_experts(tmp_path):
    config = json.loads((small_model.write(tmp_path / "model", 4, 64) / "config.json").read_text())
    assert config.pop("num_hidden_layers") == 4 and config.pop("n_routed_experts") == 64
    assert config.items() <= json.loads(small_model.CONFIG.read_text()).items()
    with pytest.raises(ValueError, match="--experts: expected a multiple of 8 from 16 on, got 8"):
        small_model.config(3, 8)


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
