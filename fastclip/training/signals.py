"""Asking a run to end: SIGTERM, SIGUSR1 or Ctrl-C let it finish its step, save and leave; a second Ctrl-C ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GO_ON, SAVE_AND_END, INTERRUPT = 0, 1, 2  # the larger one wins where ranks differ

_MEANING = {signal.SIGTERM: SAVE_AND_END, signal.SIGUSR1: SAVE_AND_END, signal.SIGINT: INTERRUPT}


class Request:
    """What this process has been asked for so far."""

    def __init__(self) -> None:
        self.value = GO_ON
        self.arrived = threading.Event()

    def receive(self, number: int, frame: object) -> None:
        self.value = max(self.value, _MEANING[signal.Signals(number)])
        self.arrived.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def requests_to_end() -> Iterator[Request]:
    """Turns those signals into a `Request` that the loop looks at between steps; only the main thread can."""
    request = Request()
    before = {number: signal.signal(number, request.receive) for number in _MEANING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
