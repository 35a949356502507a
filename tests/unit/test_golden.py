"""What real planners gave on a GPU (tests/golden/record.py) against ours: no stand-in of ours is in between."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_nsa_fused import planners, reference
from sglang_nsa_fused.kernels import select
from sglang_nsa_fused.plan import Destination, ReplayPlan, Values
from sglang_nsa_fused.tools import torch_forms

FOLDER = Path(__file__).parents[1] / "golden"
FILES = sorted(FOLDER.glob("*.npz"))
SEGMENT = 256
FORMS = {  # sglang -> whether its DeepGEMM gives the last SMs the segments that are left over, the buckets of its top-k
    "0.5.12.post1": (False, None),
    "0.5.17": (True, planners.TOPK_BUCKETS[0]),
    "0.5.23": (True, planners.TOPK_BUCKETS[1]),
}
SMALL = 30  # rows whose plan the newer top-k leaves unwritten


@functools.cache
def recorded(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def cases(kind: str) -> list:
    """A parameter for each file and number of rows (of SMs, of heads) that it has."""
    found = []
    for path in FILES:
        names = sorted({name.rpartition("/")[0] for name in recorded(path) if name.startswith(f"{kind}/")})
        found += [pytest.param(path, name, id=f"{path.stem}/{name}") for name in names]
    return found


def arrays(path: Path, name: str, device: str, *keys: str) -> list[torch.Tensor]:
    return [torch.from_numpy(recorded(path)[f"{name}/{key}"]).to(device) for key in keys]


def release_of(path: Path) -> str:
    return json.loads(str(recorded(path)["info"]))["packages"]["sglang"]


def forms(path: Path) -> tuple:
    return FORMS[release_of(path)]


def generated(lengths: torch.Tensor, destination: Destination, **values) -> None:
    """By the native operation, for a row of each length."""
    rows, device = len(lengths), lengths.device
    slots = torch.zeros(rows, dtype=torch.int64, device=device)
    made_from = Values(torch.zeros(1, 64, dtype=torch.int32, device=device), rows, rows, 1, 2048, 64, **values)
    plan = ReplayPlan(reference.DECODE, [destination], select(device.type), made_from)
    plan.generate(lengths, slots, None, rows)


def test_files_of_each_form():
    assert {release_of(path) for path in FILES} == FORMS.keys()
    for path in FILES:
        found = {name.partition("/")[0] for name in recorded(path)}
        assert found >= {"info", "schedule"} | ({"topk"} if forms(path)[1] else set()), path


@pytest.mark.parametrize("path, name", cases("schedule"))
def test_deep_gemms_schedule(device, path, name):
    extra_last = forms(path)[0]
    for lengths, plan in zip(*arrays(path, name, device, "lengths", "plans")):
        assert torch.equal(reference.paged_mqa_schedule(lengths, SEGMENT, len(plan) - 1, extra_last), plan), lengths
        schedule = torch.full_like(plan, -7)
        generated(lengths, Destination(paged_mqa_schedule=schedule), segment_len=SEGMENT, extra_last=extra_last)
        assert torch.equal(schedule, plan), lengths


@pytest.mark.parametrize("path, name", cases("topk"))
def test_the_plan_of_the_top_k(device, path, name):
    buckets = forms(path)[1]
    for lengths, plan in zip(*arrays(path, name, device, "lengths", "plans")):
        if len(lengths) <= SMALL and bool((plan == planners.POISON).all()):
            assert buckets is not planners.TOPK_BUCKETS[0]
            continue
        ours = torch.full_like(plan, -7)
        generated(lengths, Destination(topk_v2_plan=ours), topk_buckets=buckets)
        count = int(plan[0, 1])
        rows = plan[1 : count + 1]
        assert torch.equal(ours[: count + 1], torch.cat([plan[:1], rows[rows[:, 0].argsort()]])), lengths  # theirs in any order
        assert bool((ours[count + 1 :] == -7).all())


@pytest.mark.parametrize("path, name", cases("flashmla"))
def test_flashmlas_plan_depends_on_the_number_of_rows_alone(path, name):
    """So a launch may write the one of the capture."""
    splits, tiles = arrays(path, name, "cpu", "splits", "tiles")
    assert len(splits) >= 3 and bool((splits == splits[0]).all()) and bool((tiles == tiles[0]).all())
    assert splits[0, 0] == 0 and bool((splits[0].diff() >= 1).all())
    assert tiles.shape[2] == 5 and 1 <= tiles.shape[1] <= torch_forms.NUM_SMS
