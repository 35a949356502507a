"""Writes the patch of each sglang release without a plugin loader, from its wheel.

    python patches/sglang/generate.py [--check]

Wheels are looked for unpacked in $SGLANG_NSA_FUSED_WHEELS, as tests/releases/matrix.py leaves them, or downloaded.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from sglang_nsa_fused.tools.patch import TARGET, Patch, sha256  # noqa: E402

RELEASES = ("0.5.7", "0.5.8", "0.5.8.post1", "0.5.9", "0.5.10", "0.5.10.post1")
LOADER = """\
    # Added by sglang-nsa-fused: the plugin loader that sglang has from 0.5.11 on.
    from importlib.metadata import entry_points

    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    for plugin in entry_points(group="sglang.srt.plugins"):
        if not allowed or plugin.name in allowed:
            try:
                plugin.load()()
            except Exception:
                logger.exception("Failed to load plugin %s", plugin.name)

"""


def scheduler(release: str) -> bytes:
    cache = Path(os.environ.get("SGLANG_NSA_FUSED_WHEELS") or Path.home() / ".cache/sglang-nsa-fused/wheels")
    for folder in cache.glob(f"{release}-*"):
        return (folder / "sglang" / TARGET).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"sglang=={release}", "-d", folder]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(f"sglang/{TARGET}")


def patch_text(content: bytes) -> bytes:
    """The loader as the first statements of run_scheduler_process."""
    lines = content.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(b"def run_scheduler_process("))
    after = next(number for number in range(start, len(lines)) if lines[number].startswith(b")")) + 1
    added = LOADER.encode().splitlines(keepends=True)
    patched = Patch("", "", after, added).apply(content)
    head = f"unmodified sha256: {sha256(content)}\npatched sha256: {sha256(patched)}\n"
    head += f"--- a/sglang/{TARGET}\n+++ b/sglang/{TARGET}\n@@ -{after},0 +{after + 1},{len(added)} @@\n"
    return head.encode() + b"".join(b"+" + line for line in added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a patch is stale")
    check = parser.parse_args().check
    for release in RELEASES:
        path, text = HERE / f"{release}-plugin-loader.patch", patch_text(scheduler(release))
        if not check:
            path.write_bytes(text)
        elif not path.exists() or path.read_bytes() != text:
            sys.exit(f"{path}: stale; run {Path(__file__).name}")


if __name__ == "__main__":
    main()
