"""Every environment variable that the plugin reads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

GATE = "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA"
GATE_DSA = "SGLANG_DSA_ENABLE_MTP_PRECOMPUTE_METADATA"  # its name from sglang 0.5.13 on
REQUIRED = "SGLANG_NSA_FUSED_REQUIRED"
VERIFY = "SGLANG_NSA_FUSED_VERIFY"
KEEP_WIDE_TABLE = "SGLANG_NSA_FUSED_KEEP_WIDE_TABLE"
KEEP_CHUNKS = "SGLANG_NSA_FUSED_KEEP_CHUNKS"
BEFORE_GRAPH = "SGLANG_NSA_FUSED_BEFORE_GRAPH"
ALLOWLIST = "SGLANG_PLUGINS"
EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"
EXTERNAL_PACKAGE = "sglang_nsa_fused.external"

_TRUE = ("true", "1", "yes", "y")  # as sglang's EnvBool
_FALSE = ("false", "0", "no", "n", "")


@dataclass(frozen=True)
class Settings:
    enabled: bool  # either name of the gate is set to a true value
    required: bool  # what would be a warning ends the process
    allowlist: tuple[str, ...] | None  # the only plugins that sglang loads; None: all
    external: bool = False  # sglang's model registry loads the plugin
    verify: bool = False  # each replay is compared with the reference
    keep_wide_table: bool = False  # for code of the user's that reads page_table_1
    keep_chunks: bool = False  # DeepGEMM gets as many rows at a time as there are SMs
    before_graph: bool = False  # each launch comes before its graph, none is a node of it

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Raises ValueError, naming the variable, for a value that is neither true nor false."""
        names = tuple(name.strip() for name in env.get(ALLOWLIST, "").split(",") if name.strip())
        return cls(
            enabled=any([_flag(env, GATE), _flag(env, GATE_DSA)]),
            required=_flag(env, REQUIRED),
            allowlist=names or None,
            external=env.get(EXTERNAL) == EXTERNAL_PACKAGE,
            verify=_flag(env, VERIFY),
            keep_wide_table=_flag(env, KEEP_WIDE_TABLE),
            keep_chunks=_flag(env, KEEP_CHUNKS),
            before_graph=_flag(env, BEFORE_GRAPH),
        )


def is_required(env: Mapping[str, str] = os.environ) -> bool:
    return env.get(REQUIRED, "").lower() in _TRUE


def _flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "").lower()
    if value not in _TRUE + _FALSE:
        raise ValueError(f"{name}: expected one of {', '.join(_TRUE)} or {', '.join(_FALSE[:-1])}, got {value!r}")
    return value in _TRUE
