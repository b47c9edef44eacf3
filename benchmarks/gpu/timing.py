"""Times on a GPU: events on its own clock, contenders taking turns, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

WARM_UP = 3
"""Calls before anything is measured: the first one compiles, and may try several tiles."""
MILLISECONDS = 20.0
"""A measurement repeats the call for about this long, so that the launch of the first one does not count."""


@dataclass(frozen=True)
class Cell:
    """One contender in one row.

    Args:
        direction: "forward", "forward and backward" or "decode".
        length, width: keys, and features of a head.
        contender: its name.
        milliseconds: median over rounds.
        low, high: the fastest and the slowest round.
        rounds: how many there were.
    """

    direction: str
    length: int
    width: int
    contender: str
    milliseconds: float
    low: float
    high: float
    rounds: int

    def record(self) -> dict[str, Any]:
        """As a row of a table."""
        return asdict(self)


def milliseconds_on_device(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one call, from ``repeats`` of them between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def alternating(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object], int], float] = milliseconds_on_device,
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round.

    Every round starts with another contender, so that none profits from what the one before it left in the caches.

    Args:
        calls: by name.
        rounds: how many.
        clock: what measures, for the tests.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        repeats[name] = max(1, round(MILLISECONDS / max(1e-3, clock(call, 1))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(calls[name], repeats[name]))
    return times


def cells(direction: str, length: int, width: int, times: Mapping[str, list[float]]) -> list[Cell]:
    """What the rounds of one row amount to."""
    return [
        Cell(direction, length, width, name, statistics.median(t), min(t), max(t), len(t)) for name, t in times.items()
    ]
