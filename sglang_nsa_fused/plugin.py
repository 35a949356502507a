"""Entry point: reads the gate, finds the release, installs the hooks. Imports only the standard library by itself."""

import functools
import importlib
import logging

logger = logging.getLogger("sglang_nsa_fused")


class Unsupported(Exception):
    """Why this installation keeps upstream's code; the text says what to do."""


def activate(direct: bool = False) -> None:
    """Called in each process that loads plugins; inert unless the gate is set.

    direct: not by sglang's loader, so that nobody would apply hooks.
    """
    from sglang_nsa_fused.settings import REQUIRED, Settings, is_required

    required = is_required()  # also where another variable has a value that cannot be
    try:
        settings = Settings.from_env()
        if settings.enabled:
            install(settings, direct)
    except Exception as error:
        # At start-up a problem leaves upstream untouched; sglang would swallow it, so a required plugin must exit.
        finding = error if isinstance(error, (Unsupported, ValueError)) else f"{type(error).__name__}: {error}"
        if required:
            raise SystemExit(f"sglang-nsa-fused: not active: {finding} ({REQUIRED} is set)") from error
        logger.warning("sglang-nsa-fused: not active, sglang runs unchanged: %s", finding)


def install(settings, direct: bool = False) -> None:
    """Replaces upstream's two classes, through sglang's hook registry where it has one. Raises Unsupported."""
    release, version = find_release()
    module = import_backend(release)
    names = release.backend, release.multi_step
    registry = None if direct else _hook_registry()
    registered = registry is not None and registry.HookRegistry.apply_hooks.__module__ == __name__
    if registered or getattr(module, names[0]).__module__.startswith("sglang_nsa_fused"):
        return  # loaded in two ways, or twice
    from sglang_nsa_fused.backends import subclasses

    ours = dict(zip(names, subclasses(release, module, version, settings)))
    for name, cls in ours.items():
        if registry is None:
            # Whoever makes a backend imports the class from the module as late as that.
            setattr(module, name, cls)
        else:
            registry.HookRegistry.register(f"{release.module}.{name}", cls, registry.HookType.REPLACE)
    if registry is not None:
        _check_once_applied(registry, module, ours, settings)


def _check_once_applied(registry, module, ours: dict[str, type], settings) -> None:
    """Of several plugins that replace a class, or a method of ours, sglang takes the last, or the method. Where that is
    another's, the rest of ours would not do: both classes go, and it is said."""
    upstreams, apply_hooks = {name: getattr(module, name) for name in ours}, registry.HookRegistry.apply_hooks

    def apply_and_check():
        others = _replaced_methods(registry, module.__name__, ours, upstreams)
        if others:  # theirs belong to sglang's classes then
            hooks = registry.HookRegistry._hooks
            for name, cls in ours.items():
                target = f"{module.__name__}.{name}"
                if left := [hook for hook in hooks.pop(target, ()) if hook[1] is not cls]:
                    hooks[target] = left
        apply_hooks()
        taken = {name: found for name, cls in ours.items() if not issubclass(found := getattr(module, name), cls)}
        if not taken:
            return
        for name in ours.keys() - taken.keys():
            setattr(module, name, upstreams[name])
        if not others:
            others = [f"{name} with {found.__module__}.{found.__qualname__}" for name, found in taken.items()]
        finding = (
            f"another plugin replaces {', '.join(others)}, and sglang takes the last; leave one of them out of SGLANG_PLUGINS"
        )
        if settings.required:
            raise SystemExit(f"sglang-nsa-fused: not active: {finding}")
        logger.warning("sglang-nsa-fused: not active: %s", finding)

    registry.HookRegistry.apply_hooks = staticmethod(apply_and_check)


def _replaced_methods(registry, module: str, ours: dict[str, type], upstreams: dict[str, type]) -> list[str]:
    """What ours override and another plugin replaces. Where it only wraps a method, ours stays inside."""
    hooks, found = getattr(registry.HookRegistry, "_hooks", {}), []  # nothing public tells
    for name, cls in ours.items():
        bases = cls.__mro__[: cls.__mro__.index(upstreams[name])]
        for method in sorted({method for base in bases for method in vars(base)}):
            kinds = [hook[0] for hook in hooks.get(f"{module}.{name}.{method}", ())]
            if registry.HookType.REPLACE in kinds:
                found.append(f"{name}.{method}")
    return found


def _hook_registry():
    """None before sglang 0.5.11."""
    try:
        return importlib.import_module("sglang.srt.plugins.hook_registry")
    except ModuleNotFoundError:
        return None


def find_release():
    """(Release, version of the installed sglang). For an sglang newer than all known the newest Release, which
    `import_backend` then checks. Raises Unsupported."""
    from importlib.metadata import PackageNotFoundError, version

    from sglang_nsa_fused import releases

    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise Unsupported("sglang is not installed; install sglang-nsa-fused[sglang]") from None
    release = releases.find(installed) or releases.newest(installed)
    if release is None:
        raise Unsupported(_unsupported(installed))
    return release, installed


def import_backend(release):
    """The module with upstream's classes, checked for the names that the subclasses rely on. Raises Unsupported."""
    from sglang_nsa_fused import releases, start_check

    _, installed = find_release()
    known = releases.find(installed) is not None
    try:
        module = importlib.import_module(release.module)
    except ModuleNotFoundError as error:
        if known or not release.module.startswith(error.name or " "):
            raise
        raise Unsupported(_unsupported(installed, f"it has no {release.module}")) from error
    missing = start_check.missing_names(release, module)
    if missing:
        lacks = f"{release.module} lacks {', '.join(missing)}"
        changed = f"sglang was changed: {lacks}; reinstall sglang"
        raise Unsupported(changed if known else _unsupported(installed, lacks))
    if not known:
        if unknown := start_check.unknown_names(release, module):
            raise Unsupported(_unsupported(installed, f"in {release.module} {', '.join(unknown)}"))
        _say_untested(untested(installed, release))
    return module


def _unsupported(version: str, why: str = "") -> str:
    from sglang_nsa_fused import releases

    text = f"sglang {version} is not supported; supported are {releases.supported_versions()}"
    return f"{text}; {why}" if why else text


def untested(version: str, release) -> str:
    return f"sglang {version} is untested; what the plugin relies on is as in {release.versions[-1]}"


@functools.lru_cache(None)
def _say_untested(finding: str) -> None:
    logger.warning("sglang-nsa-fused: %s", finding)
