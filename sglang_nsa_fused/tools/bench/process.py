"""A sglang server as a child process: started, watched, asked and stopped, with nothing left running."""

import contextlib
import http.client
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Iterator, Sequence

from sglang_nsa_fused.tools.bench.signals import uninterrupted

HOST = "127.0.0.1"
COMMAND = f"{shlex.quote(sys.executable)} -m sglang.launch_server"
REQUEST_SECONDS = 300
SETTLE_SECONDS = 1.5  # the probe looks and writes each half second
# Not sglang's note that it warms up less "to avoid out of memory".
OUT_OF_MEMORY = re.compile(r"(?<!avoid )out of memory|OutOfMemoryError|Not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
NOT_ACTIVE = re.compile(r"sglang-nsa-fused: not active: .*")
PLUGIN_FAILED = re.compile(r"Failed to (?:load plugin|execute general plugin|apply hooks).*")  # sglang goes on without it
PLUGIN_LINE = re.compile(r"\bsglang-nsa-fused .*")  # anywhere in a line: it may follow a progress bar
FALLBACK_LINE = re.compile(r"^(?=.*falling back)(?=.*(?:metadata copy|sglang-nsa-fused)).*$", re.M | re.I)
DECODE = re.compile(r"Decode batch.*?#running-req: (\d+).*?graph: (True|False)")
PREFILL = re.compile(r"Prefill batch.*?#new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)")
AS_NUMBERS = ("--format=csv,noheader,nounits",)


class Failed(Exception):
    """Why something was not measured, or what it showed to be wrong. Log lines may follow the first line."""


class OutOfMemory(Failed):
    pass


class Server:
    """A server process on `port`; NCCL gets the next one.

    name: of its log in `folder`, and of itself in errors. flags: besides the ports. env: of `servers.environment`; where that
    has the probe, its samples lie beside the log.
    """

    def __init__(self, name: str, port: int, flags: Sequence, env: dict[str, str], folder: Path, command: str = COMMAND):
        self.name, self.port, self.log = name, port, folder / f"{name}.log"
        self.samples_file = folder / f"{name}-samples.jsonl"
        self.env = env | {"SERVER_PROBE_FILE": str(self.samples_file)}
        self.gpu = env.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
        self.process, self.ready_seconds = None, None
        ports = ["--host", HOST, "--port", port, "--nccl-port", port + 1]
        self.command = [*shlex.split(command), *map(str, [*flags, *ports])]

    def start(self) -> None:
        self.samples_file.write_text("")
        self.memory_before = gpu_memory_mib(self.gpu)
        with self.log.open("wb") as log, uninterrupted():
            # Not in the working directory: a source tree of the plugin there would come first on sys.path.
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                cwd=self.log.parent,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started = time.monotonic()

    def is_ready(self) -> bool:
        """Raises Failed when the process has ended, or runs without one of its plugins."""
        if self.ready_seconds is None:
            if self.process.poll() is not None:
                raise self.ended()
            with contextlib.suppress(OSError, http.client.HTTPException):  # 503 while it starts
                urllib.request.urlopen(f"{self.url}/health", timeout=30).close()
                self.ready_seconds = round(time.monotonic() - self.started, 1)
                if found := PLUGIN_FAILED.search(self.log_from(0)):
                    raise Failed(f"{self.name}: sglang did not load a plugin: {found[0]}{self.tail()}")
        return self.ready_seconds is not None

    def ended(self) -> Failed:
        """Why, of a process that has ended, as far as its log tells."""
        log = self.log_from(0)
        if OUT_OF_MEMORY.search(log):
            return OutOfMemory(f"{self.name}: out of memory{self.tail()}")
        found = NOT_ACTIVE.search(log)
        why = found[0] if found else f"the server ended with status {self.process.returncode}"
        return Failed(f"{self.name}: {why}{self.tail()}")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def open(self, path: str, body: dict, seconds: float = REQUEST_SECONDS):
        """The reply, to read and close."""
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=seconds)

    def post(self, path: str, body: dict, seconds: float = REQUEST_SECONDS) -> bytes:
        """Raises Failed; a server that died is named as such."""
        try:
            with self.open(path, body, seconds) as reply:
                return reply.read()
        except (OSError, http.client.HTTPException) as error:
            said = error.read().decode(errors="replace")[:500] if isinstance(error, urllib.error.HTTPError) else ""
            if wait(lambda: self.process.poll() is not None, 0 if said else 10):
                raise self.ended() from error
            raise Failed(f"{self.name}: a request failed: {str(error) or type(error).__name__} {said}{self.tail()}") from error

    def generate(self, prompts: Sequence, output_tokens: int, seconds: float = REQUEST_SECONDS, **more):
        """Greedily, for exactly so many tokens. prompts: one, or several that reach the scheduler in one message. The reply,
        or replies. Raises Failed."""
        return json.loads(
            self.post("/generate", {"input_ids": prompts, "sampling_params": greedy(output_tokens), **more}, seconds)
        )

    def plugin_lines(self) -> list[str]:
        """The lines of an active plugin, one for each scheduler process. Raises Failed where a server fell back."""
        log = self.log_from(0)
        if found := FALLBACK_LINE.search(log):
            raise Failed(f"{self.name}: the server fell back: {found[0]}")
        return [line for line in PLUGIN_LINE.findall(log) if "active" in line and "not active" not in line]

    def check_plugin(self, expected: bool) -> None:
        """Raises Failed where it is not as expected."""
        lines = self.plugin_lines()
        if expected and not lines:
            hint = "its line is not in the log; see `sglang-nsa-fused doctor`"
            raise Failed(f"{self.name}: the plugin is not active: {hint}{self.tail()}")
        if lines and not expected:
            raise Failed(f"{self.name}: the plugin is active, and must not be: {lines[0]}{self.tail()}")

    @property
    def mark(self) -> int:
        """Where the log ends now."""
        return self.log.stat().st_size

    def log_from(self, mark: int) -> str:
        with self.log.open("rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")

    def prefills(self, mark: int) -> tuple[tuple[int, ...], ...]:
        """Of each prefill batch since then its requests, their new and cached tokens, and how many decode batches were before."""
        log = self.log_from(mark)
        return tuple((*map(int, found.groups()), len(DECODE.findall(log, 0, found.start()))) for found in PREFILL.finditer(log))

    def tail(self) -> str:
        lines = self.log_from(0).splitlines()[-30:]
        return f"\n--- {self.log}\n" + "\n".join(lines)

    def samples(self) -> list[dict]:
        """All so far; see probe.py."""
        lines = self.samples_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written


def greedy(output_tokens: int) -> dict:
    return {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}


def drafts(samples: list[dict], start: int, end: int) -> list:
    """The draft tokens of each request and step, in any order: requests may be batched in another one. start, end: nanoseconds
    of perf_counter."""
    return sorted(row for sample in samples if start <= sample["at"] <= end for row in sample.get("drafts", []))


@contextlib.contextmanager
def observed(*up: Server) -> Iterator[None]:
    """Their probes keep draft tokens and time the draft graph, at the price of a sync and a delay in each step. All of it, and
    what was sampled before, is written when this ends."""
    files = [Path(f"{server.samples_file}.observe") for server in up]
    for file in files:
        file.touch()
    try:
        time.sleep(SETTLE_SECONDS)
        yield
        time.sleep(SETTLE_SECONDS)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def running(servers: Sequence[Server]) -> Iterator[None]:
    """Starts them; they and what they have on their GPUs are gone when the block ends, however it does. Raises Failed."""
    check_ports(servers)
    try:
        for server in servers:
            server.start()
        yield
    finally:
        left = stop([server for server in servers if server.process])
        if left:
            print(left, file=sys.stderr)
    if left:  # what comes next would be measured beside it
        raise Failed(left)


def wait_ready(servers: Sequence[Server], deadline: float) -> None:
    """deadline: of time.monotonic. Raises Failed."""
    while not all([server.is_ready() for server in servers]):  # noqa: C419 - every one is asked
        if time.monotonic() > deadline:
            late = next(server for server in servers if server.ready_seconds is None)
            raise Failed(f"{late.name}: the server was not ready in time{late.tail()}")
        time.sleep(0.2)


def check_ports(servers: Sequence[Server]) -> None:
    for port in (port for server in servers for port in (server.port, server.port + 1)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise Failed(f"port {port} is taken: give another --port") from error


def stop(servers: Sequence[Server]) -> str:
    """With all that they started. What is left all the same, "" for nothing."""
    with uninterrupted():
        for number, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, 30)):
            for pid in session_members(servers):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if wait(lambda: not session_members(servers), seconds):
                break
        else:
            return f"servers that cannot be stopped: {session_members(servers)}"
        for server in servers:
            if not wait(lambda: gpu_memory_mib(server.gpu) < server.memory_before + 1024, 60):  # noqa: B023 - called here
                return f"GPU {server.gpu}: its memory is still in use after the server was stopped"
    return ""


def session_members(servers: Sequence[Server]) -> list[int]:
    """Ids of their live processes and of those that these started; children may outlive their leader."""
    for server in servers:
        server.process.poll()
    sessions, members = {server.process.pid for server in servers}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def wait(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def gpu_memory_mib(gpu: str) -> float:
    """In use on the GPU by all processes; 0 where nvidia-smi is missing."""
    try:
        return float(nvidia_smi("-i", gpu, "--query-gpu=memory.used"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def gpu_memory_by_process() -> dict[int, float]:
    """MiB in use on all GPUs by each process id; empty where the driver does not tell."""
    found: dict[int, float] = {}
    try:
        for line in nvidia_smi("--query-compute-apps=pid,used_gpu_memory").splitlines():
            pid, mib = line.split(",")
            found[int(pid)] = found.get(int(pid), 0) + float(mib)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return found


@contextlib.contextmanager
def clocks(gpu: str) -> Iterator[list[tuple[float, float]]]:
    """Yields what has the clock of the GPU's SMs in MHz and its power in watts, twice a second, once the block has ended; empty
    where nvidia-smi is missing."""
    found: list[tuple[float, float]] = []
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=clocks.sm,power.draw", *AS_NUMBERS, "-lms", "500"]
    try:
        sampler = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield found
        return
    try:
        select.select([sampler.stdout], [], [], 10)  # until it is up, or has ended
        yield found
    finally:
        sampler.terminate()
        said, _ = sampler.communicate()
        for line in said.split("\n")[:-1]:  # the last may be cut off
            with contextlib.suppress(ValueError):  # [N/A]
                mhz, watts = map(float, line.split(","))
                found.append((mhz, watts))


def nvidia_smi(*query: str) -> str:
    command = ["nvidia-smi", *query, *AS_NUMBERS]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
