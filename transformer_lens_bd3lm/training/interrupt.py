"""Stopping between two steps: SIGINT (Ctrl-C) and SIGTERM are noted and acted on later.

A signal in the middle of a step would leave some weights with the step and some without. So while
``stop_requests`` is open a signal is only noted, and the loop that asks stops, saves and raises
``TrainingStopped``. A second signal of the same kind acts at once, as it did before.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class TrainingStopped(KeyboardInterrupt):
    """Stop of a training by a signal, after its state was saved.

    Args:
        message: how to go on.
        signal_number: signal that stopped it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Note SIGINT and SIGTERM, and yield a function that returns the first one, or None.

    Python handles signals in its main thread alone: in another thread nothing is noted. Handlers
    are as before afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        _restore(number, before[number])

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            _restore(number, handler)


def _restore(number: int, handler: Any) -> None:
    """Set a signal's handler; one that was not set from Python is the system's own."""
    signal.signal(number, signal.SIG_DFL if handler is None else handler)
