"""Where a run stands, and the two ways in which it can end early."""

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
    """Where a run stands. Plain values; together with the tensors of a checkpoint, all there is to know."""

    epoch: int = 1  # the epoch under way, from 1
    step: int = 0  # updates done in it
    loss: float = 0.0  # summed over the samples of the epoch so far
    correct: float = 0.0
    seconds: float = 0.0  # spent training in this epoch; evaluation, saving and display excluded
    waiting: float = 0.0  # of these, the ones in which the batch was made ready
    best_epoch: int = 0
    best_loss: float = math.inf
    curve: list[dict[str, float]] = field(default_factory=list)  # finished epochs
    sessions: list[dict[str, Any]] = field(default_factory=list)  # commit, threads, processes of each part of the run

    def finished(self, task: Task) -> bool:
        """Whether epochs are used up, validation has not improved for ``task.patience`` of them, or all is solved."""
        if self.curve and task.solved(self.curve[-1]):
            return True
        waited = self.epoch - 1 - self.best_epoch
        return self.epoch > task.epochs or (task.patience > 0 and waited >= task.patience)
