import tempfile
from pathlib import Path

import pytest
from serving import CONTEXT, Configuration, Options, running

from sglang_nsa_fused.tools.bench import process, servers

HERE = Path(__file__).resolve().parent
DRAFT_STEPS = (2, 3, 4, 5, 7)
LOADED = 4  # draft steps of the servers under load, where there is a choice


def pytest_addoption(parser):
    group = parser.getgroup("e2e", "real servers")
    group.addoption("--e2e-cache", default=",".join(servers.CACHES), help="of the servers")
    group.addoption(
        "--e2e-draft-steps", help=f"--speculative-num-steps of the servers; {DRAFT_STEPS}, other than in test_server 4"
    )
    group.addoption("--e2e-minutes", type=float, default=15, help="of the load under which memory is watched")
    group.addoption("--e2e-requests", type=int, default=200, help="that join and leave")
    group.addoption("--e2e-context", type=int, help="--context-length of the servers")
    group.addoption("--e2e-port", type=int, default=30000, help="of the server without the plugin; the other's is 1000 higher")
    group.addoption("--e2e-ready-seconds", type=float, default=900, help="until a pair of servers must be ready")
    group.addoption("--e2e-log-dir", type=Path, help="for the servers' logs")
    group.addoption("--e2e-command", help="in place of sglang's launch_server, and then without a GPU")


def option(config, name: str, default=None):
    return config.getoption(f"e2e_{name}", default)  # not there where the whole of tests/ is collected


def pytest_generate_tests(metafunc):
    if "configuration" in metafunc.fixturenames:
        caches, steps = option(metafunc.config, "cache", "bf16,fp8"), option(metafunc.config, "draft_steps")
        if steps is None:
            steps = DRAFT_STEPS if metafunc.module.__name__ == "test_server" else (4,)
        else:
            steps = tuple(map(int, steps.split(",")))
        if metafunc.function.__name__ == "test_load" and LOADED in steps:
            steps = (LOADED,)
        found = [Configuration.of(cache, count) for count in steps for cache in caches.split(",")]
        metafunc.parametrize("configuration", found, ids=lambda one: one.name, scope="module")


def gpus(config) -> int:
    if option(config, "command"):
        return 2
    import torch  # seconds, of each run against a fake server

    return torch.cuda.device_count()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent == HERE:
            needed = 2 if item.path.name == "test_two_gpus.py" else 1
            if gpus(config) < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' * (needed > 1)}, there are {gpus(config)}"))


@pytest.fixture(scope="session")
def options(request) -> Options:
    log_dir = (option(request.config, "log_dir") or Path(tempfile.mkdtemp(prefix="nsa-e2e-"))).resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    command = option(request.config, "command") or process.COMMAND
    port, context = option(request.config, "port", 30000), option(request.config, "context") or CONTEXT
    return Options(command, port, log_dir, option(request.config, "ready_seconds", 900), context, gpus(request.config))


@pytest.fixture(scope="module")
def pair(configuration, options):
    with running(configuration, options) as pair:
        yield pair


@pytest.fixture(scope="session")
def minutes(request) -> float:
    return option(request.config, "minutes", 15)


@pytest.fixture(scope="session")
def request_count(request) -> int:
    return option(request.config, "requests", 200)
