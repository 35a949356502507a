"""A build without nvcc fails, unless it is asked for."""

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
