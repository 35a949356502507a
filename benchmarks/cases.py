"""The names of cases in result files, read back."""

import re
from dataclasses import dataclass, replace

from sglang_nsa_fused.tools.bench.small_model import LAYERS

NAME = re.compile(
    r"(?:(?P<kind>draft|verify|extend)-)?n(?P<draft_steps>\d+)-bs(?P<batch>\d+)-len(?P<length>\d+)(?:-width(?P<width>\d+))?"
    r"(?:-(?P<cache>bf16|fp8|flashmla))?(?P<in_graph>-graph)?(?:-layers(?P<layers>\d+))?(?P<one_core>-1core)?"
    r"(?:-(?P<refresh>draft|verify|extend))?"
)


@dataclass(frozen=True, order=True)
class Case:
    """What a name says, in the order in which cases are listed. kind: of refresh, measured alone, or "" for a server's."""

    kind: str
    draft_steps: int
    cache: str
    layers: int
    in_graph: bool  # the plugin's launch is a node of the graph
    one_core: bool
    width: int  # of the tables that a refresh writes; 0 for a server's, and in names from before it varied
    length: int
    batch: int
    refresh: str  # of which a server's case is the host time

    def but(self, **other) -> "Case":
        return replace(self, **other)


def parse(name: str) -> Case:
    """Raises ValueError."""
    if not (found := NAME.fullmatch(name)):
        raise ValueError(f"{name}: not a case of benchmarks.replay or benchmarks.server")
    number = {key: int(found[key]) for key in ("draft_steps", "batch", "length")}
    text = {key: found[key] or "" for key in ("kind", "cache", "refresh")}
    flags = {flag: bool(found[flag]) for flag in ("in_graph", "one_core")}
    return Case(**number, **text, **flags, layers=int(found["layers"] or LAYERS), width=int(found["width"] or 0))
