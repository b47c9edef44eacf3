"""What happens during training, as values: each event is handed to one function, which shows, logs or ignores it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from better_attention.lab.runs.record import RunRecord
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.progress import DivergedError, Position


@dataclass(frozen=True, slots=True)
class DataRead:
    """The data have been read and lie on ``device``."""

    splits: Splits
    device: torch.device


@dataclass(frozen=True, slots=True)
class Estimated:
    """The ``runs`` that are not finished take at most ``seconds``, if each uses all its epochs."""

    seconds: float
    runs: int


@dataclass(frozen=True, slots=True)
class Began:
    """The run ``name``, ``number`` of ``runs`` (from 1), begins or continues; its configuration is on the disk."""

    name: str
    number: int
    runs: int


@dataclass(frozen=True, slots=True)
class Updated:
    """A run has made an update; an epoch has ``steps`` of them.

    ``name`` is its own where several runs are in progress; "": it is that which began last.
    """

    position: Position
    steps: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The run ``name`` is finished, now or since an earlier command."""

    name: str
    record: RunRecord


@dataclass(frozen=True, slots=True)
class Failed:
    """The run ``name`` cannot go on."""

    name: str
    error: DivergedError


@dataclass(frozen=True, slots=True)
class Stopping:
    """The user asked to stop: the run in progress finishes its update and is saved."""


Event = DataRead | Estimated | Began | Updated | Ended | Failed | Stopping
Notify = Callable[[Event], None]
"""A function that is called with every event, in the process in which it happens."""


def ignore(event: Event) -> None:
    """Do nothing with an event."""


def to_all(*listeners: Notify) -> Notify:
    """A function that hands each event to all ``listeners``, in their order."""

    def notify(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return notify
