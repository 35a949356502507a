"""The two sides of a comparison: servers that are started here, and running ones."""

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import ContextManager, Iterable

from sglang_nsa_fused.tools.bench import servers
from sglang_nsa_fused.tools.bench.probed import Probed, observed, settle
from sglang_nsa_fused.tools.bench.record import OURS, SIDES, UPSTREAM
from sglang_nsa_fused.tools.bench.servers import Failed

LABELS = {UPSTREAM: "off", OURS: "on"}
GRAPH = "draft graph"  # seen while observed alone
# The probe's kind of sample -> (part of a case, metric).
KINDS = {
    "draft": ("draft", "host_us"),
    "verify": ("verify", "host_us"),
    "extend": ("extend", "host_us"),
    GRAPH: ("", "gpu_draft_us"),
}


def server_info(target) -> dict:
    """What a server says of itself, its "version" and arguments among it; empty where it does not. Raises Failed."""
    try:
        with urllib.request.urlopen(f"{target.url}/server_info", timeout=30) as reply:
            return json.load(reply)
    except urllib.error.HTTPError:
        return {}
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise target.failure(error) from error


class Attached:
    """A server that runs already. url: without a slash at the end."""

    probed = False
    mark = 0

    def __init__(self, side: str, url: str):
        self.side, self.url = side, url

    def samples(self) -> list[dict]:
        return []

    def prefills(self, mark: int) -> tuple:
        return ()  # its log is not at hand

    def check(self) -> None:
        pass

    def failure(self, error: Exception) -> Failed:
        return Failed(f"{LABELS[self.side]}: no answer from {self.url}: {servers.said(error)}; is it up?")


class Launched(Probed):
    def __init__(self, side: str, name: str, port: int, setup: "Setup"):
        self.side, self.probed = side, setup.loader
        super().__init__(name, port, list(setup.flags), setup.environment(side), setup.folder, setup.command)

    def check(self) -> None:
        """Raises Failed where the plugin's line does not agree with the side."""
        lines = self.plugin_lines()
        if self.side == OURS and not lines:
            raise Failed(
                f"{self.name}: the plugin is not active: its line is not in the log; see `sglang-nsa-fused doctor`{self.tail()}"
            )
        if self.side == UPSTREAM and lines:
            raise Failed(f"{self.name}: the plugin is active, and must not be: {lines[0]}{self.tail()}")


@dataclass(frozen=True)
class Setup:
    """How the servers of both sides are started."""

    folder: Path  # of their logs
    flags: tuple  # besides the ports
    port: int
    loader: bool  # whether this sglang loads plugins by itself; the probe is one
    dense_prefill: bool
    accept_length: float | None = None  # simulated by sglang's own switch
    command: str = servers.COMMAND

    def environment(self, side: str) -> dict[str, str]:
        probe = self.folder / "probe" if self.loader else None
        env = servers.environment(side == OURS, probe=probe, dense_prefill=self.dense_prefill, loader=self.loader)
        return env | ({"SGLANG_SIMULATE_ACC_LEN": str(self.accept_length)} if self.accept_length else {})

    def server(self, side: str, number: int | None = None) -> Launched:
        """number: of its start, where there are several."""
        name = LABELS[side] if number is None else f"{LABELS[side]}-{number + 1}"
        return Launched(side, name, self.port + servers.PORTS_APART * SIDES.index(side), self)


def settled(target) -> None:
    """What the probe of this side has seen so far is written, where it has one."""
    if target.probed:
        settle()


def observing(target) -> ContextManager[None]:
    return observed(target) if target.probed else contextlib.nullcontext()


def full_batches(samples: list[dict], run, bs: int) -> list[dict]:
    """What was sampled of them within this run: while requests come and go there are others. run: with start and
    end, nanoseconds of perf_counter."""
    return [sample for sample in samples if run.start <= sample["at"] <= run.end and sample.get("bs", 0) >= bs]


def refreshes(samples: list[dict], runs: Iterable, bs: int) -> dict[str, list[float]]:
    """Kind -> microseconds, of full batches within these runs."""
    found = {kind: [] for kind in KINDS}
    for run in runs:
        for sample in full_batches(samples, run, bs):
            if sample["kind"] in found:
                found[sample["kind"]].append(sample["ns"] / 1e3)
    return found


def table_bytes(samples: list[dict]) -> int | None:
    """That the graphs hold, of the scheduler process that holds most."""
    return max((sample["table_bytes"] for sample in samples if "table_bytes" in sample), default=None)
