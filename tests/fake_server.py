"""Stands in for sglang.launch_server, without a model: answers, prints the lines of the log that are read, and writes what the
probe writes. FAKE_<fault>, off or on, makes that side misbehave; FAKE_APART=n has the side with the plugin take each n-th call
of several requests in other batches, which round otherwise.

Tokens are a hash of what came before, so they do not depend on what else runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--mem-fraction-static", type=float, default=0)
parser.add_argument("--cuda-graph-max-bs", "--cuda-graph-max-bs-decode", dest="graph_bs", type=int, default=1000)
parser.add_argument("--chunked-prefill-size", type=int, default=8192)
parser.add_argument("--tp-size", type=int, default=1)
parser.add_argument("--enable-dp-attention", action="store_true")
parser.add_argument("--disaggregation-mode", default="")
args, _ = parser.parse_known_args()
hundredths = round(100 * args.mem_fraction_static)
ON = os.environ.get("SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA") == "1"
SIDE = "on" if ON else "off"
SAMPLES = os.environ.get("SERVER_PROBE_FILE")
# On a busy machine what a client takes to send a request is long, and several must meet.
STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", 0.001 if ON else 0.003))
STEP_TOKENS = 2
# How much more of the GPU's memory the KV cache takes than there is: by 1 it starts and does not serve.
over = hundredths - int(os.environ.get(f"FAKE_FITS_{SIDE}", 100))
lock = threading.RLock()
running: dict[str, threading.Event] = {}  # a request's id -> set to abort it
prefixes: set[int] = set()
kept = []  # the leak
answered, calls = 0, 0


def fake(name: str) -> bool:
    """Whether FAKE_<name> names this side."""
    return os.environ.get(f"FAKE_{name}") == SIDE


def say(text: str, rank: int = 0) -> None:
    print(f"[2026-01-01 00:00:00{f' TP{rank}' * (args.tp_size > 1)}] {text}", flush=True)


def call(what: str) -> None:
    """Into the file that both sides share."""
    with open(os.environ.get("FAKE_CALLS", os.devnull), "a") as file:
        file.write(what + "\n")


def starts_so_far() -> int:
    with open(os.environ.get("FAKE_CALLS", os.devnull)) as file:
        return file.read().count("start-")


def sample(**what) -> None:
    if SAMPLES and not os.environ.get("FAKE_NO_SAMPLES"):
        with open(SAMPLES, "a") as file:
            file.write(json.dumps({"at": time.perf_counter_ns(), **what}) + "\n")


def is_apart(prompts: list) -> bool:
    global calls
    calls += len(prompts) > 1
    each = int(os.environ.get("FAKE_APART", 0)) if ON else 0
    return len(prompts) > 1 and each > 0 and calls % each == 0


def prefill(prompts: list, apart: bool) -> list[int]:
    """The cached tokens of each."""
    found = []
    for prompt in prompts:
        pages = [hash(tuple(prompt[:end])) for end in range(64, len(prompt), 64)]
        found.append(64 * next((number for number, page in enumerate(pages) if page not in prefixes), len(pages)))
        prefixes.update(pages)
        for start in range(found[-1], len(prompt), args.chunked_prefill_size):
            new = min(args.chunked_prefill_size, len(prompt) - start)
            say(f"Prefill batch, #new-seq: {1 + apart}, #new-token: {new}, #cached-token: {found[-1]}")
    return found


def following(ids: list) -> int:
    wrong = (fake("TOKEN") and len(ids) % 67 == 5) or (fake("BUSY") and len(running) > args.graph_bs)
    return (zlib.crc32(repr(ids[-8:]).encode()) + wrong + (fake("UNSTEADY") and answered)) % 1000


def step(number: int, texts: list) -> None:
    """One verify step of these requests, and the refreshes before it."""
    time.sleep(STEP_SECONDS)
    say(f"Decode batch, #running-req: {len(running)}, cuda graph: {len(running) <= args.graph_bs}, #queue-req: 0")
    for kind in ("draft", "verify", "extend"):
        sample(kind=kind, bs=8, ns=20_000 if ON else 400_000 + 1000 * number)
    if SAMPLES and os.path.exists(f"{SAMPLES}.observe"):
        sample(kind="draft graph", bs=8, ns=4_000_000 - 1_000_000 * ON)
        sample(drafts=[[number, following(text) + fake("DRAFT")] for text in texts])
    if fake("LEAK"):
        kept.append(b"x" * 500_000)


def answer(body: dict, beat=lambda: None) -> list[dict]:
    """beat: called in each step; raises where nobody listens any more."""
    prompts, total = body["input_ids"], body["sampling_params"]["max_new_tokens"]
    prompts = prompts if isinstance(prompts[0], list) else [prompts]
    aborted, names = threading.Event(), [f"{body.get('rid', time.perf_counter_ns())}-{at}" for at in range(len(prompts))]
    with lock:
        apart = is_apart(prompts)
        cached = prefill(prompts, apart)
        running.update(dict.fromkeys(names, aborted))
    texts, steps = [list(prompt) for prompt in prompts], 0
    try:
        while len(texts[0]) - len(prompts[0]) < total and not aborted.is_set():
            beat()
            steps += 1
            step(steps, texts)
            for text, prompt in zip(texts, prompts):
                for _ in range(min(STEP_TOKENS, total - len(text) + len(prompt))):
                    text.append(following(text))
    finally:
        for name in names:
            del running[name]
    return [reply(body, text[len(prompt) :], of, steps, apart, aborted) for text, prompt, of in zip(texts, prompts, cached)]


def reply(body: dict, output: list, cached: int, steps: int, apart: bool, aborted: threading.Event) -> dict:
    meta = {"cached_tokens": cached, "spec_verify_ct": steps}
    meta["finish_reason"] = {"type": "abort" if aborted.is_set() else "length"}
    if body.get("return_logprob"):
        meta["output_token_logprobs"] = [[-0.5 - 0.25 * apart - fake("LOGPROB"), one, None] for one in output]
    if body.get("top_logprobs_num"):
        margin = float(os.environ["FAKE_MARGIN"])
        meta["output_top_logprobs"] = [[[-0.1, one, None], [-0.1 - margin, one + 1, None]] for one in output]
    return {"output_ids": output, "meta_info": meta}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(b"")

    def answer(self, body: bytes, status: int = 200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        global answered
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/flush_cache"):
            prefixes.clear()
            return self.answer(b"", 400 if running else 200)
        body = json.loads(body)
        if self.path == "/abort_request":
            for name, aborted in list(running.items()):
                if name.startswith(body["rid"]):
                    aborted.set()
            return self.answer(b"")
        answered += 1
        if over == 1:
            end("torch.OutOfMemoryError: CUDA out of memory.")
        if fake("DIE_LATE") and answered > 6:
            end("torch.OutOfMemoryError: CUDA out of memory." if os.environ.get("FAKE_OOM") else "RuntimeError: caught fire")
        call(SIDE)
        if starts_so_far() == int(os.environ.get("FAKE_HANG_AT", -1)):
            call("hang")
            time.sleep(600)
        if not body.get("stream"):
            found = answer(body)
            return self.answer(json.dumps(found if isinstance(body["input_ids"][0], list) else found[0]).encode())
        self.answer(b"")
        try:
            answer(body, self.beat)
        except ConnectionError:
            pass

    def beat(self):
        try:
            self.wfile.write(b"data: {}\n\n")
        except ConnectionError:
            if not fake("NO_ABORT"):
                raise


def end(text: str):
    print(text, flush=True)
    os._exit(9)


def starts() -> None:
    call(f"start-{SIDE}")
    say(f"arguments {sys.argv[1:]}")
    say(f"environment { {name: of for name, of in os.environ.items() if name.startswith('SGLANG_')} }")
    if fake("CHILD"):  # one that ignores Ctrl-C and outlives its parent
        code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code])
    if args.enable_dp_attention and os.environ.get("FAKE_REFUSES_DP"):
        raise SystemExit("ValueError: no data-parallel attention")
    if hundredths < int(os.environ.get("FAKE_LEAST", 0)):
        raise SystemExit("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.")
    if over > 1:
        raise SystemExit("RuntimeError: Capture cuda graph failed: CUDA out of memory.")
    say(f"max_total_num_tokens={1000 * hundredths}, chunked_prefill_size=8192, available_gpu_mem={90 + 2 * ON}.50 GB")
    if fake("DIE_EARLY"):
        raise SystemExit("ValueError: boom")
    if not fake("OTHER_WEIGHTS"):
        say("server-probe: decisive weights")
    if os.environ.get("FAKE_REFUSES_PD") and args.disaggregation_mode:
        print("ImportError: no transfer engine", flush=True)
        say("kill_process_tree called")
        raise SystemExit(1)
    captures = args.disaggregation_mode != "prefill"
    if os.environ.get("FAKE_LINE_TOO") or (ON and captures and not fake("NO_LINE")):
        for rank in range(1 if fake("ONE_RANK") else args.tp_size):
            say("sglang-nsa-fused 0.1.0 active: sglang 0.5.12.post1, fake GPU, native generates; replaces X and Y", rank)
    if fake("PLUGIN_FAILS"):
        say("Failed to load plugin 'server_probe': no such module")
    if fake("FALLBACK"):
        say("Warning: fused metadata copy kernel not available, falling back to loop.")
    for table_bytes in (1 << 20, (3 << 20) - (ON << 20)):
        sample(table_bytes=table_bytes)


starts()
signal.signal(signal.SIGINT, lambda *_: os._exit(0))
ThreadingHTTPServer.request_queue_size = 128  # the default of 5 refuses some of many requests at once
ThreadingHTTPServer.daemon_threads = True
ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
