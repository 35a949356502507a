"""A real server with speculative decoding, plugin off and on; one pair of servers for each configuration."""

import collections
import random
import time
from concurrent.futures import ThreadPoolExecutor

import memory
import serving
from serving import CAPTURED, CHUNK, RUNNING, Request, answers, check_same, console, prompt

from sglang_nsa_fused.tools.bench import process

SAMPLES = 40  # of memory under load, at the least


def mixed(seed: str, count: int) -> list[Request]:
    """Prompts of 1 to 1,000 tokens, each 25th above index_topk."""
    draw = random.Random(seed)
    lengths = (draw.randint(2049, 3000) if number % 25 == 24 else draw.randint(1, 1000) for number in range(count))
    return [Request(prompt((seed, number), length), draw.randint(8, 40)) for number, length in enumerate(lengths)]


def test_log_line(pair):
    assert pair.off.plugin_lines() == []  # raises where a server fell back
    lines = pair.on.plugin_lines()
    console.print("  " + "\n  ".join(lines))
    assert len(lines) == 1, f"expected one line of an active plugin, got {lines}"


def test_one_call(pair):
    serving.check_call(pair)
    serving.check_drafts(pair)


def test_joining_and_leaving(pair, request_count):
    requests = mixed("joining", request_count)
    mark = pair.on.mark
    (upstream,), (ours,) = (answers([server], requests, serving.wave(request_count)) for server in pair)
    sizes = [size for size, _ in pair.on.batches(mark)]
    assert sizes, "the log has no decode batches"
    console.print(f"  {len(sizes)} decode batches of {min(sizes)} to {max(sizes)} requests")
    assert min(sizes) <= 2 and max(sizes) > CAPTURED, "the requests did not join and leave as meant"
    [again] = answers([pair.off], requests, serving.wave(request_count, phase=0.5))
    itself = len(serving.differing(upstream, again))
    console.print(f"  upstream in other batches: {request_count - itself} of {request_count} answers identical")
    check_same(pair, requests, upstream, again, serving.ITSELF)
    assert itself <= request_count // 4, "upstream differs from itself too often to be compared with"
    differing = check_same(pair, requests, upstream, ours)
    # A small error could hide in undecided tokens, but not without there being more of them than between upstream's runs.
    assert differing <= 2 * itself + max(4, request_count // 50), f"{differing} answers differ, {itself} of upstream's own"


def test_prefix_reuse(pair):
    shared = prompt("shared", 640)
    first = [Request(shared, 16)]
    requests = [Request(shared + prompt(("tail", length), length), 24) for length in (1, 2, 63, 64, 65, 130, 300, 500)]
    answers(list(pair), first)
    upstream, ours = answers(list(pair), requests)
    for server, found in zip(pair, (upstream, ours)):
        cached = [answer.cached_tokens for answer in found]
        assert min(cached) >= len(shared) - 64, f"{server.name}: the prefix was not reused: {cached} tokens cached"
    check_same(pair, requests, upstream, ours)


def test_chunked_prefill(pair):
    """Prompts of several chunks while others decode."""
    requests = [Request(prompt(("chunks", length), length), 48) for length in (40, 300, 2500, 41, 3000, 1025)]
    mark = pair.on.mark
    upstream, ours = answers(list(pair), requests)
    chunks = [tokens for _, tokens, *_ in pair.on.prefills(mark)]
    console.print(f"  prefills of {chunks} tokens")
    assert max(chunks, default=0) <= CHUNK and len(chunks) >= sum(len(request.prompt) for request in requests) // CHUNK
    check_same(pair, requests, upstream, ours)


def test_above_the_largest_graph(pair):
    """Upstream's eager path and back."""
    for count, graph in ((4, True), (CAPTURED + 4, False), (4, True)):
        requests = [Request(prompt(("graph", number), 100 + number), 64) for number in range(count)]
        mark = pair.on.mark
        upstream, ours = answers(list(pair), requests)
        had = {had for size, had in pair.on.batches(mark) if size == count}
        assert had == {graph}, f"batches of {count} requests: with a graph {had or 'never seen'}"
        check_same(pair, requests, upstream, ours)


def test_abort(pair):
    """One request whose client goes away and one aborted by id, while others run."""
    others = [Request(prompt(("abort", number), 50 * number + 20), 64) for number in range(6)]
    upstream, _ = answers(list(pair), others)  # also brings both prefix caches to the same state
    for server in pair:
        ours, ended = abort(server, others)
        assert ended == "abort", f"{server.name}: the aborted request ended with {ended}"
        # Without the abort they would go on for longer: at most draft_steps + 1 tokens of 30,000 each 8 ms or so.
        assert serving.wait_idle(server, 15), f"{server.name}: still decoding after its requests were aborted"
        check_same(pair, others, upstream, ours)
    check_same(pair, others, *answers(list(pair), others))


def abort(server, others: list[Request]) -> tuple[list, str]:
    """The others' answers, and how the aborted request ended."""
    endless = [prompt(("endless", number), 100) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        aborted = pool.submit(server.generate, endless[0], 30_000, rid="aborted")
        body = {"input_ids": endless[1], "sampling_params": process.greedy(30_000), "stream": True}
        with server.open("/generate", body) as stream:
            running = pool.submit(serving.send, server, others)
            for _ in range(6):  # three chunks, an empty line behind each: until it decodes
                stream.readline()
        server.post("/abort_request", {"rid": "aborted"})
        return running.result(), aborted.result()["meta_info"]["finish_reason"]["type"]


def test_load(pair, minutes):
    """GPU and host memory of each server under the same load, and their tokens after it."""
    samples = collections.defaultdict(list)
    count = load(pair, 60 * minutes, samples)
    console.print(f"  {count} requests in {minutes} minutes")
    memory.check_drift(samples)
    serving.check_call(pair)
    assert len(pair.on.plugin_lines()) == 1


def load(pair, seconds: float, samples: dict) -> int:
    """Goes on for so long, and until there are SAMPLES of memory, however busy the machine is."""
    start, watching = time.monotonic(), True

    def client_of(server, number: int) -> int:
        """How many requests it sent."""
        draw, count = random.Random(f"load {number}"), 0
        while watching:
            serving.ask(server, Request(prompt(draw.random(), draw.randint(1, 2500)), draw.randint(8, 200)))
            count += 1
            if draw.random() < 0.02:  # some pauses, so that the batch shrinks
                time.sleep(draw.random())
        return count

    clients = [(server, number) for server in pair for number in range(RUNNING - 4)]
    with ThreadPoolExecutor(len(clients)) as pool:
        counts = [pool.submit(client_of, *client) for client in clients]
        try:
            said, taken = start, 0
            while (now := time.monotonic()) - start < seconds or taken < SAMPLES:
                if failed := [one for one in counts if one.done()]:
                    failed[0].result()
                mib_of = memory.memory(pair)
                for key, mib in mib_of.items():
                    samples[key].append((now - start, mib))
                taken += 1
                if now - said > 30:
                    said = now
                    console.print(f"  {now - start:.0f} s, {[round(mib) for mib in mib_of.values()]} MiB")
                time.sleep(min(5, seconds / SAMPLES))
        finally:
            watching = False
        return sum(one.result() for one in counts)
