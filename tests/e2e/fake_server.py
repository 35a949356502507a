"""Stands in for sglang.launch_server: what tests/e2e asks of it, without a model. FAKE lists how it misbehaves. Of calls with
several requests each SPLIT-th is taken in other batches, which round otherwise.

The tokens are a hash of what came before, so they do not depend on what else runs.
"""

import argparse
import asyncio
import itertools
import json
import os
import time
import zlib

from aiohttp import web

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--cuda-graph-max-bs", "--cuda-graph-max-bs-decode", dest="graph_bs", type=int)
parser.add_argument("--chunked-prefill-size", type=int)
parser.add_argument("--tp-size", type=int, default=1)
parser.add_argument("--enable-dp-attention", action="store_true")
args, _ = parser.parse_known_args()
plugin = "nsa_fused" in os.environ["SGLANG_PLUGINS"].split(",")
faults = os.environ.get("FAKE", "").split(",") if plugin else []
samples = os.environ["SERVER_PROBE_FILE"]
calls, split = itertools.count(1), int(os.environ.get("SPLIT", 0)) if plugin else 0
if args.enable_dp_attention and "REFUSES_DP" in os.environ:
    raise SystemExit("ValueError: no data-parallel attention")

STEP_SECONDS = 0.04  # long beside what a client on a busy machine takes to send a request: several must meet
running: dict[str, asyncio.Event] = {}  # rid -> set to abort it
prefixes: set[int] = set()
kept = []  # the leak


def log(text: str, rank: int = 0) -> None:
    print(f"[2026-01-01 00:00:00{f' TP{rank}' * (args.tp_size > 1)}] {text}", flush=True)


def token(ids: tuple) -> int:
    return zlib.crc32(repr(ids[-8:]).encode()) % 1000


async def generate(request) -> web.StreamResponse:
    body = await request.json()
    prompts = body["input_ids"]
    one = not isinstance(prompts[0], list)
    apart = not one and split and next(calls) % split == 0
    answering = [answer(body, tuple(prompt), apart) for prompt in ([prompts] if one else prompts)]
    if not body.get("stream"):
        replies = await asyncio.gather(*answering)
        return web.json_response(replies[0] if one else replies)
    response = web.StreamResponse()
    await response.prepare(request)
    task = asyncio.create_task(answering[0])
    try:
        while not task.done():
            await response.write(b"data: {}\n\n")
            await asyncio.sleep(0.02)
    except ConnectionError:
        if "NO_ABORT" not in faults:
            task.cancel()
    return response


async def answer(body: dict, prompt: tuple, apart: bool) -> dict:
    rid, aborted = body.get("rid") or str(time.perf_counter_ns()), asyncio.Event()
    pages = [hash(prompt[:end]) for end in range(64, len(prompt), 64)]
    cached = 64 * next((number for number, page in enumerate(pages) if page not in prefixes), len(pages))
    prefixes.update(pages)
    for start in range(cached, len(prompt), args.chunked_prefill_size):
        tokens = min(args.chunked_prefill_size, len(prompt) - start)
        log(f"Prefill batch, #new-seq: {1 + apart}, #new-token: {tokens}, #cached-token: {cached}")
    running[rid], ids, steps = aborted, prompt, 0
    try:
        while len(ids) - len(prompt) < body["sampling_params"]["max_new_tokens"] and not aborted.is_set():
            await asyncio.sleep(STEP_SECONDS)
            steps += 1
            log(f"Decode batch, #running-req: {len(running)}, cuda graph: {len(running) <= args.graph_bs}, #queue-req: 0")
            for _ in range(min(2, body["sampling_params"]["max_new_tokens"] - len(ids) + len(prompt))):
                wrong = "TOKEN" in faults and len(ids) % 97 == 5 or "BUSY" in faults and len(running) > args.graph_bs
                ids += ((token(ids) + wrong) % 1000,)
            if os.path.exists(samples + ".observe"):
                with open(samples, "a") as file:
                    draft = [token(ids) + ("DRAFT" in faults), steps]
                    file.write(json.dumps({"at": time.perf_counter_ns(), "drafts": [draft]}) + "\n")
            if "LEAK" in faults:
                kept.append(b"x" * 500_000)
    finally:
        del running[rid]
    output = ids[len(prompt) :]
    meta = {
        "cached_tokens": cached,
        "spec_verify_ct": steps,
        "finish_reason": {"type": "abort" if aborted.is_set() else "length"},
    }
    if body.get("return_logprob"):
        meta["output_token_logprobs"] = [[-0.5 - 0.25 * apart - ("LOGPROB" in faults), one, None] for one in output]
    if body.get("top_logprobs_num"):
        meta["output_top_logprobs"] = [[[-0.1, one, None], [-0.1 - float(os.environ["MARGIN"]), one + 1, None]] for one in output]
    return {"output_ids": output, "meta_info": meta}


async def abort_request(request) -> web.Response:
    running[(await request.json())["rid"]].set()
    return web.Response()


async def flush_cache(request) -> web.Response:
    prefixes.clear()
    return web.Response(status=400 if running else 200)


async def health(request) -> web.Response:
    return web.Response()


if plugin and "NO_LINE" not in faults:
    for rank in range(1 if "ONE_RANK" in faults else args.tp_size):
        log("sglang-nsa-fused 0.1.0 active: sglang 0.5.12.post1, no GPU, native generates; replaces X and Y", rank)
if "OTHER_WEIGHTS" not in faults:
    log("server-probe: decisive weights")
if "FALLBACK" in faults:
    log("sglang-nsa-fused: falling back")
app = web.Application()
for path, handler in {"/generate": generate, "/abort_request": abort_request, "/flush_cache": flush_cache}.items():
    app.router.add_post(path, handler)
app.router.add_get("/health", health)
web.run_app(app, host="127.0.0.1", port=args.port, print=None, shutdown_timeout=0.1)
