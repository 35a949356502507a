"""Two GPUs: tensor parallel, with and without data-parallel attention."""

import re
from importlib.metadata import version

import pytest
import serving
from serving import Configuration, Request, answers, check_same, console, prompt

from sglang_nsa_fused.tools.bench.process import Failed

# flashinfer's all-reduce uses NVLink multicast, which not every machine allows.
TWO_GPUS = ("--tp-size", 2, "--enforce-disable-flashinfer-allreduce-fusion")
PARALLEL = {"tp2": TWO_GPUS, "tp2-dp2": (*TWO_GPUS, "--dp-size", 2, "--enable-dp-attention")}
ACTIVE = re.compile(r"^.*\b(TP\d+)[^\]]*\].*sglang-nsa-fused .* active", re.M)


@pytest.fixture(scope="module", params=PARALLEL)
def parallel(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(configuration, parallel, options):
    configuration = Configuration.of(configuration.cache, configuration.draft_steps, f"-{parallel}", PARALLEL[parallel])
    try:
        with serving.running(configuration, options) as pair:
            yield pair
    except Failed as error:
        # The server without the plugin refuses its arguments: then so does the release.
        refused = str(error).startswith(f"{configuration.name}-off: the server ended")
        *_, last = str(error).splitlines()
        if parallel == "tp2-dp2" and refused and last.startswith(("AssertionError", "ValueError")):
            pytest.skip(f"sglang {version('sglang')} refuses data-parallel attention here: {last}")
        raise


def test_active_on_both_ranks(pair):
    assert pair.off.plugin_lines() == []
    assert len(pair.on.plugin_lines()) == 2
    ranks = sorted(ACTIVE.findall(pair.on.log.read_text(errors="replace")))
    console.print(f"  active on {ranks}")
    assert ranks == ["TP0", "TP1"]


def test_one_call(pair, parallel):
    if parallel != "tp2":
        pytest.skip("data-parallel ranks batch the requests of one call as they come")
    serving.check_call(pair)


def test_joining_and_leaving(pair, request_count):
    count = max(20, request_count // 4)
    requests = [Request(prompt(("two", number), 1 + 997 * number % 1000), 8 + number % 40) for number in range(count)]
    (upstream,), (ours,) = (answers([server], requests, serving.wave(count)) for server in pair)
    [again] = answers([pair.off], requests, serving.wave(count, phase=0.5))
    itself = len(serving.differing(upstream, again))
    console.print(f"  upstream in other batches: {count - itself} of {count} answers identical")
    check_same(pair, requests, upstream, again, serving.ITSELF)
    assert itself <= count // 3, "upstream differs from itself too often to be compared with"
    check_same(pair, requests, upstream, ours)
