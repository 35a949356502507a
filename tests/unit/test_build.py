"""When make builds the plugin anew, and what a build without nvcc says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake in PATH; pip brings its own for a build")
def test_without_nvcc_it_says_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")  # a build has none, and to import it takes seconds

    def configure(cpu_only: str) -> tuple[int, str]:
        command = ["cmake", "-S", ROOT, "-B", tmp_path / "build"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DNSA_FUSED_CPU_ONLY={cpu_only}"]
        env = {**os.environ, "CUDACXX": "/nonexistent/nvcc", "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, re.sub(r"\s+", " ", done.stdout)

    for _ in range(2):  # a folder remembers neither what it was asked for before nor what was missing
        status, output = configure("OFF")
        assert status != 0 and "nvcc 12.4 or newer not found; install it (the CUDA toolkit) or set CUDACXX to it." in output
        assert "CMAKE_CUDA_COMPILER:" not in (tmp_path / "build/CMakeCache.txt").read_text()
        assert "pip install . --config-settings=cmake.define.NSA_FUSED_CPU_ONLY=ON" in output
        status, output = configure("ON")
        assert status == 0 and "without CUDA, as NSA_FUSED_CPU_ONLY says" in output, output


def test_make_builds_anew_where_a_source_has_changed(tmp_path):
    for stamp in ("packages", "plugin"):
        (tmp_path / stamp).touch()
    make = ["make", "-q", "-C", str(ROOT), f"VENV={tmp_path}", f"{tmp_path}/plugin"]
    assert subprocess.run(make).returncode == 0
    sources = ["CMakeLists.txt", "csrc/cpu.cc", "sglang_nsa_fused/plan.py", "sglang_nsa_fused/tools/bench/model/config.json"]
    for source in [*sources, "patches/sglang/0.5.9-plugin-loader.patch"]:
        assert subprocess.run([*make, "-W", source]).returncode == 1, source
