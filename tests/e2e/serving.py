"""A pair of sglang servers, plugin off and on, requests to them, and what must be the same.

Both have the probe's decisive weights. Even so two runs of upstream itself can differ where its two best tokens are all
but tied: requests join and leave at other steps, other batch sizes round otherwise. So answers may differ from upstream's
only at a token where upstream's own logits, asked again, are that close. Batches sent in one call are reproducible, up to
index_topk tokens: there every bit must be the same.
"""

import contextlib
import math
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sglang_nsa_fused.plugin import find_release
from sglang_nsa_fused.tools.bench import process, servers
from sglang_nsa_fused.tools.bench.compare import most_alike
from sglang_nsa_fused.tools.bench.probe import DECISIVE
from sglang_nsa_fused.tools.bench.process import Failed, drafts, observed
from sglang_nsa_fused.tools.bench.report import console
from sglang_nsa_fused.tools.bench.signals import interrupt_on_signals

SIDES = OFF, ON = ("off", "on")
PORTS_APART = 1000  # of two servers: data-parallel attention takes some hundreds more than the first
CAPTURED = 24  # the largest batch with a graph: with 5 draft steps and more it verifies more rows than a GPU has SMs
RUNNING = 32  # the largest batch
CHUNK = 1024  # tokens of a prefill
CONTEXT = 32_768
UNDECIDED = 0.1  # nats between two tokens; kernels of another batch size move logits by about a tenth of that
ONE_CALL = (1, 7, 63, 64, 66, 500, 999, 1000)  # lengths; 65 would read one page or another, see prefill_alone

ITSELF = "upstream's output ids differ in other batches"


@dataclass(frozen=True)
class Configuration:
    cache: str
    draft_steps: int
    name: str
    flags: tuple = ()
    env: tuple[tuple[str, str], ...] = ()
    model: Path = servers.HERE / "model"

    @staticmethod
    def of(cache: str, draft_steps: int, suffix: str = "", flags: tuple = (), **more):
        return Configuration(cache, draft_steps, f"{cache}-n{draft_steps}{suffix}", flags, **more)


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Answer:
    ids: tuple[int, ...]
    cached_tokens: int

    @staticmethod
    def of(reply: dict):
        return Answer(tuple(reply["output_ids"]), reply["meta_info"]["cached_tokens"])


class Server(process.Server):
    def __init__(self, side: str, configuration: Configuration, options):
        self.side, folder = side, options.log_dir
        env = servers.environment(side == ON, probe=folder / "probe") | {"SERVER_PROBE_WEIGHTS": "decisive"}
        env |= dict(configuration.env)
        flags = servers.flags(find_release()[0], configuration.draft_steps, configuration.cache, CAPTURED)
        flags += servers.size_flags(configuration.model, options.context, RUNNING)
        flags += [
            "--max-total-tokens",
            3 * CONTEXT,
            "--chunked-prefill-size",
            CHUNK,
            "--decode-log-interval",
            1,
            *configuration.flags,
        ]
        port = options.port + PORTS_APART * SIDES.index(side)
        super().__init__(f"{configuration.name}-{side}", port, flags, env, folder, options.command)
        self.processes = [self]  # all that serve its requests

    def batches(self, mark: int) -> list[tuple[int, bool]]:
        """Size of each decode batch since then, and whether it had a graph."""
        return [(int(size), graph == "True") for size, graph in process.DECODE.findall(self.log_from(mark))]


class Pair(NamedTuple):
    off: Server
    on: Server


@dataclass(frozen=True)
class Options:
    command: str
    port: int
    log_dir: Path
    ready_seconds: float
    context: int
    gpus: int  # that are visible


def ended(server: Server) -> list[Server]:
    """Its processes that have."""
    return [one for one in server.processes if one.process.poll() is not None]


def exception(error: Failed) -> str:
    """The last line of the log behind it that names one, or else the last: sglang then says how it ends its processes."""
    lines = str(error).splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])


@contextlib.contextmanager
def running(configuration: Configuration, options: Options, kind: type[Server] = Server):
    """The pair, stopped however the block ends. Raises Failed."""
    interrupt_on_signals()
    servers.write_probe(options.log_dir / "probe")
    pair = Pair(*(kind(side, configuration, options) for side in SIDES))
    up = [server for side in pair for server in side.processes]
    with process.running(up):
        try:
            process.wait_ready(up, time.monotonic() + options.ready_seconds)
        except Failed as error:
            # Where both ended, whichever was seen first, it is not for the plugin.
            if process.wait(lambda: ended(pair.off), 20):
                raise ended(pair.off)[0].ended() from error
            raise
        for server in up:
            if DECISIVE not in server.log_from(0):
                raise Failed(f"{server.name}: its weights are not the probe's: the log has no line {DECISIVE!r}{server.tail()}")
        seconds = [server.ready_seconds for server in up]
        console.print(f"\n{configuration.name}: ready after {seconds} s, logs in {options.log_dir}")
        yield pair


def prompt(seed, length: int) -> tuple[int, ...]:
    draw = random.Random(f"{seed} {length}")
    return tuple(draw.randrange(10, 120_000) for _ in range(length))


def ask(server: Server, request: Request) -> Answer:
    """Raises Failed."""
    return Answer.of(server.generate(request.prompt, request.output_tokens))


def send(server: Server, requests: list[Request], in_flight=None) -> list[Answer]:
    """in_flight: for each request how many may be under way when it is sent, itself included. Raises Failed."""
    under_way, ended = 0, threading.Condition()

    def one(request: Request) -> Answer:
        nonlocal under_way
        try:
            return ask(server, request)
        finally:
            with ended:
                under_way -= 1
                ended.notify_all()

    with ThreadPoolExecutor(len(requests)) as pool:
        asked = []
        for request, limit in zip(requests, in_flight or [math.inf] * len(requests)):
            with ended:
                ended.wait_for(lambda limit=limit: under_way < limit)
                under_way += 1
            asked.append(pool.submit(one, request))
        return [one.result() for one in asked]


def answers(asked: list[Server], requests: list[Request], in_flight=None) -> list[list[Answer]]:
    """Of each server, all asked at the same time."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda server: send(server, requests, in_flight), asked))


def wave(count: int, phase: float = 0.0) -> list[int]:
    """Limits that rise and fall between 1 and RUNNING - 2 a few times."""
    return [round(1 + (RUNNING - 3) * (1 - math.cos(6.28 * (number / 50 + phase))) / 2) for number in range(count)]


def differing(left: list[Answer], right: list[Answer]) -> list[int]:
    return [number for number, (one, other) in enumerate(zip(left, right)) if one.ids != other.ids]


def margin(server: Server, request: Request, one: Answer, other: Answer) -> tuple[int, float]:
    """The first token in which the answers differ, and how far both are at most from the server's best there, in nats."""
    at = next(at for at, (left, right) in enumerate(zip(one.ids, other.ids)) if left != right)
    reply = server.generate(request.prompt + one.ids[:at], 1, return_logprob=True, top_logprobs_num=8)
    top = reply["meta_info"]["output_top_logprobs"][0]
    logprobs = {token: logprob for logprob, token, *_ in top}
    return at, max(logprobs.values()) - min(logprobs.get(answer.ids[at], -math.inf) for answer in (one, other))


def check_same(
    pair: Pair,
    requests: list[Request],
    upstream: list[Answer],
    ours: list[Answer],
    what: str = "the output ids differ with the plugin on",
) -> int:
    """How many differ; fails, saying what, unless each does so at a token that upstream leaves undecided."""
    for request, *both in zip(requests, upstream, ours):
        assert [len(answer.ids) for answer in both] == [request.output_tokens] * 2, "an answer of another length"
    found = differing(upstream, ours)
    margins = {number: margin(pair.off, requests[number], upstream[number], ours[number]) for number in found}
    widest = max((nats for _, nats in margins.values()), default=0)
    undecided = f", {len(found)} from an undecided token on, margins up to {widest:.3f}" if found else ""
    console.print(f"  {len(requests) - len(found)} of {len(requests)} answers identical{undecided}")
    wrong = {number: margins[number] for number in found if margins[number][1] > UNDECIDED}
    lines = (
        f"request {number}, {len(requests[number].prompt)} tokens, differs at token {at} of {requests[number].output_tokens}, "
        f"where upstream is decided by {nats:.3f} nats"
        for number, (at, nats) in wrong.items()
    )
    assert not wrong, f"{what}:\n" + "\n".join(lines)
    return len(found)


def prefill_alone(server: Server) -> None:
    """Leaves only the call's prompts in the prefix cache, none of them computed in a batch with others.

    Of 64 k + 1 tokens sglang finds k - 1 pages there, since it looks up pairs of the tokens but the last, computes the k-th
    again, and while the first step is under way puts the cached page in its place. Which one that step reads is chance, and
    one was computed in a batch with others.
    """
    server.post("/flush_cache?timeout=30", {})
    for length in ONE_CALL:
        ask(server, Request(prompt("one call", length), 1))


@dataclass(frozen=True)
class Call:
    """One call with requests of mixed lengths, answered. start, end: nanoseconds of perf_counter."""

    batches: tuple  # how the scheduler put them together: other batches round otherwise
    ids: list
    logprobs: list
    start: int
    end: int


def call(server: Server) -> Call:
    """Raises Failed."""
    prompts = [list(prompt("one call", length)) for length in ONE_CALL]
    mark, start = server.mark, time.perf_counter_ns()
    replies = server.generate(prompts, 32, return_logprob=True)
    end = time.perf_counter_ns()
    if not all(reply["meta_info"].get("spec_verify_ct") for reply in replies):
        raise Failed(f"{server.name}: no verify steps: the server does not decode speculatively")
    logprobs = [[value[0] for value in reply["meta_info"]["output_token_logprobs"]] for reply in replies]
    return Call(server.prefills(mark), [reply["output_ids"] for reply in replies], logprobs, start, end)


def alike(pair: Pair, least: int = 3, most: int = 16) -> list[list[Call]]:
    """Of each server all calls that were put together in the batches that both had most often: how many of a call's requests
    have come when the scheduler looks is chance. At least so many of each, or it fails after the most calls."""
    calls: list[list[Call]] = [[], []]
    while len(calls[0]) < most:
        for made, server in zip(calls, pair):
            made.append(call(server))
        batches, times = most_alike([[one.batches for one in made] for made in calls])
        if min(times) >= least:
            console.print(f"  {len(calls[0])} calls of each, {times} in the same batches")
            return [[one for one in made if one.batches == batches] for made in calls]
    raise AssertionError(f"of {most} calls of each server no {least} were put together in the same batches, {times} at most")


def check_call(pair: Pair) -> None:
    """One call is reproducible: its ids and logprobs are the same to the bit, however often it is made."""
    for server in pair:
        prefill_alone(server)
        call(server)  # kernels may still be compiled
    upstream, ours = alike(pair)
    first = upstream[0]
    itself = all((one.ids, one.logprobs) == (first.ids, first.logprobs) for one in upstream)
    assert itself, "upstream does not repeat itself: there is nothing to compare with"
    assert all(one.ids == first.ids for one in ours), "the output ids of one call differ"
    apart = [
        (number, at, abs(left - right))
        for one in ours
        for number, both in enumerate(zip(one.logprobs, first.logprobs))
        for at, (left, right) in enumerate(zip(*both))
        if left != right
    ]
    assert not apart, (
        f"the logprobs of one call differ by up to {max(nats for *_, nats in apart):.1e} nats, of the requests "
        f"{sorted({number for number, *_ in apart})} from token {min(at for _, at, _ in apart)} on, batched as {first.batches}"
    )


def check_drafts(pair: Pair) -> None:
    """Output ids do not tell wrong draft metadata: the target model corrects it."""
    with observed(*pair):
        calls = alike(pair, least=1)
    upstream, ours = ([drafts(server.samples(), one.start, one.end) for one in made] for server, made in zip(pair, calls))
    console.print(f"  {len(upstream[0])} rows of draft tokens")
    assert upstream[0], "the probe saw no draft tokens"
    assert all(rows == upstream[0] for rows in [*upstream, *ours]), "the draft tokens of one call differ"


def wait_idle(server: Server, seconds: float) -> bool:
    """Whether it stops decoding before."""
    end, quiet_since, mark = time.monotonic() + seconds, time.monotonic(), server.mark
    while time.monotonic() - quiet_since < 1:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
        if server.batches(mark):
            quiet_since, mark = time.monotonic(), server.mark
    return True
