"""Modes of a server besides the plain one, plugin off and on.

A mode that this sglang, or this machine, refuses without the plugin is skipped with what sglang says.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import serving
from serving import Configuration, Request, answers, check_same, console, prompt
from test_two_gpus import PARALLEL, TWO_GPUS, test_joining_and_leaving  # noqa: F401 - the test is of this module's pairs

from sglang_nsa_fused.tools.bench import servers
from sglang_nsa_fused.tools.bench.process import Failed


@dataclass(frozen=True)
class Mode:
    flags: tuple = ()
    env: tuple[tuple[str, str], ...] = ()
    gpus: int = 1
    says: str = " active"  # what must be in the log
    graphs: bool = True  # whether draft steps have one, where the probe sees their tokens
    repeats: bool = True  # whether one call is reproducible without the plugin
    model: Path = servers.HERE / "model"
    then: Callable | None = None  # what is done to a server before the call is made again


def release_and_resume(server, _) -> None:
    """The memory of the cache and of the graphs, which is zero afterwards; weights would have to be loaded again."""
    server.post("/flush_cache?timeout=30", {})
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        server.post(path, {"tags": ["kv_cache", "cuda_graph"]})


def other_weights(server, folder: Path) -> None:
    """Some come from disk while requests are under way, and the graphs are captured anew."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((servers.HERE / "model" / "config.json").read_text())
    scale = torch.linspace(0.5, 1.5, 7168, dtype=torch.bfloat16)
    save_file({"model.layers.0.input_layernorm.weight": scale}, folder / "model.safetensors", {"format": "pt"})
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(serving.send, server, [Request(prompt(("load", n), 300), 400) for n in range(6)])
        body = {"model_path": str(folder), "load_format": "auto", "recapture_cuda_graph": True, "flush_cache": False}
        said = json.loads(server.post("/update_weights_from_disk", body))
        assert said["success"], said["message"]
        loaded.result()


def hidden_states(server, _) -> None:
    """Graphs of another hidden-state mode."""
    replies = server.generate([list(prompt("hidden", length)) for length in (5, 70)], 16, return_hidden_states=True)
    assert all(reply["meta_info"]["hidden_states"] for reply in replies)


MODES = {
    "glm-index-share": Mode(model=Path(__file__).parent / "glm"),
    "adaptive": Mode(
        ("--speculative-adaptive", "--speculative-num-steps", 3, "--speculative-num-draft-tokens", 4), repeats=False
    ),
    "glue-graph": Mode(env=(("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1"),)),
    "breakable": Mode(("--cuda-graph-backend-decode", "breakable")),
    "memory-saver": Mode(("--enable-memory-saver",), (("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "1"),), then=release_and_resume),
    "hidden-states": Mode(("--enable-return-hidden-states",), then=hidden_states),
    "weights": Mode(then=other_weights),
    "poisoned": Mode(env=(("SERVER_PROBE_POISON", "1"),)),
    "no-graph": Mode(("--disable-cuda-graph",), says="draft extend without a graph is sglang's own", graphs=False),
    "no-overlap": Mode(("--disable-overlap-schedule",)),
    "topk-2": Mode(("--speculative-eagle-topk", 2, "--speculative-num-draft-tokens", 8)),
    "two-batch": Mode((*PARALLEL["tp2-dp2"], "--enable-two-batch-overlap"), gpus=2, repeats=False),
    "context-parallel": Mode((*TWO_GPUS, "--dcp-size", 2), gpus=2),
}


@pytest.fixture(scope="module", params=MODES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def mode(name, options) -> Mode:
    found = MODES[name]
    if options.gpus < found.gpus:
        pytest.skip(f"needs {found.gpus} GPUs")
    return found


@pytest.fixture(scope="module")
def pair(configuration, name, mode, options):
    configuration = Configuration.of(
        configuration.cache, configuration.draft_steps, f"-{name}", mode.flags, env=mode.env, model=mode.model
    )
    try:
        with serving.running(configuration, options) as pair:
            yield pair
    except Failed as error:
        if str(error).startswith(f"{configuration.name}-off: the server ended"):
            pytest.skip(f"sglang itself does not start: {serving.exception(error)}")
        raise


def test_log_lines(pair, mode):
    assert pair.off.plugin_lines() == []
    lines = re.findall(r"sglang-nsa-fused.*", pair.on.log_from(0))
    console.print("  " + "\n  ".join(lines))
    assert sum(mode.says in line for line in lines) == mode.gpus, f"expected {mode.says!r} once for each rank"


def test_one_call(pair, mode, options):
    def compare():
        serving.check_call(pair)
        if mode.graphs:
            serving.check_drafts(pair)

    if not mode.repeats:
        pytest.skip("one call is not the same twice without the plugin either")
    compare()
    if mode.then:
        for server in pair:
            mode.then(server, options.log_dir / "weights")
        compare()


def test_chunks_and_large_batches(pair):
    """Prompts of several chunks while others decode, in batches above the largest graph."""
    requests = [Request(prompt(("modes", number), 1 + 211 * number % 2600), 32) for number in range(serving.RUNNING - 2)]
    check_same(pair, requests, *answers(list(pair), requests))
