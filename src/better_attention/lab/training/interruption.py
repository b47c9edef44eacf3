"""Ctrl-C as a wish: training ends its step and saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from better_attention.lab.training.events import Watcher


@dataclass
class Stop:
    """Turns the first Ctrl-C or SIGTERM into a wish that training asks for; the second acts at once."""

    watcher: Watcher
    signal: int | None = None
    previous: dict[int, Any] = field(default_factory=dict)

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        self.watcher.stopping()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the block runs; signals reach the main thread alone, so elsewhere nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.previous = {number: signal.signal(number, self._wish) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._restore()
