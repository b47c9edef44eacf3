"""Whoever looks on while a comparison is under way: the screen, a tracker, a test."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.progress import DivergedError, Position


class Watcher:
    """What a comparison tells while it is under way; this one listens to nothing."""

    def data(self, splits: Splits, accelerator: Accelerator) -> None:
        """The data have been read."""

    def estimate(self, seconds: float, runs: int) -> None:
        """The ``runs`` that are not finished take at most this long, every epoch used."""

    def begin(self, name: str, number: int, runs: int) -> None:
        """Run ``number`` of ``runs``, from 1, begins or continues."""

    def progress(self, position: Position, steps: int) -> None:
        """An update was made; an epoch has ``steps`` of them."""

    def end(self, name: str, record: dict[str, Any]) -> None:
        """A run is finished, or had been before."""

    def failed(self, name: str, error: DivergedError) -> None:
        """A run cannot go on."""

    def stopping(self) -> None:
        """The user asked to stop: the run ends its step and is saved."""


class Watchers(Watcher):
    """Tells several watchers the same, in their order."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def data(self, splits: Splits, accelerator: Accelerator) -> None:
        """See :class:`Watcher`."""
        for watcher in self.watchers:
            watcher.data(splits, accelerator)

    def estimate(self, seconds: float, runs: int) -> None:
        """See :class:`Watcher`."""
        for watcher in self.watchers:
            watcher.estimate(seconds, runs)

    def begin(self, name: str, number: int, runs: int) -> None:
        """See :class:`Watcher`."""
        for watcher in self.watchers:
            watcher.begin(name, number, runs)

    def progress(self, position: Position, steps: int) -> None:
        """See :class:`Watcher`."""
        for watcher in self.watchers:
            watcher.progress(position, steps)

    def end(self, name: str, record: dict[str, Any]) -> None:
        """See :class:`Watcher`."""
        for watcher in self.watchers:
            watcher.end(name, record)

    def failed(self, name: str, error: DivergedError) -> None:
        """See :class:`Watcher`."""
        for watcher in self.watchers:
            watcher.failed(name, error)

    def stopping(self) -> None:
        """See :class:`Watcher`."""
        for watcher in self.watchers:
            watcher.stopping()
