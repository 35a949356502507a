"""The plugin loader for sglang releases that have none, put into their scheduler.py and taken out again."""

import hashlib
import importlib.util
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

TARGET = "srt/managers/scheduler.py"
LOADER = "srt/plugins/__init__.py"  # upstream's own, from 0.5.11 on
_HUNK = re.compile(r"^@@ -(\d+),0 \+\d+,(\d+) @@$")


class Refused(Exception):
    """Why nothing was changed; the text says what to do."""


class Patch(NamedTuple):
    unmodified: str  # sha256 of the file it is made for
    patched: str  # and of the result
    after: int  # the line behind which the lines come
    lines: list[bytes]

    @classmethod
    def parse(cls, text: bytes) -> "Patch":
        """A unified diff of one hunk that only adds, with both sums in the lines before it."""
        lines = text.splitlines(keepends=True)
        at = next(number for number, line in enumerate(lines) if line.startswith(b"@@"))
        sums = dict(line.decode().split(" sha256: ") for line in lines[:at] if b" sha256: " in line)
        after, count = map(int, _HUNK.match(lines[at].decode().rstrip()).groups())
        added = [line[1:] for line in lines[at + 1 :] if line.startswith(b"+")]
        if len(added) != count or len(lines) != at + 1 + count:
            raise ValueError(f"expected {count} added lines and nothing else, got {len(added)}")
        return cls(sums["unmodified"].strip(), sums["patched"].strip(), after, added)

    def apply(self, content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        return b"".join([*lines[: self.after], *self.lines, *lines[self.after :]])

    def revert(self, content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        return b"".join([*lines[: self.after], *lines[self.after + len(self.lines) :]])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Installed:
    """The installed sglang, found without importing it. Raises Refused."""

    def __init__(self):
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            raise Refused("sglang is not installed in this environment")
        self.folder = Path(list(spec.submodule_search_locations)[0])
        self.version = metadata.version("sglang").partition("+")[0]
        self.has_loader = (self.folder / LOADER).exists()
        self.file = self.folder / TARGET

    def patch(self) -> Patch:
        """Raises Refused where there is none for this release."""
        for folder in (Path(__file__).parents[1] / "patches", Path(__file__).parents[2] / "patches/sglang"):
            path = folder / f"{self.version}-plugin-loader.patch"
            if path.exists():
                return Patch.parse(path.read_bytes())
        raise Refused(f"sglang {self.version} has no plugin loader, and there is no patch for it")

    def state(self) -> str:
        """loader (upstream's own), patched, unpatched or modified. Raises Refused."""
        if self.has_loader:
            return "loader"
        patch = self.patch()
        if not self.file.is_file():
            raise Refused(f"{self.file} is missing; reinstall sglang")
        found = sha256(self.file.read_bytes())
        return {patch.unmodified: "unpatched", patch.patched: "patched"}.get(found, "modified")

    def change(self, apply: bool) -> str:
        """Applies or reverts, and says what came of it. Raises Refused; then the file is as it was."""
        state = self.state()
        if state == "loader":
            return f"sglang {self.version} loads plugins by itself: nothing to do"
        if state == "modified":
            raise Refused(f"{self.file} is neither sglang {self.version}'s nor our patched one; reinstall sglang first")
        if state == ("patched" if apply else "unpatched"):
            return f"{self.file} is {state}: nothing to do"
        patch, content = self.patch(), self.file.read_bytes()
        changed = (patch.apply if apply else patch.revert)(content)
        if sha256(changed) != (patch.patched if apply else patch.unmodified):
            raise Refused(f"{self.file} would not become what it should; please report this")
        self._replace(changed)
        return f"{'patched' if apply else 'restored'} {self.file}"

    def _replace(self, content: bytes) -> None:
        """In one step, so that no reader and no crash meets half a file."""
        try:
            handle, name = tempfile.mkstemp(dir=self.file.parent, prefix=".scheduler-")
        except OSError as error:
            raise Refused(f"{self.file.parent} cannot be written: {error.strerror}") from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, self.file.stat().st_mode)
            os.replace(name, self.file)
        except BaseException:
            os.unlink(name)
            raise
