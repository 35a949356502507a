"""Writes csrc/attention/fused_metadata_copy.cu: the wrapper with the kernel's headers put in their places."""

import re
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


def source() -> str:
    return HEADER + inline(WRAPPER, set()).rstrip() + "\n"


def write() -> Path:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(source())
    return OUTPUT


if __name__ == "__main__":
    print(write())
