"""The forest plot of a report: differences to standard with their intervals, a line each, as numbers for inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from better_attention.lab.analysis.paired import Comparison, p_text
from better_attention.lab.analysis.summary import Column, Row

MARGIN = 2.0
"""What is left free at both ends of a line that is 100 wide."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One difference.

    Args:
        mechanism: its name.
        heads: its number of heads.
        at: place of the mean on a line from 0 to 100, zero at 50; None where the mean is no number.
        low, high: places of the interval's ends; None where there is none.
        text: difference, interval and corrected p.
        verdict: what it shows.
        shown: whether the verdict is a difference.
    """

    mechanism: str
    heads: int
    at: float | None
    low: float | None
    high: float | None
    text: str
    verdict: str
    shown: bool


@dataclass(frozen=True, slots=True)
class Forest:
    """The differences in one metric; the line reaches from ``-reach`` to ``+reach``, as text."""

    column: Column
    reach: str
    bars: list[Bar]


def forest(rows: Sequence[Row], column: Column) -> Forest | None:
    """The differences to standard in ``column``, in the order of ``rows``; None where there is none."""
    tests = [(row, row.tests[column.key]) for row in rows if column.key in row.tests]
    if not tests:
        return None
    ends = [
        abs(end)
        for _, one in tests
        for end in (one.difference.mean, one.difference.low, one.difference.high)
        if end is not None and math.isfinite(end)
    ]
    # Where every difference is zero any reach will do, but the logarithm needs a positive one.
    reach = _round_up(max(ends, default=0.0) or 1.0)

    def place(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(50 + (50 - MARGIN) * value / reach, 3)

    bars = [
        Bar(
            mechanism=row.mechanism,
            heads=row.heads,
            at=place(one.difference.mean),
            low=place(one.difference.low),
            high=place(one.difference.high),
            text=_text(one, column),
            verdict=one.verdict,
            shown=one.shows,
        )
        for row, one in tests
    ]
    return Forest(column, f"{reach:g}", bars)


def _text(one: Comparison, column: Column) -> str:
    difference = one.difference.format(column.digits, sign=True)
    return difference if one.difference.n == 1 else f"{difference} ({p_text(one.corrected_p)})"


def _round_up(value: float) -> float:
    """The next number with one digit, or with two where the second is a 5 below 3: 4.48 -> 5, 0.0213 -> 0.025."""
    unit = Decimal(10) ** math.floor(math.log10(value))
    # Decimals, so that the step that is compared is exactly the number that is printed.
    steps = (Decimal(step) * unit for step in ("1", "1.5", "2", "2.5", "3", "4", "5", "6", "7", "8", "9", "10"))
    return next(found for step in steps if (found := float(step)) >= value)
