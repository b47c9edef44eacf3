"""Graceful interruption.

The first Ctrl-C or SIGTERM lets the current update finish and saves a checkpoint; the second ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from better_attention.lab.training.events import Notify, Stopping, ignore


@dataclass
class Stop:
    """A request to stop, which training polls after every update: true once a signal has arrived.

    Args:
        notify: receives :class:`Stopping` when the signal arrives.
        signal: number of the signal; None before.
        previous: the signal handlers to go back to.
    """

    notify: Notify = ignore
    signal: int | None = None
    previous: dict[int, Any] = field(default_factory=dict)

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # First of all: should showing the message block, a second signal still ends the process.
        self._restore()
        self.notify(Stopping())

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the block runs. Outside the main thread, which alone receives signals, nothing changes."""
        # In any other thread signal.signal raises ValueError.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._restore()
