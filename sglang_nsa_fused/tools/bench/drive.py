"""A client of sglang servers: requests sent at once, their tokens streamed and timed as they come.

Latencies are defined as in sglang's bench_serving, so that the numbers compare:

- time to first token: from the request to the first chunk with a token
- time per output token: from the first chunk to the last, divided by the tokens but one
- inter-token latency: the gap between two chunks divided by the new tokens of the second, counted once for each of these,
  since an accepted draft brings several tokens in one chunk
- accepted length: output tokens by verify steps

and step time is the time from the first chunk to the last, divided by the verify steps.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp

LINE_BYTES = 16 << 20  # a chunk repeats all output ids so far, in one line
VOCABULARY = range(10, 120_000)  # tokens of every model in question, and none of their special ones at the beginning


class Refused(Exception):
    """What a server answered in place of tokens."""


class Case(NamedTuple):
    concurrency: int  # requests at a time
    length: int  # input tokens of each

    @property
    def name(self) -> str:
        return f"bs{self.concurrency}-len{self.length}"

    def prompts(self, number: int) -> list[list[int]]:
        """Other ones for each number, so that no prompt is in the prefix cache; the same in every process."""
        draw = random.Random(f"{self.name} {number}")
        return [draw.choices(VOCABULARY, k=self.length) for _ in range(self.concurrency)]


@dataclass(frozen=True)
class Answer:
    """One request, answered. Times are nanoseconds of perf_counter."""

    sent: int
    arrived: tuple[int, ...]  # when each chunk with new tokens came
    tokens: tuple[int, ...]  # all output tokens so far, at each chunk
    verify_steps: int  # 0 where the server does not decode speculatively
    output_ids: tuple[int, ...]

    @property
    def ttft_ms(self) -> float:
        return (self.arrived[0] - self.sent) / 1e6

    @property
    def decode_ms(self) -> float:
        return (self.arrived[-1] - self.arrived[0]) / 1e6

    @property
    def tpot_ms(self) -> float | None:
        """None for a single token."""
        return self.decode_ms / (self.tokens[-1] - 1) if self.tokens[-1] > 1 else None

    @property
    def itl_ms(self) -> list[float]:
        gaps = []
        for at in range(1, len(self.arrived)):
            new = self.tokens[at] - self.tokens[at - 1]
            gaps += [(self.arrived[at] - self.arrived[at - 1]) / 1e6 / new] * new
        return gaps

    @property
    def step_ms(self) -> float | None:
        """None where the server does not decode speculatively."""
        return self.decode_ms / self.verify_steps if self.verify_steps else None


@dataclass(frozen=True)
class Run:
    """Requests sent at once, and all answered. start, end: nanoseconds of perf_counter."""

    start: int
    end: int
    answers: tuple[Answer, ...]

    @property
    def output_ids(self) -> tuple:
        return tuple(answer.output_ids for answer in self.answers)


class Chunks:
    """The chunks of one answer, put together: cumulative ones, or with --incremental-streaming-output new tokens alone."""

    def __init__(self):
        self.sent, self.arrived, self.tokens, self.ids, self.verify_steps = time.perf_counter_ns(), [], [], [], 0

    def add(self, now: int, chunk: dict) -> None:
        """Raises Refused for one that brings an error."""
        meta = chunk.get("meta_info", {})
        reason = meta.get("finish_reason")
        if "error" in chunk or "output_ids" not in chunk or (isinstance(reason, dict) and reason.get("type") == "abort"):
            raise Refused(json.dumps(chunk.get("error") or reason or chunk)[:500])
        total, ids = meta["completion_tokens"], chunk["output_ids"]
        self.verify_steps = meta.get("spec_verify_ct", self.verify_steps)
        if total > (self.tokens[-1] if self.tokens else 0):
            self.arrived.append(now)
            self.tokens.append(total)
            self.ids = ids if len(ids) == total else self.ids + ids

    def answer(self) -> Answer:
        """Raises Refused where tokens are missing."""
        if not self.tokens or len(self.ids) != self.tokens[-1]:
            raise Refused(f"expected the ids of {self.tokens[-1:] or 'some'} output tokens, got {len(self.ids)}")
        return Answer(self.sent, tuple(self.arrived), tuple(self.tokens), self.verify_steps, tuple(self.ids))


async def generate(session: aiohttp.ClientSession, url: str, body: bytes) -> Answer:
    chunks = Chunks()
    async with session.post(f"{url}/generate", data=body, headers={"Content-Type": "application/json"}) as reply:
        if reply.status != 200:
            raise Refused(f"status {reply.status}: {(await reply.text())[:500]}")
        async for line in reply.content:
            now = time.perf_counter_ns()
            if line.startswith(b"data: {"):
                chunks.add(now, json.loads(line[len(b"data: ") :]))
    return chunks.answer()


def greedy(output_tokens: int) -> dict:
    return {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}


async def run(url: str, prompts: list[list[int]], output_tokens: int, seconds: float) -> Run:
    """All prompts at once, greedily, for exactly so many tokens. Raises Refused, aiohttp.ClientError or, when it takes more
    than `seconds`, asyncio.TimeoutError."""
    params = greedy(output_tokens)
    bodies = [json.dumps({"input_ids": one, "sampling_params": params, "stream": True}).encode() for one in prompts]
    connections = aiohttp.TCPConnector(limit=0)
    limit = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(connector=connections, timeout=limit, read_bufsize=LINE_BYTES) as session:
        start = time.perf_counter_ns()
        answers = await asyncio.gather(*(generate(session, url, body) for body in bodies))
        return Run(start, time.perf_counter_ns(), tuple(answers))


async def one_call(url: str, prompts: list[list[int]], output_tokens: int, seconds: float) -> tuple[tuple[int, ...], ...]:
    """The output ids of these prompts, sent in one call: they reach the scheduler in one message, so that it batches them
    alike each time, and what it batches decides how logits are rounded. Raises as `run`."""
    body = {"input_ids": prompts, "sampling_params": greedy(output_tokens)}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=seconds)) as session:
        async with session.post(f"{url}/generate", json=body) as reply:
            if reply.status != 200:
                raise Refused(f"status {reply.status}: {(await reply.text())[:500]}")
            return tuple(tuple(answer["output_ids"]) for answer in await reply.json(content_type=None))


async def empty_cache(url: str, tries: int = 20) -> bool:
    """Empties the prefix cache; whether it did. A server refuses while it still winds up the requests before."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        for _ in range(tries):
            async with session.post(f"{url}/flush_cache") as reply:
                if reply.status == 200:
                    return True
            await asyncio.sleep(0.1)
    return False
