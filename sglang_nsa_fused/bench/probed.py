"""A server with the probe in it, and what the probe has written."""

import json
from pathlib import Path

from sglang_nsa_fused.bench import servers

SETTLE_SECONDS = 1.5  # the probe looks and writes each half second


class Probed(servers.Server):
    """As `servers.Server`; env: of `servers.environment` with a probe. Its samples lie beside its log."""

    def __init__(self, name: str, port: int, flags: list, env: dict[str, str], folder: Path, command: str = servers.COMMAND):
        self.samples_file = folder / f"{name}-samples.jsonl"
        super().__init__(name, port, flags, env | {"SERVER_PROBE_FILE": str(self.samples_file)}, folder, command)

    def start(self) -> None:
        self.samples_file.write_text("")
        super().start()

    def samples(self) -> list[dict]:
        """All so far; see probe.py."""
        lines = self.samples_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written

    def keep_drafts(self, keep: bool) -> None:
        """Has the probe keep draft tokens, at the price of a sync each step."""
        flag = Path(f"{self.samples_file}.drafts")
        flag.touch() if keep else flag.unlink(missing_ok=True)

    def drafts(self, start: int, end: int) -> list:
        """The draft tokens of each request and step, in any order: requests may be batched in another one. start, end:
        nanoseconds of perf_counter."""
        return sorted(row for sample in self.samples() if start <= sample["at"] <= end for row in sample.get("drafts", []))
