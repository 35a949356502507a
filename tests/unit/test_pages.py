"""The tables of the README and of docs/ are those of the committed results, and of what page tables take."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("benchmarks")


def test_no_table_is_stale():
    check = subprocess.run([sys.executable, "-m", "benchmarks.pages", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def anchors(page: Path) -> set[str]:
    """As GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    broken = []
    for page in [page for pattern in ("*.md", "docs/*.md", "patches/*/*.md", ".github/*.md") for page in ROOT.glob(pattern)]:
        for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            to = page.parent / path if path else page
            if not to.exists() or (anchor and anchor not in anchors(to)):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_servers_that_differ_in_a_flag_alone_come_one_after_the_other():
    from benchmarks.cases import parse

    names = [
        f"n4-bs{bs}-len64-{cache}{more}" for cache in ("bf16", "fp8") for more in ("", "-1core", "-layers8") for bs in (1, 16)
    ]
    shuffled = names[1::2] + names[::2]
    assert sorted(shuffled, key=parse) == names


def test_the_names_of_the_benchmark_are_read_back():
    from benchmarks.cases import parse
    from benchmarks.server import Configuration

    found = parse(Configuration(4, "fp8", 61, 163_840).named("bs8-len64-"))
    assert (found.draft_steps, found.batch, found.length, found.width, found.cache, found.layers) == (
        4,
        8,
        64,
        163_840,
        "fp8",
        61,
    )


def test_names_of_refreshes_old_and_new():
    from benchmarks.cases import parse

    old, new = parse("verify-n4-bs64-len131072-flashmla"), parse("verify-n4-bs64-len131072-width163840-flashmla")
    assert (old.kind, old.draft_steps, old.batch, old.length, old.cache, old.width) == ("verify", 4, 64, 131072, "flashmla", 0)
    assert new == old.but(width=163840)
    names = [
        f"draft-n4-bs{bs}-len{length}-width{width}" for width in (163840, 1048576) for length in (512, 131072) for bs in (1, 64)
    ]
    shuffled = names[1::2] + names[::2]
    assert shuffled != names == sorted(shuffled, key=parse)


def test_a_name_that_no_benchmark_gives_is_refused():
    from benchmarks.cases import parse

    with pytest.raises(ValueError, match="n4-bs1-bf16: not a case"):
        parse("n4-bs1-bf16")


def test_bytes_of_a_token():
    from benchmarks.kv_cache import MODELS, bytes_per_token

    found = {model.name: [bytes_per_token(model, cache) for cache in ("bf16", "fp8")] for model in MODELS}
    assert found == {
        "DeepSeek-V3.2": [62 * (1152 + 132), 62 * (656 + 132)],
        "GLM-5.2": [79 * 1152 + 22 * 132, 79 * 656 + 22 * 132],
    }


def test_memory_in_tokens():
    from benchmarks.pages import memory

    last = memory("32,256").splitlines()[-1]
    # 20.48 GiB without the plugin, as test_cli has it, 0.20 with it; (20.48 - 0.20) * 2**30 / 93,912 and / 54,728
    assert last == "| GLM-5.2 | 256 | 20.48 | 0.20 | 20.28 | 231,800 | 397,800 |"


def test_the_highest_fractions(monkeypatch):
    from benchmarks import pages

    metrics = {"mem_fraction": (0.86, 0.92), "pool_tokens": (412_345.0, 467_890.0)}
    cases = [{"metric": metric, "upstream": upstream, "ours": ours} for metric, (upstream, ours) in metrics.items()]
    monkeypatch.setattr(pages, "load", lambda *of: {"gpu": "H100", "sglang": "0.5.23", "cases": cases, "of": of})
    assert pages.fraction("h100-0.5.23").splitlines()[2:] == [
        "| highest --mem-fraction-static | 0.86 | 0.92 |",
        "| tokens of KV cache | 412,345 | 467,890 |",
    ]


def step(name: str, ms: float) -> dict:
    return {"name": name, "metric": "step_ms", "upstream": ms, "ours": ms - 1, "spread": {"upstream": [ms, ms], "ours": [ms, ms]}}


def test_starts_that_changed_stand_in_their_own_row(monkeypatch):
    from benchmarks import pages

    def case(at: str, metric: str, upstream: list, ours: list) -> dict:
        return {"name": f"n3-{at}-width163840-bf16", "metric": metric, "processes": {"upstream": upstream, "ours": ours}}

    cases = [
        case("bs128-len512", "gpu_draft_us", [1096, 1075, 1074], [1098, 1097, 1098]),
        case("bs128-len512", "decode_step_ms", [58, 57, 57], [38, 38, 38]),
        case("bs1-len131072", "decode_step_ms", [21.6, 19.4, 19.5], [21.3, 21.3, 21.2]),
        case("bs1-len32768", "decode_step_ms", [20.8, 18.9, 18.8], [20.6, 20.6, 20.7]),
    ]
    monkeypatch.setattr(pages, "load", lambda *of: {"gpu": "NVIDIA H100", "cases": cases})
    monkeypatch.setattr(pages, "POOLED", {"both": ("one",)})
    assert pages.changed("both").splitlines()[2:] == [
        "| H100, 3 | sglang | 1 | 1096 | 20.8 | 21.6 |",
        "| H100, 3 | sglang, after it changed | 2 | 1074 to 1075 | 18.8 to 18.9 | 19.4 to 19.5 |",
        "| H100, 3 | with the plugin | 3 | 1097 to 1098 | 20.6 to 20.7 | 21.2 to 21.3 |",
    ]


def profiled(start: str, ms: float, gap: float | None, switched: bool | None = None) -> dict:
    """Of a start. Without a gap: of a file from before it was measured; without switched: from before the GPU was made to."""
    found = {"start": start, "case": "bs1-len512", "decode_step_ms": ms, "graph_verify_us": 900 * ms}
    found |= {"experts_beside": 90, "experts_beside_us": 120.0, "experts_alone": 10, "experts_alone_us": 50.0}
    found |= {} if gap is None else {"between_kernels_us": gap}
    return found | ({} if switched is None else {"switched": switched})


@pytest.fixture
def of_speeds(monkeypatch):
    """Two files of speeds, of an H200, and one of an H100."""
    from benchmarks import pages

    head = {"sglang": "0.5.23", "model": "model-v32-rank8", "draft_steps": 3, "context_length": 163_840}
    files = {
        "one": ("NVIDIA H200", [profiled("off", 20.0, 0.42), profiled("off", 18.6, 0.13), profiled("on", 19.8, None)]),
        "two": (
            "NVIDIA H200",
            [
                *(profiled("off", ms, gap, switched) for ms, gap, switched in ((19.7, 0.42, False), (19.3, 0.13, True))),
                *(profiled("on", ms, 0.42, switched) for ms, switched in ((19.9, False), (20.1, True))),
                profiled("on+SGLANG_NSA_FUSED_KEEP_CHUNKS=1", 20.5, 0.42, False),
            ],
        ),
        "other": ("NVIDIA H100 80GB HBM3", [profiled("off", 21.0, 0.42), profiled("on", 20.0, 0.42)]),
    }
    monkeypatch.setattr(pages, "load", lambda what, of: head | dict(zip(("gpu", "starts"), files[of])))
    monkeypatch.setattr(pages, "POOLED", {"all": tuple(files)})
    return pages


def test_starts_that_were_made_to_change_stand_in_their_own_row(of_speeds):
    rows = [line.split(" | ") for line in of_speeds.speeds("all:bs1-len512").splitlines()[2:]]
    assert [(row[0][2:], *row[1:4]) for row in rows] == [
        ("H100", "sglang", "1", "21.00"),
        ("H100", "with the plugin", "1", "20.00"),
        ("H200", "sglang", "2", "19.70 to 20.00"),
        ("H200", "sglang, after it changed", "1", "18.60"),
        ("H200", "sglang, after another's context", "1", "19.30"),
        ("H200", "with the plugin", "2", "19.80 to 19.90"),
        ("H200", "with the plugin, after another's context", "1", "20.10"),
        ("H200", "with the plugin, `KEEP_CHUNKS=1`", "1", "20.50"),
    ]


def test_a_row_of_starts_has_those_alone_that_nothing_changed(of_speeds):
    shown = of_speeds.full("all@H200,all@H100").splitlines()[2:]
    model = "DeepSeek-V3.2 | 3, 163,840 | 1 x 512 | –"
    assert shown == [
        f"| 0.5.23, H200 | {model} | 19.9 (19.7 to 20.0) | 19.9 (19.8 to 19.9) | 1.00 | 2 and 2 |",
        f"| 0.5.23, H100 | {model} | 21.0 (21.0 to 21.0) | 20.0 (20.0 to 20.0) | 1.05 | 1 and 1 |",
    ]


def test_a_picture_follows_one_dimension():
    from benchmarks.plot import along, of_metric

    lengths = [step(f"n4-bs1-len{length}-{cache}", 9) for length in (64, 512, 4096) for cache in ("bf16", "fp8")]
    others = [step("n4-bs8-len64-bf16", 9), step("n3-bs1-len512-bf16", 9)]
    cases = of_metric({"cases": lengths + others}, "step_ms")
    shared, groups = along(cases, "length")
    assert shared == "batch 1, 4 draft steps, 3 layers"
    assert {cache: [tick for tick, _ in found] for cache, found in groups.items()} == {
        "bf16": [64, 512, 4096],
        "fp8": [64, 512, 4096],
    }
    shared, groups = along(cases, "batch")
    assert (shared, [tick for tick, _ in groups["bf16"]]) == ("64 tokens, 4 draft steps, 3 layers", [1, 8])
    assert along(cases, "layers")[1] == {}


def test_the_pictures_are_drawn_from_the_committed_results(tmp_path):
    from benchmarks.plot import main

    main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs").glob("*.png")}
