"""What upstream allocates and we do not: buffers of their own for draft steps that are alike, and the wide page table."""

import ast
import contextlib
import functools
import inspect
import logging
import textwrap
import types
from typing import Any, Iterator

import torch

logger = logging.getLogger("sglang_nsa_fused")

# Set anew for each batch, and ours.
OF_BATCHES = {"forward_metadata", "_draft_extend", "_replays", "_copies", "_said", "verify_mask"}


def steps_are_alike(backends: list) -> bool:
    """Whether all that these backends' methods read of them is equal, so that equal batches give equal metadata.

    What only the constructor stores does not count: upstream's step number, which no method reads yet. A release
    that gives steps lengths of their own reads it, and its steps are not alike.
    """
    read = _names(type(backends[0])) - OF_BATCHES
    first, *others = ({name: value for name, value in vars(b).items() if name in read} for b in backends)
    return all(
        type(backend) is type(backends[0]) and mine.keys() == first.keys() and all(map(_same, mine.values(), first.values()))
        for backend, mine in zip(backends[1:], others)
    )


def _names(cls: type) -> set[str]:
    """Every attribute that a method of the class, but its constructors, names."""
    found: set[str] = set()

    def visit(code: types.CodeType) -> None:
        found.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                visit(constant)

    for base in cls.__mro__:
        for name, method in vars(base).items():
            method = getattr(method, "fget", getattr(method, "__func__", method))
            if name != "__init__" and isinstance(method, types.FunctionType):
                visit(method.__code__)
    return found


def _same(a, b, depth: int = 3) -> bool:
    """Whether a method that reads either does the same. Objects that compare by identity count by their attributes."""
    if a is b:
        return True
    if type(a) is not type(b) or depth == 0:
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, functools.partial):
        return all(_same(getattr(a, name), getattr(b, name), depth - 1) for name in ("func", "args", "keywords"))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key], depth - 1) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(one, other, depth - 1) for one, other in zip(a, b))
    if type(a).__eq__ is object.__eq__ and not callable(a) and hasattr(a, "__dict__"):
        return _same(vars(a), vars(b), depth - 1)
    try:
        return bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # such as tensors within a dataclass
        return False


def buffer_bytes(buffers: dict) -> int:
    """Bytes of device memory behind upstream's captured buffers, each storage once."""
    storages = {}
    for value in buffers.values():
        for tensor in (value, *vars(value).values()) if hasattr(value, "__dict__") else (value,):
            if isinstance(tensor, torch.Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def drop_terms(cls: Any, flag: str, draft_tokens: str) -> tuple[str, ...]:
    """The terms of upstream's condition for a step backend without the wide page table, in order; none where its
    `init_cuda_graph_state` sets the flag in another way, or asks about speculation beside the one term for it.

    cls: upstream's step backend. flag: the attribute that the method sets. draft_tokens: the one that says speculation.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.init_cuda_graph_state)))
    except (OSError, TypeError, SyntaxError):  # without a source we cannot know
        return ()
    values = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == f"self.{flag}"]
    if len(values) != 1 or not isinstance(values[0], ast.BoolOp) or not isinstance(values[0].op, ast.And):
        return ()
    terms = tuple(map(ast.unparse, values[0].values))
    asked = sum(isinstance(n, ast.Attribute) and n.attr == draft_tokens for n in ast.walk(tree))
    return terms if f"not self.{draft_tokens}" in terms and asked == 1 else ()


@contextlib.contextmanager
def hidden(backend, name: str) -> Iterator[None]:
    """Inside, this attribute is None."""
    value = getattr(backend, name)
    setattr(backend, name, None)
    try:
        yield
    finally:
        setattr(backend, name, value)


def not_allocated(backend, req_to_token: torch.Tensor, max_rows: int) -> int:
    """Bytes that the wide page table of so many rows would take more than the narrow one in its place."""
    narrow = backend.decode_cuda_graph_metadata["real_page_table"]
    return (max_rows * req_to_token.shape[1] - narrow.numel()) * narrow.element_size()


class NotAllocated:
    """What the backends of this process do without, said once for each runner with all before it."""

    def __init__(self):
        self._bytes: dict[tuple[str, int], int] = {}  # (runner, the backend's id) -> bytes

    def say(self, runner: str, backend, size: int) -> None:
        if not size or self._bytes.get((runner, id(backend))) == size:
            return
        self._bytes[runner, id(backend)] = size
        sums: dict[str, int] = {}
        for (name, _), count in self._bytes.items():
            sums[name] = sums.get(name, 0) + count
        each = ", ".join(f"{name} {count / 2**30:.3f} GiB" for name, count in sums.items())
        logger.info("sglang-nsa-fused: not allocated: %s; %.3f GiB in all", each, sum(sums.values()) / 2**30)
