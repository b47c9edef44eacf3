"""The position of a run, and the two ways in which it can end early."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field
from typing import Any

from better_attention.lab.tasks.base import Task


class DivergedError(RuntimeError):
    """Training cannot go on: a loss or a gradient is not finite."""


class Interrupted(Exception):  # noqa: N818 - no error: the user asked for it
    """The run was asked to stop, by ``signal``; it is saved and can be continued."""

    signal: int = signal.SIGINT


@dataclass
class Position:
    """The position of a run, as plain values: with the tensors of a checkpoint, its complete state."""

    epoch: int = 1  # the epoch in progress, from 1
    step: int = 0  # updates done in it
    loss: float = 0.0  # summed over the samples of the epoch so far
    correct: float = 0.0
    seconds: float = 0.0  # spent training in this epoch; evaluation, saving and display excluded
    waiting: float = 0.0  # of these, the seconds spent preparing batches
    best_epoch: int = 0
    best_loss: float = math.inf
    curve: list[dict[str, float]] = field(default_factory=list)  # finished epochs
    sessions: list[dict[str, Any]] = field(default_factory=list)  # commit, threads, processes of each part of the run

    def finished(self, task: Task) -> bool:
        """Whether all epochs are used, ``task.patience`` of them brought no improvement, or the task is solved."""
        if self.curve and task.solved(self.curve[-1]):
            return True
        # The epoch in progress does not count as waited for.
        waited = self.epoch - 1 - self.best_epoch
        return self.epoch > task.epochs or (task.patience > 0 and waited >= task.patience)
