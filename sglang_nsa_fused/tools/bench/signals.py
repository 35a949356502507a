"""Ctrl-C and its like: they end what runs, and never between a start and what must follow it."""

import contextlib
import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def uninterrupted():
    """Holds Ctrl-C and its like back to the end of the block. Child processes inherit no handler, as they would a mask."""
    came = []
    before = {number: signal.signal(number, lambda *_: came.append(1)) for number in ENDING if not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def is_ignored(number: int) -> bool:
    """Under nohup a closed terminal is; a shell's background job has Ctrl-C ignored, and that counts all the same."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def interrupt_on_signals() -> None:
    """Whoever ends this process, or closes its terminal, ends it as Ctrl-C does, so that no server is left."""
    for number in ENDING:
        if not is_ignored(number):
            signal.signal(number, interrupt)


def interrupt(*_):
    raise KeyboardInterrupt
