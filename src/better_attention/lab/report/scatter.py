"""The trade-off of a report, result over attention parameters: places of points, intervals and labels, in per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.ticker import MaxNLocator

from better_attention.lab.analysis.advice import Card
from better_attention.lab.analysis.estimates import number
from better_attention.lab.analysis.summary import Column

LETTER = 2.1
"""Width of a letter in per cent of the drawing, where it is narrowest: on a telephone."""
LINE = 7.0
"""Height of a line of text in per cent of the drawing."""
ASIDE = 2.0
"""How far intervals stand apart, in per cent of the drawing: mechanisms of equal parameters have equal places."""


@dataclass(frozen=True, slots=True)
class Point:
    """A mechanism: everything in per cent of the drawing, from the left and from below.

    Args:
        mechanism: its name, which is its label.
        x, y: where it is.
        low, high: ends of the interval; None for a single seed.
        label: height of the label's middle, moved so that no label covers another.
        leftward: whether the label is to the left of the point, since it finds no room to its right.
        text: the numbers in words.
    """

    mechanism: str
    x: float
    y: float
    low: float | None
    high: float | None
    label: float
    leftward: bool
    text: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """The drawing: its points and the ticks of both axes as (place, text)."""

    column: Column
    points: list[Point]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def scatter(cards: Sequence[Card], column: Column) -> Scatter | None:
    """Result over attention parameters, a point a mechanism; None for fewer than two."""
    shown = [card for card in cards if card.params is not None and math.isfinite(card.value.mean)]
    if len(shown) < 2:
        return None
    ends = [end for c in shown for end in (c.value.mean, c.value.low, c.value.high) if end is not None]
    # From zero, so that twice the distance means twice the parameters.
    across = _ticks(0.0, max(float(card.params or 0) for card in shown) or 1.0)
    up = _ticks(min(ends), max(ends))
    points = [_point(card, column, across, up) for card in shown]
    return Scatter(
        column,
        _apart(_aside(points)),
        [(_place(tick, across), number(tick, 0)) for tick in across],
        # Ten digits hide the rounding error of a tick such as 0.30000000000000004.
        [(_place(tick, up), f"{tick:.10g}".replace("-", "−")) for tick in up],
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, the first not above ``low`` and the last not below ``high``."""
    # Equal results have no range, but an axis needs one.
    if not low < high:
        low, high = low - 1.0, low + 1.0
    return [float(tick) for tick in MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _place(value: float, ticks: Sequence[float]) -> float:
    return round(100 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)


def _point(card: Card, column: Column, across: Sequence[float], up: Sequence[float]) -> Point:
    value, params = card.value, card.params or 0
    x, y = _place(params, across), _place(value.mean, up)
    interval = f" ± {number(value.half_width, column.digits)}" if value.half_width is not None else ""
    return Point(
        mechanism=card.mechanism,
        x=x,
        y=y,
        low=None if value.low is None else _place(value.low, up),
        high=None if value.high is None else _place(value.high, up),
        label=y,
        leftward=x + LETTER * (len(card.mechanism) + 2) > 100,
        text=f"{number(params, 0)} parameters, {number(value.mean, column.digits)}{interval}",
    )


def _aside(points: Sequence[Point]) -> list[Point]:
    """The points, moved to the sides where one interval would cover another."""
    moved = list(points)
    order = sorted(range(len(points)), key=lambda place: (points[place].x, -points[place].y))
    groups: list[list[int]] = []
    for place in order:
        if groups and points[place].x - points[groups[-1][-1]].x < ASIDE:
            groups[-1].append(place)
        else:
            groups.append([place])
    for group in groups:
        middle = sum(points[place].x for place in group) / len(group)
        for rank, place in enumerate(group):
            if len(group) > 1:
                point, aside = points[place], rank - (len(group) - 1) / 2
                x = round(middle + ASIDE * aside, 2)
                # On the left the label is on the left, if nobody is in the way: to the right it crosses an interval.
                begin = x - LETTER * (len(point.mechanism) + 2)
                free = begin >= 0 and not any(begin - ASIDE < other.x < x - ASIDE for other in points)
                leftward = point.leftward or (aside < 0 and free)
                moved[place] = replace(point, x=x, leftward=leftward)
    return moved


def _apart(points: Sequence[Point]) -> list[Point]:
    """The points with their labels moved up, then down from the upper edge, so that none covers another."""
    order = sorted(range(len(points)), key=lambda place: points[place].y)
    heights = [point.label for point in points]
    for rank, place in enumerate(order):
        below = [heights[k] + LINE for k in order[:rank] if _beside(points[k], points[place])]
        heights[place] = max([heights[place], *below])
    for rank, place in reversed(list(enumerate(order))):
        above = [heights[k] - LINE for k in order[rank + 1 :] if _beside(points[k], points[place])]
        # Half a line below the upper edge, because labels are centred on their height.
        heights[place] = min([heights[place], 100 - LINE / 2, *above])
    return [replace(point, label=round(height, 2)) for point, height in zip(points, heights, strict=True)]


def _beside(one: Point, other: Point) -> bool:
    """Whether two labels share some of the width."""
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _span(point: Point) -> tuple[float, float]:
    width = LETTER * (len(point.mechanism) + 2)
    return (point.x - width, point.x) if point.leftward else (point.x, point.x + width)
