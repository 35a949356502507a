"""Whether step backends would build the same metadata, so that one set of buffers serves all."""

import types

import torch


def steps_are_alike(backends: list) -> bool:
    """Whether all that these backends' methods read of them is equal, so that equal batches give equal metadata.

    What only the constructor stores does not count: upstream's step number, which no method reads yet. A release
    that gives steps lengths of their own reads it, and its steps are not alike.
    """
    read = _names(type(backends[0]))
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


def _same(a, b) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)


def buffer_bytes(buffers: dict) -> int:
    """Bytes of device memory behind upstream's captured buffers, each storage once."""
    storages = {}
    for value in buffers.values():
        for tensor in (value, *vars(value).values()) if hasattr(value, "__dict__") else (value,):
            if isinstance(tensor, torch.Tensor):
                storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
