"""Drives both sides in turn, and keeps what was measured in each round."""

import asyncio
import statistics
from collections import defaultdict
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Callable

import aiohttp

from sglang_nsa_fused.tools.bench import compare, drive, servers, sides
from sglang_nsa_fused.tools.bench.drive import Case, Run
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM

CHECKS = 3  # repeats of the same call, which tell whether sglang repeats itself


@dataclass(frozen=True)
class Options:
    cases: list[Case]
    rounds: int
    warmup: int  # runs before those that count, of each server and case
    repeats: int  # runs of one side in a round
    output_tokens: int
    request_seconds: float
    ready_seconds: float
    compared: bool  # the tokens of both sides; not where acceptance is simulated


@dataclass(frozen=True)
class Check:
    """One call with the first round's prompts, and an empty prefix cache. start, end: nanoseconds of perf_counter."""

    start: int
    end: int
    output_ids: tuple
    batches: tuple  # as `prefills` of the server


class Book:
    """Runs by case, round and side, and the servers that answered them."""

    def __init__(self):
        self.runs: dict[Case, dict[int, dict[str, list[Run]]]] = defaultdict(lambda: defaultdict(dict))
        self.checks: dict[Case, dict[str, list[Check]]] = defaultdict(dict)
        self.targets: dict[int, dict[str, object]] = defaultdict(dict)  # by the round that they began with
        self.dp_size = 1

    def target(self, number: int, side: str):
        return self.targets[max(begun for begun in self.targets if begun <= number)][side]

    def whole(self, case: Case) -> dict[int, dict[str, list[Run]]]:
        """The rounds that both sides have finished."""
        return {number: one for number, one in sorted(self.runs[case].items()) if len(one) == len(SIDES)}

    def rows(self) -> list[dict]:
        found, samples = [], {}
        for pair in self.targets.values():
            samples |= {target: target.samples() for target in pair.values()}
        for case in list(self.runs):
            rounds = []
            for number, one in self.whole(case).items():
                of = {side: values(runs, samples[self.target(number, side)], case) for side, runs in one.items()}
                rounds.append(of)
            if len(self.checks[case]) == len(SIDES):
                for pair in zip(*(self.checks[case][side] for side in SIDES)):
                    of = {side: graph(check, samples[self.target(0, side)], case) for side, check in zip(SIDES, pair)}
                    rounds.append(of)
            found += compare.rows(case.name, rounds, concurrency=case.concurrency, input_tokens=case.length)
        for metric, most in {"peak_mib": peak_mib, "table_bytes": sides.table_bytes}.items():
            pairs = [[most(samples[pair[side]]) for side in SIDES] for pair in self.targets.values() if len(pair) == len(SIDES)]
            if any(None not in pair for pair in pairs):
                found.append(compare.row("server", metric, dict(zip(SIDES, map(list, zip(*pairs))))))
        return found

    def alike(self, case: Case) -> dict[str, list[tuple]]:
        """Output ids of the repeats that both sides put together in the same batches, of a side alone of all."""
        checks = self.checks[case]
        if len(checks) < len(SIDES):
            return {side: [check.output_ids for check in of] for side, of in checks.items()}
        batches, _ = compare.most_alike([[check.batches for check in checks[side]] for side in SIDES])
        return {side: [check.output_ids for check in of if check.batches == batches] for side, of in checks.items()}

    def same_tokens(self) -> dict[str, dict]:
        """Case -> {"same": true, false or null where it cannot be said, "why": ...}."""
        found = {}
        for case in self.runs:
            repeats = self.alike(case)
            if rounds := list(self.whole(case).values()):
                if case.concurrency == 1:
                    same, why = compare.same_tokens(rounds, repeats)
                elif self.dp_size > 1:
                    same, why = None, "data-parallel ranks batch the requests of one call as they come"
                elif not all(repeats.values()):
                    same, why = None, "no repeat of one call was put together in the same batches on both sides"
                else:
                    # Requests that are sent one by one meet in other batches in each round.
                    same, why = compare.same_tokens([], repeats)
                found[case.name] = {"same": same, "why": why}
        return found


def values(runs: list[Run], samples: list[dict], case: Case) -> dict[tuple[str, str], float]:
    """(part, metric) -> value, of one side in one round."""
    found = {("", metric): value for metric, value in compare.latencies(runs).items()}
    refreshes = sides.refreshes(samples, runs, case.concurrency)
    return found | {sides.KINDS[kind]: statistics.median(us) for kind, us in refreshes.items() if us}


def graph(check: Check, samples: list[dict], case: Case) -> dict[tuple[str, str], float]:
    """As `values`, of what is timed in a check alone."""
    us = sides.refreshes(samples, [check], case.concurrency)[sides.GRAPH]
    return {sides.KINDS[sides.GRAPH]: statistics.median(us)} if us else {}


def peak_mib(samples: list[dict]) -> float | None:
    """Of the scheduler process that allocated most."""
    peaks = [sample["peak_bytes"] for sample in samples if "peak_bytes" in sample]
    return max(peaks) / 2**20 if peaks else None


def order(number: int) -> tuple[str, ...]:
    """off, on; on, off; off, on ..."""
    return SIDES if number % 2 == 0 else SIDES[::-1]


def answered(target, request):
    """What this coroutine of `drive` gives. Raises servers.Failed."""
    try:
        return asyncio.run(request)
    except (drive.Refused, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise target.failure(error) from error


def ask(target, case: Case, prompts: int, options: Options) -> Run:
    """Raises servers.Failed."""
    return answered(target, drive.run(target.url, case.prompts(prompts), options.output_tokens, options.request_seconds))


def check(target, case: Case, options: Options) -> list[Check]:
    """The first round's prompts in one call, each time with an empty prefix cache; observed, since it is not timed. Raises
    servers.Failed."""
    found = []
    with sides.observing(target):
        for _ in range(CHECKS):
            if not answered(target, drive.empty_cache(target.url)):
                raise target.failure(
                    drive.Refused("/flush_cache: the prefix cache was not emptied; is the server in use by others?")
                )
            call = drive.one_call(target.url, case.prompts(0), options.output_tokens, options.request_seconds)
            start, mark = perf_counter_ns(), target.mark
            output_ids = answered(target, call)
            found.append(Check(start, perf_counter_ns(), output_ids, target.prefills(mark)))
    return found


def dp_size(target) -> int:
    return sides.server_info(target).get("dp_size") or 1


def interleaved(targets: dict[str, object], options: Options, book: Book, step: Callable[[str], None], save: Callable[[], None]):
    """Both sides are up, and answer in turn. step: called after each run with its name; save: after each case."""
    book.targets[0], book.dp_size = targets, dp_size(targets[UPSTREAM])
    for case in options.cases:
        for number in range(-options.warmup, options.rounds):
            for side in order(number):
                run = ask(targets[side], case, number, options)
                if number >= 0:
                    book.runs[case][number][side] = [run]
                step(f"{case.name} {sides.LABELS[side]}")
        for side in SIDES:
            targets[side].check()
            if options.compared:
                book.checks[case][side] = check(targets[side], case, options)
        save()
    sides.settled(targets[OURS])
    save()


def one_at_a_time(start: Callable, options: Options, book: Book, step: Callable[[str], None], save: Callable[[], None]):
    """A server alone on its GPUs, for each round and side. start: (side, number) -> a server that is not up yet."""
    for number in range(options.rounds):
        for side in order(number):
            server, memory_before = start(side, number), servers.gpu_memory_mib()
            try:
                servers.start([server], options.ready_seconds)
                server.check()
                book.targets[number][side], book.dp_size = server, dp_size(server)
                for case in options.cases:
                    for warmup in range(-options.warmup, 0):
                        ask(server, case, warmup, options)
                    first = number * options.repeats
                    runs = [ask(server, case, first + more, options) for more in range(options.repeats)]
                    if options.compared and number == 0:
                        book.checks[case][side] = check(server, case, options)
                    book.runs[case][number][side] = runs
                    step(f"{case.name} {server.name}")
                sides.settled(server)
            finally:
                servers.stop([server], memory_before)
        save()
