"""Drives servers without and with the plugin: one at a time, alone on its GPU, the sides in turn (off, on, on, off, ...)."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from sglang_nsa_fused.tools.bench import servers
from sglang_nsa_fused.tools.bench.process import COMMAND, Failed, Server, clocks, observed, running, wait_ready
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM

LABELS = {UPSTREAM: "off", OURS: "on"}
OBSERVED = 2  # runs of each case and start, after those that count
VOCABULARY = range(10, 16_000)  # of every model in question, also of one rank of eight, without the special ones


class Case(NamedTuple):
    batch: int  # requests at a time
    length: int  # input tokens of each

    @property
    def name(self) -> str:
        return f"bs{self.batch}-len{self.length}"

    def prompts(self) -> list[list[int]]:
        """The same in every process."""
        draw = random.Random(self.name)
        return [draw.choices(VOCABULARY, k=self.length) for _ in range(self.batch)]


@dataclass(frozen=True)
class Plan:
    cases: list[Case]
    starts: int  # of each side
    warmup: int  # runs before those that count: the first compiles kernels, and brings the prompts to the prefix cache
    repeats: int
    output_tokens: int
    ready_seconds: float
    request_seconds: float
    deadline: float = float("inf")  # of time.monotonic: no start that would end later


@dataclass(frozen=True)
class Setup:
    """How servers are started; those of the two sides differ in the plugin alone."""

    folder: Path  # of logs and samples
    flags: tuple
    port: int
    prefix: str = ""  # of their names
    loader: bool = True
    real: bool = False
    command: str = COMMAND

    def server(self, side: str, number: int) -> Server:
        env = servers.environment(side == OURS, self.folder / "probe", self.real, self.loader)
        return Server(f"{self.prefix}{LABELS[side]}-{number + 1}", self.port, self.flags, env, self.folder, self.command)


@dataclass(frozen=True)
class Run:
    """One call with all requests of a case, answered. start, end: nanoseconds of perf_counter."""

    start: int
    end: int
    steps: int  # verify steps, the most of any request
    tokens: int  # of the output, in all
    accepted: float  # tokens a step
    output_ids: tuple
    batches: tuple  # as `Server.prefills`: what the scheduler puts together decides how logits are rounded

    @property
    def step_ms(self) -> float:
        return (self.end - self.start) / self.steps / 1e6


@dataclass
class Start:
    """A server that was up, and what it answered: by case the runs that count, and those that were observed."""

    side: str
    server: Server
    runs: dict[Case, list[Run]] = field(default_factory=dict)
    observed: dict[Case, list[Run]] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    clocks: dict[Case, list[tuple[float, float]]] = field(default_factory=dict)  # MHz and watts during the runs that count


def generate(server: Server, case: Case, plan: Plan) -> Run:
    """Raises Failed."""
    mark, start = server.mark, time.perf_counter_ns()
    replies = server.generate(case.prompts(), plan.output_tokens, plan.request_seconds)
    end = time.perf_counter_ns()
    steps = [reply["meta_info"].get("spec_verify_ct", 0) for reply in replies]
    if not all(steps):
        raise Failed(f"{server.name}: no verify steps: the server does not decode speculatively{server.tail()}")
    ids = tuple(tuple(reply["output_ids"]) for reply in replies)
    tokens = sum(map(len, ids))
    return Run(start, end, max(steps), tokens, tokens / sum(steps), ids, server.prefills(mark))


def started(side: str, server: Server, plan: Plan, step: Callable[[str], None]) -> Start:
    """Raises Failed."""
    found = Start(side, server)
    with running([server]):
        wait_ready([server], min(time.monotonic() + plan.ready_seconds, plan.deadline))
        server.check_plugin(side == OURS)
        for case in plan.cases:
            for _ in range(plan.warmup):
                generate(server, case, plan)
            with clocks(server.gpu) as found.clocks[case]:
                found.runs[case] = [generate(server, case, plan) for _ in range(plan.repeats)]
            with observed(server):
                found.observed[case] = [generate(server, case, plan) for _ in range(OBSERVED)]
            step(f"{case.name} {server.name}")
    found.samples = server.samples()
    return found


def starts(setup: Setup, plan: Plan, step: Callable[[str], None] = lambda name: None) -> Iterator[Start]:
    """step: called with the name of what was measured. Raises Failed."""
    longest = 0.0
    for number in range(plan.starts):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            began = time.monotonic()
            if plan.deadline - began < longest:
                raise Failed(f"{setup.prefix}{LABELS[side]}-{number + 1}: not started, too little time is left")
            yield started(side, setup.server(side, number), plan, step)
            longest = max(longest, time.monotonic() - began)
