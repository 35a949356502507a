"""patches/sgl-kernel: its generated source follows csrc/, and it adds lines only."""

import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PATCH = Path(__file__).parents[2] / "patches/sgl-kernel"


SOURCE = runpy.run_path(str(PATCH / "generate.py"))["source"]()
# Of the source that last ran on a GPU, but for white space.
SHA256 = "22787c7c665a2e40bb13e93a82d307fdf5a803dc9bd299eb459398ea93455475"


def test_the_generated_source_is_the_one_that_ran():
    """A change of the kernel or the wrapper: run tests/gpu/test_sgl_kernel_form.py on a GPU, then put the new hash here."""
    assert hashlib.sha256(SOURCE.encode()).hexdigest() == SHA256


def test_the_patch_has_added_lines_alone():
    lines = (PATCH / "sgl-kernel.patch").read_text().splitlines()
    assert any(line.startswith("+") for line in lines)
    for line in lines:
        assert not line.startswith(" ") and not (line.startswith("-") and not line.startswith("--- ")), line
        assert not line.startswith("@@") or line.endswith("@@"), line


# What apply.py looks for in a tree, each between other lines.
TREE = {
    "CMakeLists.txt": 'set(SOURCES\n    "csrc/attention/cutlass_mla_kernel.cu"\n    "csrc/other.cu"\n)\n',
    "csrc/common_extension.cc": '  m.def("cutlass_mla_get_workspace_size", &size);\n  m.def("other");\n',
    "include/sgl_kernel_ops.h": "int64_t cutlass_mla_get_workspace_size(\n    int64_t max_seq_len,\n    int64_t bs);\n"
    "void other();\n",
    "python/sgl_kernel/__init__.py": "if True:\n    from sgl_kernel.expert_specialization import (\n        one,\n    )\n"
    "    other = 1\n",
    "csrc/attention/other.cu": "",
    "python/sgl_kernel/other.py": "",
}


def apply(tree: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, PATCH / "apply.py", tree], capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path) -> Path:
    for path, text in TREE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def read(tree: Path) -> dict[str, str]:
    return {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*") if path.is_file()}


def test_it_is_applied_where_the_lines_before_are(tree):
    result = apply(tree)
    assert result.returncode == 0, result.stderr
    found = read(tree)
    for path, before in TREE.items():
        kept = iter(found[path].splitlines())
        assert all(line in kept for line in before.splitlines()), path  # in their order
    assert '    "csrc/attention/cutlass_mla_kernel.cu"\n    "csrc/attention/fused_metadata_copy.cu"\n' in found["CMakeLists.txt"]
    assert found["csrc/attention/fused_metadata_copy.cu"] == SOURCE
    init = found["python/sgl_kernel/__init__.py"]
    compile(init, "__init__.py", "exec")
    assert "\n    )\n    from sgl_kernel" in init and init.endswith("    other = 1\n")
    again = apply(tree)
    assert again.returncode == 1 and "already has fused_metadata_copy; nothing written" in again.stderr
    assert read(tree) == found


@pytest.mark.parametrize("path", list(TREE)[:4])
@pytest.mark.parametrize("times, said", [(None, "is not there"), (0, "found 0"), (2, "found 2")])
def test_nothing_is_written_where_one_place_is_not_as_known(tree, path, times, said):
    if times is None:
        (tree / path).unlink()
    else:
        (tree / path).write_text(TREE[path] * times)
    before = read(tree)
    result = apply(tree)
    assert result.returncode == 1 and said in result.stderr and "nothing written" in result.stderr
    assert read(tree) == before
