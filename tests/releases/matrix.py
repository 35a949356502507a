"""Runs tests/releases once for each sglang release, in a process of its own, with that release's wheel in front.

    python tests/releases/matrix.py [--all] [release ...]

Wheels are fetched once and kept unpacked in $SGLANG_NSA_FUSED_WHEELS (~/.cache/sglang-nsa-fused/wheels).
"""

import argparse
import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from sglang_nsa_fused import releases

ROOT = Path(__file__).parents[2]
ALL = tuple(version for release in releases.RELEASES for version in release.versions)
NEIGHBOURS = {"0.5.8", "0.5.10", "0.5.12", "0.5.13", "0.5.15", "0.5.18"}  # have what the next one has
FIRST_FOR_PYTHON_3_11 = "0.5.22"
PYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"  # from 0.5.11 wheels are for one version of CPython


class Result(NamedTuple):
    release: str
    names: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0
    finding: str = ""  # why there is no result
    log: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.passed and not self.failed and not self.finding)


def number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:3])


def unpacked(release: str) -> Path:
    """The folder with the release's wheel, fetched where it is not there yet."""
    cache = Path(os.environ.get("SGLANG_NSA_FUSED_WHEELS") or Path.home() / ".cache/sglang-nsa-fused/wheels")
    folder = cache / f"{release}-{PYTHON}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=cache, prefix=f"{release}-"))
    try:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(work / "wheel"),
            f"sglang=={release}",
        ]
        for last in (False, True):
            pip = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if pip.returncode == 0:
                break
            if last:
                raise RuntimeError(f"no wheel: {(pip.stderr.strip().splitlines() or ['pip says nothing'])[-1]}")
            time.sleep(5)
        (wheel,) = (work / "wheel").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "unpacked")
        try:
            (work / "unpacked").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster
                raise
        return folder
    finally:
        shutil.rmtree(work)


def run(release: str, timeout: float) -> Result:
    start = time.monotonic()
    if number(release) >= number(FIRST_FOR_PYTHON_3_11) and sys.version_info < (3, 11):
        return Result(release, finding="needs Python 3.11")
    try:
        folder = unpacked(release)
    except (RuntimeError, OSError, subprocess.TimeoutExpired, zipfile.BadZipFile) as error:
        return Result(release, finding=str(error), seconds=time.monotonic() - start)
    names = "DSA" if (folder / "sglang/srt/layers/attention/dsa_backend.py").is_file() else "NSA"
    with tempfile.TemporaryDirectory() as work:
        report, log = Path(work, "report.xml"), Path(work, "log")
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
            "SGLANG_NSA_FUSED_TEST_RELEASE": release,
            "PYTHONDONTWRITEBYTECODE": "",  # else each run compiles all of the wheel that it imports
        }
        # The script, not the module: with `python -m pytest` the working tree would hide the installed plugin.
        command = [
            os.path.join(sysconfig.get_path("scripts"), "pytest"),
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "tests/releases",
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            finding = ""
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                finding = f"not done after {timeout:.0f} s"
            finally:
                if process.poll() is None:  # its group, with the processes that tests started
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = log.read_text(errors="replace")
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        if report.is_file():
            suite = ElementTree.parse(report).find("testsuite")
            counts = {name: int(suite.get(name)) for name in counts}
        elif not finding:
            finding = f"pytest ended with {process.returncode} and no report"
    failed = counts["failures"] + counts["errors"]
    if not finding and not failed and process.returncode:
        finding = f"pytest ended with {process.returncode}"
    passed = counts["tests"] - failed - counts["skipped"]
    return Result(release, names, passed, failed, counts["skipped"], time.monotonic() - start, finding, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", nargs="*")
    parser.add_argument("--all", action="store_true", help="with the releases that have the same code as the next one")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one release")
    args = parser.parse_args()
    args.release = args.release or [release for release in ALL if args.all or release not in NEIGHBOURS]

    console = Console()
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run, release, args.timeout) for release in args.release]
        for done in concurrent.futures.as_completed(runs):
            result = done.result()
            console.print(f"sglang {result.release}: {'passed' if result.ok else 'FAILED'}, {result.seconds:.0f} s")
            if not result.ok and result.log:
                console.print(result.log, markup=False, highlight=False, soft_wrap=True)

    table = Table("release", "names", "passed", "failed", "skipped", "seconds", "")
    results = [done.result() for done in runs]
    for result in results:
        numbers = (str(n) for n in (result.passed, result.failed, result.skipped, round(result.seconds)))
        table.add_row(result.release, result.names, *numbers, result.finding, style=None if result.ok else "red")
    console.print(table)
    passed = sum(result.ok for result in results)
    console.print(f"{passed} of {len(results)} releases passed in {time.monotonic() - start:.0f} s")
    return int(passed < len(results))


if __name__ == "__main__":
    sys.exit(main())
