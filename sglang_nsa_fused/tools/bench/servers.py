"""What sglang servers are started with: flags, environment, and the probe; and what they run on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sglang_nsa_fused import releases
from sglang_nsa_fused.releases import Release
from sglang_nsa_fused.settings import ALLOWLIST, EXTERNAL, EXTERNAL_PACKAGE, GATE, GATE_DSA, REQUIRED
from sglang_nsa_fused.tools.bench.process import Failed
from sglang_nsa_fused.tools.patch import LOADER

HERE = Path(__file__).resolve().parent
# NSA (DSA) backend and cache dtype of each kind of cache.
CACHES = {"bf16": ("flashmla_sparse", "bfloat16"), "fp8": ("flashmla_kv", "fp8_e4m3")}
NO_GPU = "no GPU: torch.cuda.is_available() is False; on a CPU there is `sglang-nsa-fused demo`"


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


def size_flags(model: str | Path, context_length: int, max_running: int, mem_fraction: float = 0.9) -> list:
    """mem_fraction: high, so that --max-total-tokens decides where it is given."""
    return [
        *("--model-path", model, "--context-length", context_length),
        *("--mem-fraction-static", mem_fraction, "--max-running-requests", max_running),
    ]


def total_tokens(requests: list[tuple[int, int]], output_tokens: int) -> int:
    """Of a KV pool that holds twice as many such requests. requests: (how many at a time, input tokens of each)."""
    return max(65_536, *(2 * batch * (length + output_tokens + 256) for batch, length in requests))


def environment(plugin: bool, probe: Path | None = None, real: bool = False, loader: bool = True) -> dict[str, str]:
    """Of a server process. probe: the folder that `write_probe` made, for a server whose refreshes are timed. real: a model of
    the user's, with all that sglang chooses for it. loader: whether this sglang loads plugins by itself; the probe is one."""
    own = {name: value for name, value in os.environ.items() if name not in (GATE, GATE_DSA, REQUIRED)}
    probe = probe if loader else None
    path = [str(Path(entry).resolve()) for entry in own.get("PYTHONPATH", "").split(os.pathsep) if entry]
    plugins = ["nsa_fused"] * plugin + ["server_probe"] * (probe is not None) or ["none"]  # an empty list would let all load
    path = [*([str(probe)] if probe else []), *path]
    own |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", ALLOWLIST: ",".join(plugins)}
    own.setdefault("CUDA_HOME", "/usr/local/cuda")
    # With several ranks sglang refuses GPUs whose free memory differs, as it does while another server loads.
    own.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
    if not real:
        # Dense attention for short prefills needs FlashAttention 3.
        own |= {f"SGLANG_{name}_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0" for name in ("NSA", "DSA")}
        own |= {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # random weights know no longest context
    if plugin and not loader:
        own[EXTERNAL] = EXTERNAL_PACKAGE
    return own | ({GATE: "1", REQUIRED: "1"} if plugin else {})


def machine() -> tuple[dict, Release, bool]:
    """What servers will run on, asked in their environment: "gpu", "sglang" and "torch"; the release; whether that sglang loads
    plugins by itself. Raises Failed where they would not run."""
    code = (
        "import importlib.metadata, importlib.util, json, os, torch; sglang = importlib.metadata.version('sglang');"
        "folder = list(importlib.util.find_spec('sglang').submodule_search_locations)[0];"
        f"loader = os.path.exists(os.path.join(folder, {LOADER!r}));"
        "gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None;"
        "print(json.dumps([gpu, sglang, torch.__version__, loader]))"
    )
    # Not in the working directory: a folder of that name there would be taken for sglang.
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(False), cwd="/", capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"torch and sglang are not both installed: {done.stderr.strip().rpartition(chr(10))[2]}")
    gpu, sglang, torch, loader = json.loads(done.stdout.splitlines()[-1])
    if gpu is None:
        raise Failed(NO_GPU)
    if (release := releases.find(sglang) or releases.newest(sglang)) is None:
        raise Failed(f"sglang {sglang} is not supported; supported are {releases.supported_versions()}")
    return {"gpu": gpu, "sglang": sglang, "torch": torch}, release, loader


def write_probe(folder: Path) -> None:
    """A distribution that importlib.metadata finds on PYTHONPATH."""
    info = folder / "server_probe-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: server_probe\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nserver_probe = server_probe:activate\n")
    shutil.copy(HERE / "probe.py", folder / "server_probe.py")
