"""What stands in for a machine with sglang on it, and for its servers, in the tests of the benchmarks."""

import itertools
import os
import random
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sglang_nsa_fused.tools.patch import LOADER

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_server.py").resolve())])


def stub_site(folder: Path, sglang: str | None = "0.5.12.post1", loader: bool = True, gpu: bool = True) -> Path:
    """What stands in for torch and sglang where the bench asks what the servers will run on."""
    torch = folder / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text(
        "__version__ = '2.11.0'\n"
        "class cuda:\n"
        f"    is_available = staticmethod(lambda: {gpu})\n"
        "    get_device_name = staticmethod(lambda: 'Fake H100')\n"
    )
    if sglang:
        (folder / "sglang" / "srt").mkdir(parents=True)
        (folder / "sglang" / "__init__.py").touch()
        if loader:
            (folder / "sglang" / LOADER).parent.mkdir()
            (folder / "sglang" / LOADER).touch()
        info = folder / f"sglang-{sglang}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {sglang}\n")
    return folder


PORTS_APART = 1000  # of the two servers of tests/e2e
NO_GPU = "none"  # of fake servers: the memory of a real GPU, which others use, would be taken for theirs


_numbers = itertools.count(random.randrange(120))


def free_port() -> int:
    """Of a server, with the three after it, and those 500, 1000 and 1500 higher. Others in each call, and in each of pytest's
    workers; below those that outgoing connections get."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        first = 20_000 + 2_000 * (worker % 5) + 4 * (next(_numbers) % 120)
        if all(is_free(port + more) for port in (first, first + PORTS_APART) for more in (0, 1)):
            return first


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Waits for it as long as all of these run: a busy machine may take any time."""
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
