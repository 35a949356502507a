"""Upstream's own Triton kernels on a CPU, by Triton's interpreter: in place of torch_forms.py, which is ours."""

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from unittest import mock

from sglang_nsa_fused.tools import stand_ins

LENGTHS = (
    "sglang.srt.layers.attention.utils",
    "sglang.srt.layers.attention.triton_ops.pad",
    "sglang.kernels.ops.attention.pad",
)
INTERPRETED = {"TRITON_INTERPRET": "1"}


def prepare() -> None:
    """Call before anything imports triton: its own functions are made for the interpreter at import."""
    with mock.patch.dict(os.environ, INTERPRETED):
        import triton.experimental.gluon  # noqa: F401 - the first launch imports it
        from triton.runtime.interpreter import InterpreterBuilder
    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, _with_bools(getattr(InterpreterBuilder, name), at))


def _with_bools(method, at: int):
    """With newer numpys a mask may come as integers, which the interpreter then refuses."""

    @functools.wraps(method)
    def call(self, *args):
        args[at].data = args[at].data.astype(bool)
        return method(self, *args)

    return call


def load(name: str, folder: Path):
    """Upstream's function of this name from a copy of its module that takes CPU tensors; None: this release has none."""
    paths = stand_ins.MODULES["generator"] if name.startswith("fused_") else LENGTHS
    files = [sys.modules[path].__file__ for path in paths if path in sys.modules]
    source = next((text for text in (Path(file).read_text() for file in files) if f"def {name}(" in text), None)
    if source is None:
        return None
    copy = folder / f"{name}_on_cpu.py"
    copy.write_text(re.sub(r"^( *)assert \w+\.is_cuda$", r"\1pass", source, flags=re.MULTILINE))
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    loaded = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, INTERPRETED):
        spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def places(name: str, backend, release) -> list:
    """The modules of this release that call a function of this name."""
    modules = [backend] if "backend" in stand_ins.KERNELS[name] else []
    for key in stand_ins.KERNELS[name]:
        modules += [sys.modules.get(path.format(n=release.names)) for path in stand_ins.MODULES.get(key, ())]
    return [module for module in modules if hasattr(module, name)]
