"""pytest plugin: the native library with its kernels emulated on the host, in place of the installed one.

PYTHONPATH=tests/emulation pytest -p emulated tests/unit/test_generate.py
"""

import functools
import hashlib
import os
import stat
import subprocess
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: CPU tensors alone
HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"


def folder() -> Path:
    """Where the libraries lie: others must not be able to put one of theirs there. Raises PermissionError."""
    path = Path(tempfile.gettempdir()) / f"nsa-fused-emulated-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path}: expected a folder that only its user may use; remove it, or set TMPDIR to another place")
    return path


def build() -> Path:
    """The library, made anew where a source has changed. Raises PermissionError or subprocess.CalledProcessError."""
    import tvm_ffi.libinfo

    files = sorted([*SOURCES.iterdir(), *HERE.rglob("*.*")])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file()))
    path = folder() / f"{digest.hexdigest()[:16]}.so"
    if not path.exists():
        includes = [HERE, SOURCES, tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
        library = Path(tvm_ffi.libinfo.find_libtvm_ffi())
        partial = path.with_suffix(f".{os.getpid()}.so")
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        command += ["-U_FORTIFY_SOURCE"]  # it ends a process that jumps from one fiber to another
        # A 16-byte access that is not aligned ends the process.
        command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", *(f"-I{folder}" for folder in includes)]
        command += [str(SOURCES / "bindings.cc"), str(HERE / "emulate.cc"), str(library), f"-Wl,-rpath,{library.parent}"]
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(path)
    return path


def pytest_configure() -> None:
    import tvm_ffi

    from sglang_nsa_fused import kernels

    kernels.library = functools.lru_cache(None)(lambda: tvm_ffi.load_module(str(build())))


def pytest_report_header() -> str:
    return "kernels emulated on the host"
