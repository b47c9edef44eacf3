"""Means over seeds with their intervals, and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
DIVERGED = "diverged"
"""What is shown in place of NaN and infinity, which a run that diverged reports."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: the arithmetic mean.
        half_width: half the width of the 95 % Student-t interval of the mean; None for a single seed, which
            tells nothing about the spread.
        n: number of seeds.
    """

    mean: float
    half_width: float | None
    n: int

    def format(self, digits: int, *, sign: bool = False) -> str:
        """The estimate as tables print it: ``98.12 ± 0.30``, the mean alone for a single seed, ``diverged`` for none.

        >>> Estimate(98.123, 0.304, 5).format(2), Estimate(0.123, None, 1).format(2, sign=True)
        ('98.12 ± 0.30', '+0.12')
        """
        if not math.isfinite(self.mean):
            return DIVERGED
        width = "" if self.half_width is None else f" ± {number(self.half_width, digits)}"
        return f"{number(self.mean, digits, sign=sign)}{width}"

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width


@dataclass(frozen=True, slots=True)
class Ratio(Estimate):
    """A geometric mean of ratios; its interval reaches from ``mean / factor`` to ``mean * factor``.

    Args:
        factor: at least 1; None for a single measurement. ``half_width`` is None always: the two sides differ.
    """

    factor: float | None = None

    def format(self, digits: int, *, sign: bool = False) -> str:
        """The ratio as tables print it: ``0.90 [0.85, 0.95]``, the mean alone for a single measurement.

        >>> Ratio(0.9, None, 3, factor=1.06).format(2)
        '0.90 [0.85, 0.95]'
        """
        if not math.isfinite(self.mean):  # no time was measured, which nothing but an odd clock explains
            return "–"
        low, high = self.low, self.high
        reach = "" if low is None or high is None else f" [{number(low, digits)}, {number(high, digits)}]"
        return f"{number(self.mean, digits, sign=sign)}{reach}"

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.factor is None else self.mean / self.factor

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.factor is None else self.mean * self.factor


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """``value`` as people read it: thousands apart, a true minus sign, no minus before a zero; NaN as what it is of.

    >>> number(66048, 0), number(-0.0123, 3), number(0.0123, 3, sign=True), number(-0.0001, 2, sign=True)
    ('66,048', '−0.012', '+0.012', '0.00')
    """
    if not math.isfinite(value):
        return DIVERGED
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")
    return text if any(c in "123456789" for c in text) else text.lstrip("+−")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % Student-t interval of ``values``, one value per seed.

    The half width is t(0.975, n-1) · s / √n with the sample deviation s. It describes the variation over
    seeds alone: initial weights and data order, not another draw of the data.

    Raises:
        ValueError: no value at all.

    >>> estimate([1.0, 2.0, 3.0]).format(3)
    '2.000 ± 2.484'
    """
    if len(values) == 0:
        raise ValueError("an estimate needs at least one value, received none.")
    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    if n == 1 or not np.isfinite(sample).all():
        # A diverged run (NaN, infinity) leaves the mean NaN or infinite and the spread without meaning.
        return Estimate(float(sample.sum()) / n, None, n)
    # Equal values have no spread; the deviation of their rounded mean would be a trace of one.
    spread = sample.std(ddof=1) if np.ptp(sample) > 0 else 0.0
    half_width = stats.t.ppf((1 + CONFIDENCE) / 2, df=n - 1) * spread / math.sqrt(n)
    return Estimate(float(sample.mean()), float(half_width), n)


def ratio(values: Sequence[float]) -> Ratio:
    """Geometric mean and 95 % interval of ratios: :func:`estimate` of their logarithms.

    A ratio of 1/2 and one of 2 cancel. Runs of one command share one measurement of speed; times are never equal by
    chance, so equal values count once.

    Raises:
        ValueError: no value at all.

    >>> ratio([0.5, 2.0]).mean, ratio([0.9, 0.9, 0.9]).n
    (1.0, 1)
    """
    distinct = sorted(set(values))
    if any(not (math.isfinite(value) and value > 0) for value in distinct):
        return Ratio(math.nan, None, len(distinct))
    logs = estimate([math.log(value) for value in distinct])
    # Bounded, because exp overflows beyond 709.
    factor = None if logs.half_width is None else math.exp(min(logs.half_width, 700.0))  # two of them: t is 12.7
    return Ratio(math.exp(logs.mean), None, logs.n, factor)


def ranks(values: Sequence[float | None], *, higher_is_better: bool) -> list[int | None]:
    """Rank of each value, 1 the best; equal values share the better rank, and the next rank is left out.

    Args:
        values: what is ranked; None and NaN have no rank.
        higher_is_better: True for accuracies, False for losses, parameters and seconds.

    >>> ranks([0.474, 0.472, 0.468, 0.472, None], higher_is_better=False)
    [4, 2, 1, 2, None]
    """
    known = [v for v in values if v is not None and not math.isnan(v)]
    order = sorted(known, reverse=higher_is_better)
    # index() finds the first of equal values, hence they share the better rank.
    return [None if v is None or math.isnan(v) else 1 + order.index(v) for v in values]
