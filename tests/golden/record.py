"""Records what the planners of the installed sglang give on this GPU, for tests/unit/test_golden.py.

    python tests/golden/record.py [--commit COMMIT] [--out FOLDER]

Writes RELEASE-GPU.npz. Arrays by name, all int32:
    schedule/SMS/ROWS/lengths [vectors, ROWS]    and plans [vectors, SMS + 1, 2]: DeepGEMM's paged MQA schedule
    topk/ROWS/lengths [vectors, ROWS]            and plans [vectors, ROWS + 1, 2]: the top-k's, over memory full of -7
    flashmla/HEADS/ROWS/lengths [vectors, ROWS]  and splits [vectors, ROWS + 1], tiles [vectors, parts, 5]: FlashMLA's
    info: JSON, where it was recorded, and what could not be
"""

import argparse
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402
from sglang_nsa_fused import planners, plugin  # noqa: E402
from sglang_nsa_fused.tools import bare  # noqa: E402

SMS = (132, 78, 148, 152)  # an H100's, an H20's, and Blackwell's
ROWS = (1, 7, 32, 33, 64, 257)
HEADS = (128, 64)
PACKAGES = ("sglang", "torch", "sgl-deep-gemm", "deep-gemm", "sgl-kernel", "sglang-kernel", "flash-mla", "sgl-flash-mla")


def stacked(tensors) -> np.ndarray:
    return torch.stack(list(tensors)).cpu().numpy()


def schedules(planner: planners.Planners, sms: int, rows: int, device: str) -> dict[str, np.ndarray]:
    vectors = planners.length_vectors(rows, device)[:: 3 if sms == SMS[0] else 9]
    planner.num_sms = lambda: sms
    return {"lengths": stacked(vectors), "plans": stacked(planner.schedule(lengths, rows) for lengths in vectors)}


def topk(backend, build: str, rows: int, device: str) -> dict[str, np.ndarray]:
    vectors = planners.bucket_vectors(rows, device)[::3]
    plans = [planners._built_over_poison(getattr(backend, build), lengths) for lengths in vectors]
    return {"lengths": stacked(vectors), "plans": stacked(plans)}


def flashmla(planner: planners.Planners, backend, heads: int, rows: int, device: str) -> dict[str, np.ndarray]:
    setattr(backend, planner._release.flashmla_heads, heads)
    vectors = planners.length_vectors(rows, device)[::12]
    plans = [planner.flashmla_of(backend, lengths) for lengths in vectors]
    # Columns 5 to 7 are padding that FlashMLA leaves as the allocator had it.
    tiles = stacked(plan.flashmla_metadata[:, :5] for plan in plans)
    return {"lengths": stacked(vectors), "splits": stacked(plan.num_splits for plan in plans), "tiles": tiles}


def everything(release, module, device: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, what could not be recorded)."""
    planner = planners.Planners(release, module, None)
    pool = torch.zeros(1, 64, dtype=torch.int32, device=device)
    backend = bare.step_backend(getattr(module, release.backend), release, device, pool, 4, True)
    of_sms = {f"schedule/{sms}/{rows}": (schedules, planner, sms, rows) for sms in SMS for rows in ROWS}
    makers = {f"flashmla/{heads}/{rows}": (flashmla, planner, backend, heads, rows) for heads in HEADS for rows in ROWS}
    if build := release.build_topk_v2_plan:
        makers |= {f"topk/{rows}": (topk, backend, build, rows) for rows in (*ROWS, 30, 31)}
    makers = dict(list(of_sms.items())[: len(ROWS)]) | makers | of_sms  # another number of SMs may fail: last
    arrays, failed = {}, {}
    for name, (make, *args) in makers.items():
        try:
            arrays |= {f"{name}/{key}": array for key, array in make(*args, device).items()}
        except Exception as error:  # a package that is not there, a number of SMs that is refused
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    assert all(array.dtype == np.int32 for array in arrays.values())
    return arrays, failed


def write(folder: Path, arrays: dict[str, np.ndarray], info: dict) -> Path:
    gpu = re.search(r"[A-Z]+\d+", info["gpu"])
    path = folder / f"{info['packages']['sglang']}-{gpu[0].lower() if gpu else 'gpu'}.npz"
    np.savez_compressed(path, info=json.dumps(info), **arrays)
    return path


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--commit", help="of this repository, where git cannot say it here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU")
    release, _ = plugin.find_release()
    commit = args.commit or record.commit()
    arrays, failed = everything(release, bare.import_upstream(release, "cuda"), "cuda")
    info = {
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "failed": failed,
    }
    path = write(args.out, arrays, info)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1e3:.0f} kB; {json.dumps(info, indent=1)}")


if __name__ == "__main__":
    main()
