"""Small wrong changes, one at a time, each in a copy of the tree: the tests named beside it must fail then, and pass without.

make mutants                       all, about six minutes on two cores
python tests/mutants.py WORD ...   those whose first words contain one of these
"""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "sglang_nsa_fused", "tests")
TIMEOUT = 600  # a test that hangs has failed


class Mutant(NamedTuple):
    what: str
    file: str
    old: str  # occurs once
    new: str
    tests: str  # pytest's arguments, of one way to run them


UNIT, EMULATED, GPU = "unit", "emulated", "GPU"  # ways to run tests; else a release of sglang
COPY, GENERATE = "tests/unit/test_copy.py::", "tests/unit/test_generate.py::"
REPLAY, PLANNERS, IN_GRAPH, WIDE, KEEPS = (
    f"tests/releases/test_{name}.py::" for name in ("replay", "planners", "in_graph", "wide_table", "keeps_upstream")
)
PAGES = f"{GENERATE}test_pages_without_a_column_for_each_token"

MUTANTS = {
    EMULATED: [
        Mutant("last row skipped", "csrc/tables.cuh", "row < r.rows; ++row, to +=", "row < r.rows - 1; ++row, to +=", PAGES),
        Mutant("wrong pitch", "csrc/tables.cuh", "dst.page_pitch * first_row", "dst.page_cols * first_row", PAGES),
        Mutant("page size 63", "csrc/tables.cuh", "src[static_cast<int64_t>(at) << shift]", "src[at * 63]", PAGES),
        Mutant("last page stale", "csrc/tables.cuh", "(cols) + (1 << shift) - 1) >> shift", "(cols)) >> shift", PAGES),
        Mutant("second destination missed", "csrc/tables.cuh", "if (!dst.field[kRealPageTable])", "if (d)", PAGES),
        Mutant(
            "32-bit offset into the pool",
            "csrc/tables.cuh",
            "slot_of(p, i) * p.token_pitch",
            "slot_of(p, i) * static_cast<int>(p.token_pitch)",
            f"{GENERATE}test_pool_offsets_beyond_32_bits",
        ),
        Mutant(
            "32-bit offset of a copy",
            "csrc/copy.cuh",
            "row * p.dst_pitch[f][d]",
            "row * static_cast<int>(p.dst_pitch[f][d])",
            f"{COPY}test_destination_offsets_beyond_32_bits",
        ),
        Mutant(
            "last element of a copy stale",
            "csrc/copy.cuh",
            "thread - kLine < count % 4",
            "thread - kLine < count % 4 - 1",
            f"{COPY}test_columns_and_pitches",
        ),
        Mutant(
            "element 0 written",
            "csrc/fields.h",
            "return f == kCuSeqlensK ||",
            "return",
            f"{COPY}test_element_0_of_cumulative_lengths_stays",
        ),
        Mutant(
            "schedule not written",
            "csrc/generate.cuh",
            "if (dst.field[kSchedule])",
            "if (false)",
            f"{GENERATE}test_schedules",
        ),
        Mutant(
            "one tensor for two fields",
            "csrc/generate_plan.h",
            "return f == g || (is_len(f) && is_len(g));",
            "return true;",
            "tests/unit/test_generate_bad_input.py",
        ),
        Mutant(
            "a source may be written",
            "csrc/fields.h",
            "!itself(*w) && overlap(src, w->view)",
            "false",
            "tests/unit/test_bad_input.py",
        ),
    ],
    UNIT: [
        Mutant("gate ignored", "sglang_nsa_fused/plugin.py", "if settings.enabled:", "if True:", "tests/unit/test_external.py"),
        Mutant(
            "REQUIRED ignored at start-up",
            "sglang_nsa_fused/plugin.py",
            "if required:",
            "if False:",
            "tests/unit/test_plugin.py",
        ),
        Mutant(
            "raised number of SMs stays",
            "sglang_nsa_fused/indexer.py",
            "self.sm_count = sms\n",
            "pass\n",
            "tests/unit/test_indexer.py",
        ),
        Mutant(
            "all rows without a schedule of all rows",
            "sglang_nsa_fused/indexer.py",
            "is not None:\n            self.sm_count",
            "is not self:\n            self.sm_count",
            "tests/unit/test_indexer.py",
        ),
    ],
    "0.5.23": [
        Mutant(
            "REQUIRED ignored at capture",
            "sglang_nsa_fused/hooks.py",
            "if settings.required:",
            "if False:",
            f"{KEEPS}test_required_ends_the_process_where_upstreams_refresh_would_stay",
        ),
        Mutant(
            "schedule of an unknown form not refreshed",
            "sglang_nsa_fused/replay.py",
            "self._after.append(self._refresh_schedule)",
            "pass",
            f"{PLANNERS}test_steps_get_deep_gemms_schedule_too",
        ),
        Mutant(
            "refresh of a replay skipped",
            "sglang_nsa_fused/replay.py",
            "if not self.in_graph:",
            "if False:",
            f"{REPLAY}test_every_field_of_every_backend",
        ),
        Mutant(
            "refresh skipped after a warm-up",
            "sglang_nsa_fused/replay.py",
            "self.in_graph |= is_capturing()",
            "self.in_graph = True",
            "tests/releases/test_in_graph.py",
        ),
        Mutant(
            "wide table dropped where upstream's copies read it",
            "sglang_nsa_fused/hooks.py",
            "ours = engine.generate_plan is not None and",
            "ours =",
            f"{WIDE}test_it_is_there_where_upstreams_copies_stay",
        ),
        Mutant(
            "mask of a verify that reads it",
            "sglang_nsa_fused/hooks.py",
            "is_read=False",
            "is_read=True",
            "tests/releases/test_verify_mask.py::test_a_verify_reads_none",
        ),
        Mutant(
            "wide table dropped where speculation is asked about twice",
            "sglang_nsa_fused/buffers.py",
            "and asked == 1",
            "and asked",
            f"{WIDE}test_a_condition_of_another_form_keeps_it",
        ),
    ],
    GPU: [
        Mutant(
            "wrong stream",
            "csrc/bindings.cc",
            "TVMFFIEnvGetStream(device.device_type, device.device_id)",
            "nullptr",
            "tests/gpu/test_capture.py::test_runs_on_torchs_current_stream",
        ),
    ],
}


def changed(mutant: Mutant, root: Path) -> str:
    """The mutant's file. Raises ValueError where what it changes does not occur once."""
    text = (root / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.what}: {mutant.old!r} occurs {count} times in {mutant.file}, not once")
    return text.replace(mutant.old, mutant.new)


def markdown() -> str:
    """The table of docs/testing.md."""
    rows = ["| wrong change | in | run | what goes red |", "| --- | --- | --- | --- |"]
    for way, mutants in MUTANTS.items():
        for mutant in mutants:
            file, _, test = mutant.tests.removeprefix("tests/").partition("::")
            rows.append(f"| {mutant.what} | {mutant.file} | {way} | {file}{test and f', {test}'} |")
    return "\n".join(rows) + "\n"


def build_for_this_gpu(tree: Path) -> None:
    import tvm_ffi.libinfo as info

    library = Path(info.find_libtvm_ffi())
    command = ["nvcc", "-std=c++17", "-O2", "-arch=native", '-DNSA_FUSED_CUDA_ARCHS="native"', "-shared", "-Xcompiler=-fPIC"]
    command += [f"-I{folder}" for folder in (tree / "csrc", info.find_include_path(), info.find_dlpack_include_path())]
    command += ["-x", "cu", "csrc/bindings.cc", "csrc/cpu.cc", "-o", "sglang_nsa_fused/libnsa_fused.so"]
    command += ["-Xlinker", str(library), f"-Xlinker=-rpath={library.parent}"]
    subprocess.run(command, cwd=tree, check=True)


def pytest(way: str, tests: list[str], mutant: Mutant | None = None) -> tuple[int | None, str]:
    """(exit status or None where it hung, output) of these tests in a copy of the tree with this change."""
    from sglang_nsa_fused import kernels

    with tempfile.TemporaryDirectory() as work:
        tree = Path(work, "tree")
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        shutil.copy(kernels.LIBRARY, tree / "sglang_nsa_fused")
        path, options, env = [tree], ["-q", "-x", "-p", "no:cacheprovider"], dict(os.environ)
        if mutant:
            (tree / mutant.file).write_text(changed(mutant, tree))
            env["TMPDIR"] = work  # of an emulated library
        if way != GPU:
            env["CUDA_VISIBLE_DEVICES"] = ""
        if way == EMULATED:
            path, options = [tree / "tests/emulation", tree], [*options, "-p", "emulated"]
        elif way == GPU:
            build_for_this_gpu(tree)
        elif way != UNIT:
            from releases.matrix import unpacked

            path.append(unpacked(way))
            env["SGLANG_NSA_FUSED_TEST_RELEASE"] = way
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
        command = [os.path.join(sysconfig.get_path("scripts"), "pytest"), *options, *tests]
        try:
            output = subprocess.PIPE
            done = subprocess.run(command, cwd=tree, env=env, stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as late:
            return None, (late.output or b"").decode(errors="replace")
        return done.returncode, done.stdout.decode(errors="replace")


def judge(way: str, mutant: Mutant) -> tuple[str, str]:
    """("red" or what is wrong, output)"""
    status, output = pytest(way, [mutant.tests], mutant)
    if status == 0:
        return "SURVIVED", output
    # Failed tests, a process that a signal ended, or one that hung. Anything else did not run them.
    return ("red", "") if status is None or status == 1 or status < 0 else (f"pytest ended with {status}", output)


def main(words: list[str]) -> int:
    import torch

    here = {way: mutants for way, mutants in MUTANTS.items() if way != GPU or torch.cuda.is_available()}
    picked = {way: [m for m in mutants if not words or any(w in m.what for w in words)] for way, mutants in here.items()}
    picked = {way: mutants for way, mutants in picked.items() if mutants}
    for mutants in MUTANTS.values():
        for mutant in mutants:
            changed(mutant, ROOT)
    bad = 0

    def say(what: str, verdict: str, start: float, output: str = "") -> None:
        print(f"{what:70} {verdict:10} {time.monotonic() - start:4.0f} s", flush=True)
        if output:
            print(output[-4000:], flush=True)

    for way, mutants in picked.items():
        start = time.monotonic()
        status, output = pytest(way, sorted({mutant.tests for mutant in mutants}))
        say(f"{way}: unchanged", "green" if status == 0 else "RED", start, output if status else "")
        bad += status != 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        start = time.monotonic()
        runs = {pool.submit(judge, way, mutant): (way, mutant) for way, mutants in picked.items() for mutant in mutants}
        for done in concurrent.futures.as_completed(runs):
            way, mutant = runs[done]
            verdict, output = done.result()
            say(f"{way}: {mutant.what}", verdict, start, output)
            bad += verdict != "red"
    for mutant in () if GPU in here else MUTANTS[GPU]:
        print(f"{f'{GPU}: {mutant.what}':70} needs a GPU: {mutant.tests}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
