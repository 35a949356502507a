"""Prefill and decode in servers of their own, plugin off and on: each prompt's cache is sent from the one to the other.

It needs sglang's transfer engine NIXL, and where two GPUs are visible the prefill servers are on the first, the decode servers
on the second. No router: each request is sent to both servers, under a number by which they find each other.
"""

import dataclasses
import itertools
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving
from serving import Configuration, Request, answers, check_same, console, prompt

from sglang_nsa_fused.tools.bench import process
from sglang_nsa_fused.tools.bench.process import HOST, REQUEST_SECONDS, Failed

DECODE_PORT = 500  # after the prefill server's
BOOTSTRAP_PORT = 2  # the same; NCCL has the next one
AT_ONCE = 8
LENGTHS = (7, 63, 64, 65, 66, 500, 1000, 2100, 2600)
INDEX_TOPK = 2048  # beyond it the top-k takes tokens in any order, and close drafts are others
# sglang would look for a network; and a transfer that fails would be waited for much longer.
ENV = {"SGLANG_HOST_IP": HOST} | {f"SGLANG_DISAGGREGATION_{name}_TIMEOUT": "60" for name in ("BOOTSTRAP", "WAITING")}


def gpus(role: str, count: int) -> str:
    """The role's own first. All stay visible: without that one process cannot open the other's memory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    first, *others = visible.split(",")
    return ",".join([*others[:1], first, *others[1:]] if role == "decode" else [first, *others])


class Server(serving.Server):
    """A decode server and, as `prefill`, the one that has its prompts."""

    numbers = itertools.count(1)

    def __init__(self, side: str, configuration: Configuration, options, role: str = "decode"):
        self.bootstrap_port = options.port + serving.PORTS_APART * serving.SIDES.index(side) + BOOTSTRAP_PORT
        flags = ("--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl")
        own = Configuration.of(
            configuration.cache,
            configuration.draft_steps,
            f"-{role}",
            (*flags, "--disaggregation-bootstrap-port", self.bootstrap_port),
            env=(*ENV.items(), ("CUDA_VISIBLE_DEVICES", gpus(role, options.gpus))),
        )
        port = options.port + DECODE_PORT * (role == "decode")
        super().__init__(side, own, dataclasses.replace(options, port=port))
        if role == "decode":
            self.prefill = Server(side, configuration, options, "prefill")
            self.processes = [self.prefill, self]

    def generate(self, prompts, output_tokens: int, seconds: float = REQUEST_SECONDS, **more):
        """One prompt."""
        more |= {"bootstrap_host": HOST, "bootstrap_port": self.bootstrap_port, "bootstrap_room": next(self.numbers)}
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(super(Server, self.prefill).generate, prompts, output_tokens, seconds, **more)
            reply = super().generate(prompts, output_tokens, seconds, **more)
            sent.result()
        return reply


@pytest.fixture(scope="module")
def pair(configuration, options):
    try:
        with serving.running(configuration, options, Server) as pair:
            yield pair
    except Failed as error:
        if re.match(rf"{configuration.name}-(prefill|decode)-off: the server ended", str(error)):
            pytest.skip(f"sglang itself does not start: {serving.exception(error)}")
        raise


def requests_of(seed: str, count: int) -> list[Request]:
    lengths = itertools.islice(itertools.cycle(LENGTHS), count)
    return [Request(prompt((seed, number), length), 24 + 5 * number % 24) for number, length in enumerate(lengths)]


def test_log_lines(pair):
    """A prefill server captures no graph, so nothing there is the plugin's; it would not start if the plugin were not active."""
    console.print("  " + "\n  ".join(re.findall(r"sglang-nsa-fused.*", pair.on.prefill.log_from(0) + pair.on.log_from(0))))
    assert [server.plugin_lines() for server in pair.off.processes] == [[], []]
    assert [len(server.plugin_lines()) for server in pair.on.processes] == [0, 1]


def test_one_by_one(pair):
    """Of those up to INDEX_TOPK tokens drafts too: their batches are the same."""
    requests = requests_of("one", len(LENGTHS))
    short = [request for request in requests if len(request.prompt) + request.output_tokens <= INDEX_TOPK]
    long = [request for request in requests if request not in short]
    with process.observed(*pair):
        start = time.perf_counter_ns()
        both = answers(list(pair), short, [1] * len(short))
        end = time.perf_counter_ns()
    check_same(pair, short, *both)
    check_same(pair, long, *answers(list(pair), long, [1] * len(long)))
    upstream, ours = (process.drafts(server.samples(), start, end) for server in pair)
    console.print(f"  {len(upstream)} rows of draft tokens")
    assert upstream, "the probe saw no draft tokens"
    assert ours == upstream, "the draft tokens differ"


def test_several_at_a_time(pair):
    requests, marks = requests_of("several", 4 * AT_ONCE), [server.mark for server in pair]
    check_same(pair, requests, *answers(list(pair), requests, [AT_ONCE] * len(requests)))
    for server, mark in zip(pair, marks):
        batches = server.batches(mark)
        assert max(size for size, _ in batches) > 1, f"{server.name}: no requests met"
        assert all(graph for _, graph in batches), f"{server.name}: batches without a graph"


def test_margins(pair):
    """What is asked where answers differ: a decode server has the first token's from its prefill server."""
    [request] = requests_of("margin", 1)
    [answer] = serving.send(pair.off, [request])
    reply = pair.off.generate(request.prompt + answer.ids[:5], 1, return_logprob=True, top_logprobs_num=8)
    (_, best, *_), *_ = reply["meta_info"]["output_top_logprobs"][0]
    assert [best] == reply["output_ids"] == [answer.ids[5]]
