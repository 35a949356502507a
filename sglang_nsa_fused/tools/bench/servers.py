"""sglang servers as child processes: started, watched and stopped, with nothing left running."""

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from rich.console import Console

from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.settings import ALLOWLIST, EXTERNAL, EXTERNAL_PACKAGE, GATE, GATE_DSA, REQUIRED
from sglang_nsa_fused.tools.patch import LOADER

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
COMMAND = f"{shlex.quote(sys.executable)} -m sglang.launch_server"
# NSA (DSA) backend and cache dtype of each kind of cache.
CACHES = {"bf16": ("flashmla_sparse", "bfloat16"), "fp8": ("flashmla_kv", "fp8_e4m3")}
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PORTS_APART = 1000  # of two servers: data-parallel attention takes some hundreds more than the first
REQUEST_SECONDS = 300
NO_GPU = "no GPU: torch.cuda.is_available() is False; on a CPU there is `sglang-nsa-fused demo`"
# Not sglang's note that it warms up less "to avoid out of memory".
OUT_OF_MEMORY = re.compile(r"(?<!avoid )out of memory|OutOfMemoryError|Not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
NOT_ACTIVE = re.compile(r"sglang-nsa-fused: not active: .*")
PLUGIN_FAILED = re.compile(r"Failed to (?:load plugin|execute general plugin|apply hooks).*")  # sglang goes on without it
PLUGIN_LINE = re.compile(r"\bsglang-nsa-fused .*")  # anywhere in a line: it may follow a progress bar
FALLBACK_LINE = re.compile(r"^(?=.*falling back)(?=.*(?:metadata copy|sglang-nsa-fused)).*$", re.M | re.I)
DECODE = re.compile(r"Decode batch.*?#running-req: (\d+).*?graph: (True|False)")
PREFILL = re.compile(r"Prefill batch.*?#new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)")

console = Console(width=150, highlight=False, markup=False)


class Failed(Exception):
    """Why something was not measured, or what it showed to be wrong. Log lines may follow the first line."""


class OutOfMemory(Failed):
    pass


class Server:
    """A server process on `port`; NCCL gets the next one.

    name: of its log in `folder`, and of itself in errors. flags: besides the ports.
    """

    def __init__(self, name: str, port: int, flags: list, env: dict[str, str], folder: Path, command: str = COMMAND):
        self.name, self.port, self.env = name, port, env
        self.process, self.ready_seconds, self.log = None, None, folder / f"{name}.log"
        ports = ["--host", HOST, "--port", port, "--nccl-port", port + 1]
        self.command = [*shlex.split(command), *map(str, [*flags, *ports])]

    def start(self) -> None:
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
                if found := PLUGIN_FAILED.search(self.log.read_text(errors="replace")):
                    raise Failed(f"{self.name}: sglang did not load a plugin: {found[0]}{self.tail()}")
        return self.ready_seconds is not None

    def ended(self) -> Failed:
        """Why, of a process that has ended, as far as its log tells."""
        log = self.log.read_text(errors="replace")
        if OUT_OF_MEMORY.search(log):
            return OutOfMemory(f"{self.name}: out of memory{self.tail()}")
        found = NOT_ACTIVE.search(log)
        why = found[0] if found else f"the server ended with status {self.process.returncode}"
        return Failed(f"{self.name}: {why}{self.tail()}")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def failure(self, error: Exception) -> Failed:
        """Of a request; a server that died is named as such."""
        if wait(lambda: self.process.poll() is not None, 10):
            return self.ended()
        return Failed(f"{self.name}: a request failed: {said(error)}{self.tail()}")

    def post(self, path: str, body: dict, seconds: float = REQUEST_SECONDS):
        """The reply's JSON. Raises Failed."""
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return json.load(reply)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Failed(f"{self.name}: no answer from the server: {error}{self.tail()}") from error

    def plugin_lines(self) -> list[str]:
        """The lines of an active plugin, one for each scheduler process. Raises Failed where a server fell back."""
        log = self.log.read_text(errors="replace")
        if found := FALLBACK_LINE.search(log):
            raise Failed(f"{self.name}: the server fell back: {found[0]}")
        return [line for line in PLUGIN_LINE.findall(log) if "active" in line and "not active" not in line]

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
        lines = self.log.read_text(errors="replace").splitlines()[-30:]
        return f"\n--- {self.log}\n" + "\n".join(lines)


def said(error: Exception) -> str:
    return str(error) or type(error).__name__


def flags(release: Release, draft_steps: int, cache: str, graph_bs: int) -> list:
    """Of a server with EAGLE speculation on a model with random weights, that captures graphs up to a batch of graph_bs."""
    return [
        *("--load-format", "dummy", "--skip-tokenizer-init", "--trust-remote-code", "--random-seed", 0),
        *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
        *("--disable-custom-all-reduce", "--watchdog-timeout", 600),
        *speculation_flags(draft_steps),
        *cache_flags(release, cache),
        *("--cuda-graph-max-bs-decode" if release.flags_by_phase else "--cuda-graph-max-bs", graph_bs),
        *(["--disable-prefill-cuda-graph"] if release.flags_by_phase else []),
    ]


def speculation_flags(draft_steps: int) -> list:
    return [
        *("--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", 1),
        *("--speculative-num-steps", draft_steps, "--speculative-num-draft-tokens", draft_steps + 1),
    ]


def cache_flags(release: Release, cache: str) -> list:
    (backend, dtype), names = CACHES[cache], release.names
    return [f"--{names}-prefill-backend", backend, f"--{names}-decode-backend", backend, "--kv-cache-dtype", dtype]


def size_flags(model: Path, context_length: int, mem_fraction: float, max_total_tokens: int, max_running: int) -> list:
    return [
        *("--model-path", model, "--context-length", context_length, "--max-total-tokens", max_total_tokens),
        # Free memory is the whole GPU's, the other server's use subtracted: high, so that --max-total-tokens decides.
        *("--mem-fraction-static", mem_fraction),
        *("--max-running-requests", max(16, max_running)),
    ]


def total_tokens(requests: list[tuple[int, int]], output_tokens: int) -> int:
    """Of a KV pool that holds twice as many such requests. requests: (how many at a time, input tokens of each)."""
    return max(65_536, *(2 * batch * (length + output_tokens + 256) for batch, length in requests))


def environment(
    plugin: bool, site: str = "", probe: Path | None = None, dense_prefill: bool = False, loader: bool = True
) -> dict[str, str]:
    """Of a server process. site: PYTHONPATH entries with sglang and the plugin; empty: this environment's.

    probe: the folder that `write_probe` made, for a server whose refreshes are timed. dense_prefill: dense attention for
    short prefills, as is sglang's default; it needs FlashAttention 3. loader: whether this sglang loads plugins by itself.
    """
    own = {name: value for name, value in os.environ.items() if name not in (GATE, GATE_DSA, REQUIRED)}
    path = [str(Path(entry).resolve()) for entry in (site or own.get("PYTHONPATH", "")).split(os.pathsep) if entry]
    plugins = ["nsa_fused"] * plugin + ["server_probe"] * (probe is not None) or ["none"]  # an empty list would let all load
    path = [*([str(probe)] if probe else []), *path]
    own |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", ALLOWLIST: ",".join(plugins)}
    own.setdefault("CUDA_HOME", "/usr/local/cuda")
    # With several ranks sglang refuses GPUs whose free memory differs, as it does while the other server loads.
    own.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
    if not dense_prefill:
        own |= {f"SGLANG_{name}_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0" for name in ("NSA", "DSA")}
    if plugin and not loader:
        own[EXTERNAL] = EXTERNAL_PACKAGE
    return own | ({GATE: "1", REQUIRED: "1"} if plugin else {})


def machine(site: str = "") -> dict:
    """What servers will run on, asked in their environment: "gpu", None without one; "sglang" and "torch", their versions;
    "loader", whether that sglang loads plugins by itself. Raises Failed where torch or sglang is missing."""
    code = (
        "import importlib.metadata, importlib.util, json, os, torch; sglang = importlib.metadata.version('sglang');"
        "folder = list(importlib.util.find_spec('sglang').submodule_search_locations)[0];"
        f"loader = os.path.exists(os.path.join(folder, {LOADER!r}));"
        "gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None;"
        "print(json.dumps([gpu, sglang, torch.__version__, loader]))"
    )
    # Not in the working directory: a folder of that name there would be taken for sglang.
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(False, site), cwd="/", capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise Failed(f"torch and sglang are not both installed: {why}")
    return dict(zip(("gpu", "sglang", "torch", "loader"), json.loads(done.stdout.splitlines()[-1])))


def write_probe(folder: Path) -> None:
    """A distribution that importlib.metadata finds on PYTHONPATH."""
    info = folder / "server_probe-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: server_probe\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nserver_probe = server_probe:activate\n")
    shutil.copy(HERE / "probe.py", folder / "server_probe.py")


@contextlib.contextmanager
def uninterrupted():
    """Holds Ctrl-C and its like back to the end of the block. Child processes inherit no handler, as they would a mask."""
    came = []
    before = {number: signal.signal(number, lambda *_: came.append(1)) for number in ENDING if not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def is_ignored(number: int) -> bool:
    """Under nohup a closed terminal is; a shell's background job has Ctrl-C ignored, and that counts all the same."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def interrupt_on_signals() -> None:
    """Whoever ends this process, or closes its terminal, ends it as Ctrl-C does, so that no server is left."""
    for number in ENDING:
        if not is_ignored(number):
            signal.signal(number, interrupt)


def interrupt(*_):
    raise KeyboardInterrupt


def wait_ready(servers: list[Server], deadline: float) -> None:
    while not all([server.is_ready() for server in servers]):  # noqa: C419 - every one is asked
        if time.monotonic() > deadline:
            late = next(server for server in servers if server.ready_seconds is None)
            raise Failed(f"{late.name}: the server was not ready in time{late.tail()}")
        time.sleep(0.2)


def start(servers: list[Server], seconds: float, together: bool = True) -> None:
    """Raises Failed, also where they are not ready after `seconds`."""
    check_ports(servers)
    deadline = time.monotonic() + seconds
    for group in [servers] if together else [[server] for server in servers]:
        for server in group:
            server.start()
        wait_ready(group, deadline)


def check_ports(servers: list[Server]) -> None:
    for port in (port for server in servers for port in (server.port, server.port + 1)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise Failed(f"port {port} is taken: give another --port") from error


def stop(servers: list[Server], memory_before: float) -> None:
    """memory_before: in use on the GPU before they were started, infinite where nothing waits for it to be given back."""
    started = [server.process for server in servers if server.process]
    with uninterrupted():
        for number, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, 30)):
            for pid in session_members(started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if wait(lambda: not session_members(started), seconds):
                break
        else:
            print(f"servers that cannot be stopped: {session_members(started)}", file=sys.stderr)
        if started and not wait(lambda: gpu_memory_mib() < memory_before + 1024, 60):
            print("the GPU's memory is still in use after the servers were stopped", file=sys.stderr)


def session_members(leaders: list[subprocess.Popen]) -> list[int]:
    """Ids of the live processes that these started; children may outlive their leader."""
    for leader in leaders:
        leader.poll()
    sessions, members = {leader.pid for leader in leaders}, []
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


def gpu_memory_mib(gpu: str | None = None) -> float:
    """In use on the GPU by all processes; 0 where nvidia-smi is missing. gpu: its name; None: this process's first."""
    gpu = gpu or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
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


def nvidia_smi(*query: str) -> str:
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
