"""Timing things against each other on a machine that does other work as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


def alternate(
    competitors: Sequence[T],
    rounds: int,
    *,
    least: int = 1,
    seconds: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, T]]:
    """Whose turn it is: in each round every competitor once, every second round in reverse order.

    What slows the machine down for a while then slows all of them, so that a ratio formed within a round is sound; and
    none always follows the same other one, whose data it would find in the caches.

    Args:
        competitors: what is timed.
        rounds: at most.
        least: rounds that are run however long they take.
        seconds: no further round begins after this long.
        stop: asked between two rounds; ends them, whatever ``least`` says.

    Yields:
        The number of the round, from 0, and the competitor.

    >>> [f"{turn}{name}" for turn, name in alternate("ab", 3)]
    ['0a', '0b', '1b', '1a', '2a', '2b']
    """
    began = perf_counter()
    for turn in range(rounds):
        if turn and (stop() or (turn >= least and perf_counter() - began >= seconds)):
            return
        for competitor in competitors if turn % 2 == 0 else reversed(competitors):
            yield turn, competitor
