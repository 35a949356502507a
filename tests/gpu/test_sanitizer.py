"""compute-sanitizer over copies and generations of odd sizes; a missing tool is a failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import generated
from cases import make
from sglang_nsa_fused import kernels
import torch
assert kernels.select("cuda").name == "native"
for mode in (0, 1, 2):
    for bs, columns, width in ((1, 1, 1), (3, 65, 66), (7, 2049, 2053), (63, 129, 131)):
        for num_dst in (1, 3, 5):
            make("cuda", mode, bs=bs, columns=columns, width=width, num_dst=num_dst, flashmla=True, schedule=True).run()
    for bs, longest in ((1, 1), (7, 2049), (300, 129)):
        for num_dst in (1, 5):
            for leave_out in ((), ("page_table_1",)):
                generated.make("cuda", mode, bs=bs, longest=longest, num_dst=num_dst, num_sms=78, leave_out=leave_out).run()
    for leave_out in ((), ("page_table_1",)):
        generated.make("cuda", mode, bs=7, longest=129, num_dst=16, leave_out=leave_out).run()
        if mode != 1:  # the lengths are the captured ones
            generated.make("cuda", mode, bs=7, leave_out=leave_out, aliased=True, length_dtype=torch.int32).run()
case = make("cuda", bs=7)
case.sources[0] = case.destinations[0][0].copy_(case.sources[0])
case.run()
for bs, longest in ((1, 1), (7, 2049), (300, 129)):
    for accepted in (True, False):
        case = generated.make("cuda", 2, bs=bs, longest=longest, accepted=accepted, draft_tokens=3, lengths=[longest] * bs)
        if not accepted or case.batch[2].any():
            case.run_without_a_graph(cols=longest + 3, num_sms=78)
torch.cuda.synchronize()
print("checked")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_clean(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert Path(sanitizer).exists(), "compute-sanitizer is missing; install the CUDA toolkit's"
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "checked" in result.stdout, result.stdout[-4000:] + result.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "0 hazards" in result.stdout, result.stdout[-2000:]
