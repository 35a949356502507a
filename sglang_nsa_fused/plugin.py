"""Entry point: reads the gate, finds the release, installs the hooks. Imports only the standard library by itself."""

import logging

logger = logging.getLogger("sglang_nsa_fused")


class Unsupported(Exception):
    """Why this installation keeps upstream's code; the text says what to do."""


def activate() -> None:
    """Called by sglang in each process that loads plugins; inert unless the gate is set."""
    from sglang_nsa_fused.settings import REQUIRED, Settings

    required = False
    try:
        settings = Settings.from_env()
        required = settings.required
        if settings.enabled:
            install(settings)
    except Exception as error:
        # At start-up a problem leaves upstream untouched; sglang would swallow it, so a required plugin must exit.
        finding = error if isinstance(error, (Unsupported, ValueError)) else f"{type(error).__name__}: {error}"
        if required:
            raise SystemExit(f"sglang-nsa-fused: not active: {finding} ({REQUIRED} is set)") from error
        logger.warning("sglang-nsa-fused: not active, sglang runs unchanged: %s", finding)


def install(settings) -> None:
    """Replaces upstream's two classes through sglang's hook registry. Raises Unsupported."""
    release, version = find_release()
    module = import_backend(release)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_nsa_fused.backends import subclasses

    backend, multi_step = subclasses(release, module, version, settings)
    HookRegistry.register(f"{release.module}.{release.backend}", backend, HookType.REPLACE)
    HookRegistry.register(f"{release.module}.{release.multi_step}", multi_step, HookType.REPLACE)


def find_release():
    """(Release, version of the installed sglang). Raises Unsupported."""
    from importlib.metadata import PackageNotFoundError, version

    from sglang_nsa_fused import releases

    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise Unsupported("sglang is not installed; install sglang-nsa-fused[sglang]") from None
    release = releases.find(installed)
    if release is None:
        raise Unsupported(f"sglang {installed} is not supported; supported are {releases.supported_versions()}")
    return release, installed


def import_backend(release):
    """The module with upstream's classes, checked for the names that the subclasses rely on. Raises Unsupported."""
    import importlib

    from sglang_nsa_fused import releases

    module = importlib.import_module(release.module)
    missing = releases.missing_names(release, module)
    if missing:
        raise Unsupported(f"sglang was changed: {release.module} lacks {', '.join(missing)}; reinstall sglang")
    return module
