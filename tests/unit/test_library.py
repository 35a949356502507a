"""The native library: what it links, and what happens without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import generated
import pytest
import torch

from sglang_nsa_fused import ReplayPlan, kernels, reference
from sglang_nsa_fused.kernels import library as load_library
from sglang_nsa_fused.tools import doctor


def library_path() -> str:
    load_library()
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if line.rstrip().endswith("libnsa_fused.so"))


def python(code: str, *args, cwd=None, **env) -> subprocess.CompletedProcess:
    env = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, cwd=cwd, capture_output=True, text=True)


def test_is_not_searched_for(tmp_path):
    """A package without one takes none that lies in a path or in the working directory."""
    elsewhere, package = tmp_path / "elsewhere", tmp_path / "package"
    elsewhere.mkdir()
    shutil.copy(library_path(), elsewhere)
    shutil.copytree(kernels.LIBRARY.parent, package / "sglang_nsa_fused", ignore=shutil.ignore_patterns("*.so"))
    code = "from sglang_nsa_fused import kernels; print(kernels.__file__); kernels.library()"
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    done = python(code, cwd=elsewhere, PYTHONPATH=path, PATH=elsewhere, LD_LIBRARY_PATH=elsewhere)
    assert done.stdout.strip() == str(package / "sglang_nsa_fused/kernels.py")
    assert "the native library cannot be loaded (FileNotFoundError: " in done.stderr, done.stderr


def test_one_that_was_not_copied_whole_is_not_opened(tmp_path):
    """Opening it would end the process with SIGBUS."""
    whole = Path(library_path()).read_bytes()
    sizes = [0, 63, 64, 700, 5000, len(whole) // 2, len(whole) - 4097, len(whole) - 1]
    for size in sizes:
        (tmp_path / f"{size}.so").write_bytes(whole[:size])
    code = """
import sys
from pathlib import Path
from sglang_nsa_fused import kernels
for path in sys.argv[1:]:
    kernels.LIBRARY = Path(path)
    try:
        kernels.library()
    except RuntimeError as error:
        print(error)
"""
    done = python(code, *(tmp_path / f"{size}.so" for size in sizes), cwd=tmp_path)
    assert done.returncode == 0, done
    assert all(re.search(r"cannot be loaded \(ValueError: .*expected .* got \d+", line) for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == len(sizes)
    assert f"{len(whole) - 1}.so: expected {len(whole)} bytes, got {len(whole) - 1}" in done.stdout


def test_one_for_another_processor_is_named(tmp_path):
    """The loader would say that there is no such file."""
    other = bytearray(Path(library_path()).read_bytes())
    mine, other[18:20] = int.from_bytes(other[18:20], "little"), (183).to_bytes(2, "little")  # of aarch64
    (tmp_path / "other.so").write_bytes(other)
    code = """
import sys
from pathlib import Path
from sglang_nsa_fused import kernels
kernels.LIBRARY = Path(sys.argv[1])
print(kernels.select("cpu").reason)
"""
    done = python(code, tmp_path / "other.so", cwd=tmp_path)
    text = f"other.so: expected ELF machine {mine} as this Python's, got 183: it is for another processor)"
    assert text in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["0.1.8", "0.2.0", "1.0"])
def test_a_tvm_ffi_that_it_was_not_built_for_is_not_loaded(monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    text = rf"apache-tvm-ffi is {version}; pip install 'apache-tvm-ffi>=0.1.9,<0.2'"
    with pytest.raises(RuntimeError, match=rf"the native library cannot be loaded \(RuntimeError: {text}\)"):
        load_library.__wrapped__()
    assert doctor._outcome(dict(doctor._CHECKS)["tvm-ffi"]) == (False, text)


@pytest.mark.parametrize("version", ["0.1.9", "0.1.10.dev3", "0.1.12rc1"])
def test_a_tvm_ffi_that_it_was_built_for(monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert kernels.tvm_ffi_version() == version


@pytest.mark.parametrize("spoil", ["mode", "link", "file"])
def test_an_emulated_one_is_made_where_nobody_else_can_write(tmp_path, spoil):
    env = dict(PYTHONPATH=Path(__file__).parents[1] / "emulation", TMPDIR=tmp_path)
    code = "import emulated; print(emulated.folder())"
    folder = Path(python(code, **env).stdout.strip())
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    if spoil == "mode":
        folder.chmod(0o770)
    else:
        folder.rmdir()
        folder.symlink_to(tmp_path) if spoil == "link" else folder.touch()
    done = python(code, **env)
    assert done.returncode == 1 and f"{folder}" in done.stderr, done.stderr


def test_needs_tvm_ffi_and_the_c_runtime_alone():
    dynamic = subprocess.run(["readelf", "-d", library_path()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", dynamic))
    assert needed <= {"libtvm_ffi", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}, needed


def test_architectures_are_named():
    assert all(re.fullmatch(r"(sm|compute)_\d+", arch) for arch in kernels.cuda_archs())


@pytest.fixture
def select():
    """As in a process where nothing is decided."""
    kernels.select.cache_clear()
    yield kernels.select
    kernels.select.cache_clear()


@pytest.fixture
def no_library(select, monkeypatch):
    def missing():
        raise RuntimeError("the native library cannot be loaded")

    monkeypatch.setattr(kernels, "library", missing)


def test_without_it_there_is_no_engine(no_library):
    engine = kernels.select("cpu")
    assert engine.name == "none" and engine.copy_plan is None and "cannot be loaded" in engine.reason


def test_without_it_a_plan_says_what_to_do(no_library):
    case = generated.make("cpu")
    with pytest.raises(RuntimeError, match="no native library for cpu .*cannot be loaded.*; reinstall sglang-nsa-fused"):
        case.plan()
    destination = case.destinations[0][:10]
    destination[2] = destination[2].long()  # which plain torch would copy to
    with pytest.raises(RuntimeError, match="no native library for cpu"):
        ReplayPlan(reference.DECODE, [destination])


def test_a_library_that_copies_wrongly_is_not_chosen(monkeypatch):
    def off_by_one(mode, destinations):
        def replay(*args):
            reference.copy(mode, args[:10], destinations, *args[10:])
            destinations[-1][5][-1] += 1

        return replay

    monkeypatch.setattr(kernels, "_native_plan", off_by_one)
    kernels.select.cache_clear()
    engine = kernels.select("cpu")
    kernels.select.cache_clear()
    assert engine.name == "none" and "self-check" in engine.reason


@pytest.mark.parametrize("operation", ["_native_plan", "_native_generate_plan"])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel image is available"), torch.OutOfMemoryError("no memory")])
def test_one_whose_first_launch_fails_is_not_chosen(select, monkeypatch, operation, error):
    def plan(*_):
        def launch(*_):
            raise error

        return launch

    monkeypatch.setattr(kernels, operation, plan)
    assert select("cpu") == kernels.Engine("none", reason=f"native: {error}")


def test_nothing_is_decided_while_a_graph_is_captured(select, monkeypatch):
    tried = []
    monkeypatch.setattr(kernels.self_check, "copy", lambda *args: tried.append(args))
    monkeypatch.setattr(kernels.self_check, "generate", lambda *args: tried.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured; make a plan on this GPU once before"):
        select("cuda")
    assert not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert select("cuda").name == "native" and len(tried) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert select("cuda").name == "native"


def test_every_kernel_has_run_before_one_is_captured(select, monkeypatch):
    """As many as the library has forms of: up to 4 and up to 16 destinations to copy to, 1 and up to 16 to generate."""
    copied, generated_to = set(), set()
    copy_plan, generate_plan = kernels._native_plan, kernels._native_generate_plan
    monkeypatch.setattr(kernels, "_native_plan", lambda mode, dst: copied.add(len(dst)) or copy_plan(mode, dst))
    monkeypatch.setattr(
        kernels, "_native_generate_plan", lambda mode, values, dst: generated_to.add(len(dst)) or generate_plan(mode, values, dst)
    )
    assert select("cpu").name == "native"
    assert min(copied) <= 4 < max(copied) and min(generated_to) == 1 < max(generated_to)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_loads_and_copies_without_a_driver():
    assert kernels.select("cpu").name == "native"
