"""Whether the plugin would be active in this environment, check by check."""

import sys
from importlib import metadata
from typing import Callable, Iterator, NamedTuple

from sglang_nsa_fused import kernels, plugin, releases
from sglang_nsa_fused.settings import ALLOWLIST, EXTERNAL, EXTERNAL_PACKAGE, GATE, KEEP_WIDE_TABLE, Settings
from sglang_nsa_fused.tools import bare, patch, table_memory

_WITHOUT = "sglang {} to {}".format(
    *(next(one.versions[0] for one in releases.RELEASES if one.drop_wide_table), releases.RELEASES[-1].versions[-1])
)
GROUP, NAME = "sglang.srt.plugins", "nsa_fused"


class Finding(NamedTuple):
    check: str
    ok: bool
    detail: str  # what was found, or what to do


def examine() -> Iterator[Finding]:
    """Every check in turn; one that fails does not keep the next from running."""
    for name, check in _CHECKS:
        yield Finding(name, *_outcome(check))


def page_tables(context_length: int, max_bs: int, draft_tokens: int) -> list[table_memory.Held]:
    """What the graphs of a server of the installed sglang would hold. Raises plugin.Unsupported where the tables stay as they
    are."""
    release, version = plugin.find_release()
    if release.drop_wide_table is None or releases.find(version) is None:
        raise plugin.Unsupported(f"they stay as they are: the plugin leaves out the wide ones of {_WITHOUT}, this is {version}")
    if Settings.from_env().keep_wide_table:
        raise plugin.Unsupported(f"they stay as they are: {KEEP_WIDE_TABLE} is set")
    held = table_memory.tables(context_length, max_bs, draft_tokens)
    return [*held, table_memory.total(held)]


def _outcome(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except Exception as error:  # each check raises what to do; anything else is a finding too
        expected = isinstance(error, (plugin.Unsupported, patch.Refused, RuntimeError, ValueError))
        return False, str(error) if expected else f"{type(error).__name__}: {error}"


def _python() -> str:
    if sys.version_info < (3, 10):  # noqa: UP036 - pip refuses an older one, PYTHONPATH does not
        raise plugin.Unsupported(f"{sys.version.split()[0]}; use Python 3.10 or newer")
    return sys.version.split()[0]


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"


def _sglang() -> str:
    release, version = plugin.find_release()
    if releases.find(version) is None:
        return f"{version} is newer than {release.versions[-1]}, the last one tested; its names decide"
    return f"{version} is supported"


def _entry_point() -> str:
    for entry in metadata.entry_points(group=GROUP):
        if entry.name == NAME:
            return f"{entry.name} -> {entry.value}"
    raise plugin.Unsupported(f"{NAME} is not among the entry points of {GROUP}; pip install sglang-nsa-fused")


def _loader() -> str:
    sglang = patch.Installed()
    if sglang.has_loader:
        return f"sglang {sglang.version} loads plugins"
    if Settings.from_env().external:
        return f"{EXTERNAL}={EXTERNAL_PACKAGE}"
    if sglang.state() == "patched":
        return f"{patch.TARGET} is patched to load plugins"
    raise plugin.Unsupported(
        f"sglang {sglang.version} loads no plugins; run sglang-nsa-fused patch apply, or export {EXTERNAL}={EXTERNAL_PACKAGE}"
    )


def _allowlist() -> str:
    allowed = Settings.from_env().allowlist
    if allowed is None:
        return f"{ALLOWLIST} is unset: all plugins load"
    if NAME not in allowed:
        raise plugin.Unsupported(f"{ALLOWLIST}={','.join(allowed)} leaves {NAME} out; add it")
    return f"{ALLOWLIST} names {NAME}"


def _gate() -> str:
    if not Settings.from_env().enabled:
        raise plugin.Unsupported(f"not set; export {GATE}=1")
    return f"{GATE} is set"


def _library() -> str:
    archs = kernels.cuda_archs()
    if not archs:
        raise plugin.Unsupported("built without CUDA; install nvcc 12.4 or newer and reinstall sglang-nsa-fused")
    return f"CUDA for {', '.join(archs)}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise plugin.Unsupported("torch sees no GPU; check the driver with nvidia-smi")
    engine = kernels.select("cuda")
    if engine.generate_plan is None:
        raise plugin.Unsupported(f"the native library does not work on {torch.cuda.get_device_name()}: {engine.reason}")
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, driver {_driver()}, the native library passes its self-check"


def _driver() -> str:
    import ctypes

    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _upstream() -> str:
    import torch

    release, version = plugin.find_release()
    bare.import_upstream(release, "cuda" if torch.cuda.is_available() else "cpu")
    plugin.import_backend(release)
    if releases.find(version) is None:
        return plugin.untested(version, release)
    return f"{len(release.signatures)} names of {release.module} are as expected"


_CHECKS: list[tuple[str, Callable[[], str]]] = [
    ("Python", _python),
    ("torch", _torch),
    ("tvm-ffi", kernels.tvm_ffi_version),
    ("sglang", _sglang),
    ("entry point", _entry_point),
    ("loader", _loader),
    ("allowlist", _allowlist),
    ("gate", _gate),
    ("library", _library),
    ("GPU", _gpu),
    ("upstream names", _upstream),
]
