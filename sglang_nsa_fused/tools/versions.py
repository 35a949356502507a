"""What the tools know of a version of sglang besides releases.py, for backends without a model and without a server."""

import functools
import re
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Version:
    packages: frozenset[str]  # that only a GPU machine has and that the import of upstream's module wants all the same
    attributes: frozenset[str]  # what the metadata path reads from a step backend, besides the names that the Release has
    spare_step: bool  # whether a multi-step backend has as many step backends as draft steps, and not one less
    lengths: torch.dtype  # of the graph runners' buffers
    host_lengths: bool  # whether a replay must get the lengths on the host too
    small_plans: bool  # whether a GPU's planner of the top-k writes something for 30 rows and less


_FIRST = Version(
    packages=frozenset({"sgl_kernel", "vllm"}),
    attributes=frozenset({"device", "max_context_len", "enable_auto_select_prefill_impl", "num_q_heads", "_arange_buf"}),
    spare_step=True,
    lengths=torch.int32,
    host_lengths=True,
    small_plans=True,
)
# Version -> what is otherwise from it on: fields, and attributes that come and go.
_CHANGES: dict[str, tuple[dict, set[str], set[str]]] = {
    "0.5.8": ({"packages": frozenset({"sgl_kernel"})}, set(), set()),
    "0.5.9": ({"spare_step": False}, {"_force_attn_forward_mla"}, set()),
    "0.5.10": ({}, set(), {"_force_attn_forward_mla"}),
    "0.5.11": ({"packages": frozenset()}, set(), set()),
    "0.5.13": ({}, {"hisparse_coordinator", "token_to_kv_pool", "req_to_token_pool"}, set()),
    "0.5.14": ({"lengths": torch.int64}, set(), set()),
    "0.5.15": ({"packages": frozenset({"cutlass", "cuda"}), "host_lengths": False}, set(), {"max_context_len"}),
    "0.5.15.post1": ({"packages": frozenset()}, {"use_fused_topk"}, set()),
    "0.5.17": ({}, {"dsa_topk_backend"}, set()),
    "0.5.19": ({}, {"supports_mha_one_shot"}, set()),
    "0.5.20": (
        {},
        {"_get_device_sm", "_is_blackwell", "_is_in_breakable_cuda_graph", "_is_in_tc_piecewise_cuda_graph"},
        set(),
    ),
    "0.5.21": ({"small_plans": False}, {"_memory_saver_adapter", "_multi_ctas_kv_counter_buffer"}, set()),
    "0.5.22": ({}, {"num_dcp_q_heads"}, set()),
}


@functools.lru_cache(None)
def of(version: str) -> Version:
    found = _FIRST
    for since, (changes, come, go) in _CHANGES.items():
        if _numbers(since) <= _numbers(version):
            found = replace(found, **changes, attributes=found.attributes - go | come)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 5, 12, 1) of 0.5.12.post1 and of 0.5.12.post1+cu129."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))
