"""Stands in for sglang.launch_server in the tests of the benchmarks: streams tokens, prints the plugin's line, writes what
the probe writes. The variables FAKE_* make it misbehave."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--mem-fraction-static", type=float, default=0)
arguments = parser.parse_known_args()[0]
port, hundredths = arguments.port, round(100 * arguments.mem_fraction_static)
ON = os.environ.get("SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA") == "1"
SIDE = "on" if ON else "off"
SAMPLES = os.environ.get("SERVER_PROBE_FILE")
STEP_TOKENS = 2
# How much more of the GPU's memory the KV cache takes than there is: by 1 it starts and does not serve.
over = hundredths - int(os.environ.get(f"FAKE_FITS_{SIDE}", 100))
answered = 0


def fake(name: str) -> bool:
    """Whether FAKE_<name> names this side."""
    return os.environ.get(f"FAKE_{name}") == SIDE


def refreshes_fused() -> bool:
    return ON and not os.path.exists(f"{SAMPLES}.upstream")


def take_a_step() -> None:
    time.sleep(0.001 if refreshes_fused() else 0.003)


def say(*words) -> None:
    print(*words, flush=True)


def call(what: str) -> None:
    """Into the file that both sides share."""
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(what + "\n")


def sample(**what) -> None:
    if SAMPLES and not os.environ.get("FAKE_NO_SAMPLES"):
        with open(SAMPLES, "a") as file:
            file.write(json.dumps({"at": time.perf_counter_ns(), **what}) + "\n")


def refreshes(step: int) -> None:
    for kind in ("draft", "verify", "extend"):
        sample(kind=kind, bs=8, ns=20_000 if refreshes_fused() else 400_000 + 1000 * step)


def whole(prompts: list, total: int) -> list[dict]:
    """The answer to all requests of one call."""
    steps = -(-(total - 1) // STEP_TOKENS)
    for part in [prompts[:1], prompts[1:]] if fake("APART") and len(prompts) > 1 else [prompts]:
        say(f"Prefill batch, #new-seq: {len(part)}, #new-token: {sum(map(len, part))}, #cached-token: 0, token usage: 0.00")
    for step in range(1, steps + 1):
        take_a_step()
        refreshes(step)
        if os.path.exists(f"{SAMPLES}.observe"):
            sample(kind="draft graph", bs=8, ns=4_000_000 - 1_000_000 * ON)
            sample(drafts=[[step, sum(prompt) + (ON and fake("DRAFTS"))] for prompt in prompts])
    return [{"output_ids": output_ids(prompt, total), "meta_info": {"spec_verify_ct": steps}} for prompt in prompts]


def output_ids(prompt: list, total: int, alone: bool = True) -> list[int]:
    """alone: no other request may be in the batch, or those of the same call."""
    ids = [(sum(prompt) + at) % 1000 for at in range(total)]
    if fake("TOKENS") and answered > 2:
        ids[3] += 1
    if fake("UNSTEADY") or (os.environ.get("FAKE_ROUNDS") and not alone):
        ids[5] += answered
    return ids


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        info = {"version": "0.5.12.post1", "dp_size": int(os.environ.get("FAKE_DP_SIZE", 1))}
        self.answer(json.dumps(info).encode() if self.path == "/server_info" else b"")

    def answer(self, body: bytes, status: int = 200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        global answered
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/flush_cache":
            return self.answer(b"", 400 if fake("KEEPS_CACHE") else 200)
        answered += 1
        if over == 1:
            say("torch.OutOfMemoryError: CUDA out of memory.")
            os._exit(9)
        if fake("DIE_LATE") and answered > 6:
            say("torch.OutOfMemoryError: CUDA out of memory." if os.environ.get("FAKE_OOM") else "RuntimeError: caught fire")
            os._exit(9)
        request = json.loads(body)
        call(SIDE)
        if os.environ.get("FAKE_HANG") and answered > 6:
            call("hang")
            time.sleep(600)
        self.send_response(200)
        self.end_headers()
        total, prompts = request["sampling_params"]["max_new_tokens"], request["input_ids"]
        if not request.get("stream"):
            return self.wfile.write(json.dumps(whole(prompts, total)).encode())
        ids, steps = output_ids(prompts, total, alone=False), 0
        for end in [1, *range(1 + STEP_TOKENS, total, STEP_TOKENS), total]:
            take_a_step()
            steps += end > 1
            refreshes(steps)
            meta = {
                "completion_tokens": end,
                "spec_verify_ct": steps,
                "finish_reason": {"type": "length"} if end == total else None,
            }
            self.wfile.write(b"data: " + json.dumps({"output_ids": ids[:end], "meta_info": meta}).encode() + b"\n\n")
        sample(peak_bytes=(5 << 30) + (ON << 20))
        self.wfile.write(b"data: [DONE]\n\n")


call(f"start-{SIDE}")
say("arguments", sys.argv[1:])
say("environment", {name: os.environ.get(name) for name in os.environ if name.startswith("SGLANG_")})
if fake("CHILD"):  # one that ignores Ctrl-C and outlives its parent
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"])
if hundredths < int(os.environ.get("FAKE_LEAST", 0)):
    say("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.")
    sys.exit(1)
if over > 1:
    say("RuntimeError: Capture cuda graph failed: CUDA out of memory.")
    sys.exit(1)
say(f"max_total_num_tokens={1000 * hundredths}, chunked_prefill_size=8192")
if fake("DIE_EARLY"):
    say("ValueError: boom")
    sys.exit(3)
if os.environ.get("FAKE_LINE_TOO") or (ON and not os.environ.get("FAKE_NO_LINE")):
    say("[2026-01-01] sglang-nsa-fused 0.1.0 active: sglang 0.5.12.post1, fake GPU, native generates; replaces X and Y")
if fake("PLUGIN_FAILS"):
    say("[2026-01-01] Failed to load plugin 'server_probe': no such module")
if fake("FALLBACK"):
    say("Warning: fused metadata copy kernel not available, falling back to loop.")
for table_bytes in (1 << 20, (3 << 20) - (ON << 20)):
    sample(table_bytes=table_bytes)
signal.signal(signal.SIGINT, lambda *_: os._exit(0))
ThreadingHTTPServer.request_queue_size = 128  # the default of 5 refuses some of many requests at once
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
