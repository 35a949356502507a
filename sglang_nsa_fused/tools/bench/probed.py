"""A server with the probe in it, and what the probe has written."""

import contextlib
import json
import time
from pathlib import Path
from typing import Iterator

from sglang_nsa_fused.tools.bench import servers

SETTLE_SECONDS = 1.5  # the probe looks and writes each half second


def settle() -> None:
    time.sleep(SETTLE_SECONDS)


@contextlib.contextmanager
def observed(*up: "Probed") -> Iterator[None]:
    """Their probes keep draft tokens and time the draft graph, at the price of a sync and a delay in each step. All of it is
    written when this ends."""
    for server in up:
        server.observe_file.touch()
    try:
        settle()
        yield
        settle()
    finally:
        for server in up:
            server.observe_file.unlink(missing_ok=True)


class Probed(servers.Server):
    """As `servers.Server`; env: of `servers.environment` with a probe. Its samples lie beside its log."""

    def __init__(self, name: str, port: int, flags: list, env: dict[str, str], folder: Path, command: str = servers.COMMAND):
        self.samples_file = folder / f"{name}-samples.jsonl"
        self.observe_file = Path(f"{self.samples_file}.observe")
        self.upstream_file = Path(f"{self.samples_file}.upstream")
        super().__init__(name, port, flags, env | {"SERVER_PROBE_FILE": str(self.samples_file)}, folder, command)

    def start(self) -> None:
        self.samples_file.write_text("")
        super().start()

    def samples(self) -> list[dict]:
        """All so far; see probe.py."""
        lines = self.samples_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written

    def drafts(self, start: int, end: int) -> list:
        """The draft tokens of each request and step, in any order: requests may be batched in another one. start, end:
        nanoseconds of perf_counter."""
        return sorted(row for sample in self.samples() if start <= sample["at"] <= end for row in sample.get("drafts", []))
