"""Applies sgl-kernel.patch to any sgl-kernel tree: finds the places by what stands before them, not by line number."""

import argparse
import re
import sys
from pathlib import Path

import generate  # beside this file

HERE = Path(__file__).resolve().parent
AFTER = {
    "CMakeLists.txt": r'^ *"csrc/attention/cutlass_mla_kernel\.cu"\n',
    "csrc/common_extension.cc": r'^ *m\.def\("cutlass_mla_get_workspace_size".*;\n',
    "include/sgl_kernel_ops.h": r"^int64_t cutlass_mla_get_workspace_size\((?:.*\n)*?.*\);\n",
    "python/sgl_kernel/__init__.py": r"^( *)from sgl_kernel\.expert_specialization import (?:\([^)]*\)|.*)\n",
}
KERNEL = "csrc/attention/fused_metadata_copy.cu"


def added_lines() -> dict[str, str]:
    """What the patch adds, by file: one hunk each."""
    files = re.split(r"^diff --git .* b/(.*)\n", (HERE / "sgl-kernel.patch").read_text(), flags=re.M)[1:]
    return {path: "".join(re.findall(r"^\+(?!\+\+ )(.*\n)", text, re.M)) for path, text in zip(files[::2], files[1::2])}


def patched(path: Path, added: str, after: str) -> str:
    text = path.read_text()
    places = list(re.finditer(after, text, re.M))
    if "fused_metadata_copy" in text:
        sys.exit(f"{path}: already has fused_metadata_copy; nothing written")
    if len(places) != 1:
        sys.exit(f"{path}: expected one place after {after!r}, found {len(places)}; nothing written")
    indent = places[0][1] if places[0].re.groups else ""
    at = places[0].end()
    return text[:at] + re.sub(r"^", indent, added.rstrip("\n"), flags=re.M) + "\n" + text[at:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="the sgl-kernel folder of an sglang checkout")
    tree = parser.parse_args().tree
    if absent := [path for path in AFTER if not (tree / path).is_file()]:
        sys.exit(f"{tree}: expected an sgl-kernel tree, but {absent[0]} is not there; nothing written")
    new = {
        tree / path: patched(tree / path, text, AFTER[path]) if path in AFTER else text for path, text in added_lines().items()
    }
    for path, text in new.items():
        path.write_text(text)
    (tree / KERNEL).write_text(generate.source())


if __name__ == "__main__":
    main()
