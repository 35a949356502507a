"""Installs the wheel of dist/ in clean environments, and runs its operations on the CPU there.

    python tests/wheel/check.py [python3.12 ...]

For each Python (those of PYTHONS in PATH unless given) a new environment, in it each version of apache-tvm-ffi in turn: the
native library copies and generates, compared with numpy. Where the Python that runs this has a torch and is of the same version,
that torch is lent to the environment, and the package's self-check and its command run too. Then what must be refused.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")
TVM_FFI = ("0.1.9", "0.1.11", "0.1.13.post2", "0.1.15.post2")  # what sglang pins, oldest and newest first and last
ROOT = Path(__file__).parents[2]

OPERATIONS = """
import sys
from types import SimpleNamespace
import numpy as np
import tvm_ffi

library = tvm_ffi.load_module(sys.argv[1] + "/libnsa_fused.so")
assert "sm_90" in library.cuda_archs(), library.cuda_archs()
lend = lambda array: None if array is None else tvm_ffi.from_dlpack(array)
draw = np.random.default_rng(0)
poisoned = lambda *shape: np.full(shape, -7, np.int32)

def same(what, found, expected):
    for number, (one, right) in enumerate(zip(found, expected)):
        assert (one == right).all(), (what, number, one, right)

# A copy of decode: three rows of 131 of 150 columns; the first of each running sum is not written.
shapes = [(3,), (4,), (3, 150), (3,), (3,), (4,), (3, 4), (4,), (2, 8), (5, 2)]
sources = [draw.integers(1, 1 << 30, shape, dtype=np.int32) for shape in shapes]
found = [poisoned(*shape) for shape in shapes]
copy = library.copy_plan(SimpleNamespace(owned=found), 0, *map(lend, found))
copy(*map(lend, sources), 3, 131, 131, 3)
expected = [source.copy() for source in sources]
expected[1][0] = expected[5][0] = -7
expected[2][:, 131:] = -7
expected[4][:] = -7
same("copy", found, expected)

# A generation of decode: lengths 0, 64 and 129, pages of 64 tokens, 100 of the top k.
pool, lens, slots = draw.integers(0, 1 << 20, (4, 150), dtype=np.int32), np.array([0, 64, 129]), np.array([2, 0, 3])
found = [poisoned(3), poisoned(4), poisoned(3, 150), poisoned(3), None, poisoned(4), poisoned(3, 3)] + [None] * 5
generate = library.generate_plan(
    SimpleNamespace(owned=found), 0, 3, 3, 1, 100, 64, 0, False, 0, (), lend(pool), None, None, *map(lend, found)
)
generate(lend(lens), lend(slots), None, 3)
table, pages, top = poisoned(3, 150), poisoned(3, 3), np.minimum(lens, 100)
for row, (length, slot) in enumerate(zip(lens, slots)):
    table[row, :length] = pool[slot, :length]
    live = pool[slot, :length:64] // 64
    pages[row, : len(live)] = live
sums = [np.concatenate([[0], np.cumsum(of)]) for of in (lens, top)]
for table_of, right in ((found[2], table), (found[6], pages)):  # behind a row's length anything may be
    assert (table_of[right != -7] == right[right != -7]).all(), (table_of, right)
same("generation", [found[i] for i in (0, 1, 3, 5)], [lens, sums[0], top, sums[1]])
"""
SELF_CHECK = """
import sys
from importlib.metadata import version
import tvm_ffi
from sglang_nsa_fused import __version__, kernels
assert all(one.__file__.startswith(sys.prefix) for one in (tvm_ffi, kernels)), (tvm_ffi.__file__, kernels.__file__)
assert version("sglang-nsa-fused") == __version__
engine = kernels.select("cpu")
assert engine.name == "native", engine
"""


def run(*command, **env) -> str:
    done = attempt(*command, **env)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:6]))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def attempt(*command, **env) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [*map(str, command)], env={**kept, **env}, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def refused(what: str, words: str, *command, **env) -> None:
    done = attempt(*command, **env)
    if done.returncode == 0 or words not in " ".join(done.stdout.split()):
        sys.exit(f"{what}: expected a refusal with {words!r}, got {done.returncode}:\n{done.stdout}")
    print(f"refused: {what}", flush=True)


def environment(python: str, folder: Path) -> tuple[Path, Path]:
    """Its interpreter and its site-packages."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin/python"
    return inside, Path(run(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def main() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sources,) = (ROOT / "dist").glob("*.tar.gz")
    pythons = sys.argv[1:] or [name for name in PYTHONS if shutil.which(name) and not attempt(name, "--version").returncode]
    torch, ran = find_spec("torch"), 0
    with tempfile.TemporaryDirectory() as work:
        for number, python in enumerate(pythons):
            inside, packages = environment(python, Path(work, f"{number}"))
            pip = (inside, "-m", "pip", "--disable-pip-version-check", "install", "-q")
            run(*pip, "--no-deps", wheel)
            run(*pip, "numpy")
            version = run(inside, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
            run(inside, "-m", "compileall", "-q", packages / "sglang_nsa_fused")
            gate = {"SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA": "1", "SGLANG_NSA_FUSED_REQUIRED": "1"}
            activate = (inside, "-c", "from sglang_nsa_fused.plugin import activate; activate()")
            refused(f"Python {version} without sglang", "not active: sglang is not installed", *activate, **gate)
            with_torch = torch is not None and version == "{}.{}".format(*sys.version_info[:2])
            for tvm_ffi in TVM_FFI:
                run(*pip, f"apache-tvm-ffi=={tvm_ffi}")
                run(inside, "-c", OPERATIONS, packages / "sglang_nsa_fused")
                if with_torch:
                    lent = packages / "lent.pth"  # behind the environment's own packages
                    lent.write_text(str(Path(torch.origin).parents[1]))
                    run(inside, "-c", SELF_CHECK)
                    run(inside.with_name("sglang-nsa-fused"), "--version")
                    lent.unlink()
                print(f"Python {version}, apache-tvm-ffi {tvm_ffi}{', torch' * with_torch}: passed", flush=True)
                ran += 1
        if not ran:
            sys.exit(f"none of {', '.join(PYTHONS)} is in PATH; name one")

        with_deps = (*pip, "--dry-run")
        refused("apache-tvm-ffi 0.1.8", "conflict", *with_deps, wheel, "apache-tvm-ffi==0.1.8")
        another = ("--platform", "manylinux_2_17_x86_64", "--only-binary=:all:", "--no-deps", "--target", Path(work, "another"))
        refused("an older glibc", "is not a supported wheel on this platform", *pip, *another, wheel)
        nvcc = "nvcc 12.4 or newer not found; install it (the CUDA toolkit) or set CUDACXX to it."
        refused("sources without nvcc", nvcc, *pip, "--no-deps", sources, CUDACXX="/nonexistent/nvcc")
    print(f"{ran} passed, 0 failed")


if __name__ == "__main__":
    main()
