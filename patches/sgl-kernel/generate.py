"""Writes csrc/attention/fused_metadata_copy.cu: the wrapper with the kernel's headers put in their places."""

import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WRAPPER = HERE / "fused_metadata_copy_wrapper.cu"
OUTPUT = HERE / "csrc/attention/fused_metadata_copy.cu"
HEADER = """\
// SPDX-License-Identifier: Apache-2.0
// Generated from the sources of sglang-nsa-fused by its patches/sgl-kernel/generate.py; do not edit.
"""


def inline(path: Path, seen: set) -> str:
    """The text of a file, each local include replaced by the text of that file, the first time it is met."""
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text().replace("#pragma once\n", "")
    include = re.compile(r'^#include "(.+)"\n', re.M)
    text = include.sub(lambda match: inline((path.parent / match[1]).resolve(), seen), text)
    return re.sub(r"\n{3,}", "\n\n", text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the output is stale")
    check = parser.parse_args().check
    text = HEADER + inline(WRAPPER, set()).rstrip() + "\n"
    if not check:
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.write_text(text)
    elif not OUTPUT.exists() or OUTPUT.read_text() != text:
        sys.exit(f"{OUTPUT}: stale; run {Path(__file__).name}")


if __name__ == "__main__":
    main()
