"""Means over seeds with their intervals, differences seed by seed, and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


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
        """The estimate as tables print it: ``98.12 ± 0.30``, and ``98.12 ± –`` for a single seed.

        >>> Estimate(98.123, 0.304, 5).format(2), Estimate(0.123, None, 1).format(2, sign=True)
        ('98.12 ± 0.30', '+0.12 ± –')
        """
        width = "–" if self.half_width is None else number(self.half_width, digits)
        return f"{number(self.mean, digits, sign=sign)} ± {width}"


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """``value`` as people read it: thousands apart, a true minus sign, and no minus before a zero.

    >>> number(66048, 0), number(-0.0123, 3), number(0.0123, 3, sign=True), number(-0.0001, 2, sign=True)
    ('66,048', '−0.012', '+0.012', '0.00')
    """
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")
    return text.lstrip("+−") if not any(c in "123456789ainf" for c in text) else text


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % Student-t interval of ``values``, one value a seed.

    The half width is t(0.975, n-1) · s / √n with the sample deviation s. It speaks of the seeds alone: initial weights
    and data order, not of another draw of the data.

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
    half_width = stats.t.ppf((1 + CONFIDENCE) / 2, df=n - 1) * sample.std(ddof=1) / math.sqrt(n)
    return Estimate(float(sample.mean()), float(half_width), n)


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Mean of ``ours - baseline`` seed by seed, with its 95 % interval.

    Runs of one seed share data order and, where they can, initial weights, so their difference spreads less than the
    two means do.

    Args:
        ours: seed -> value.
        baseline: seed -> value.

    Returns:
        The estimate over the seeds that both have; None where they share none.

    >>> paired_difference({0: 3.0, 1: 5.0}, {0: 1.0, 1: 3.0, 2: 9.0})
    Estimate(mean=2.0, half_width=0.0, n=2)
    """
    seeds = sorted(ours.keys() & baseline.keys())
    return estimate([ours[seed] - baseline[seed] for seed in seeds]) if seeds else None


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
    return [None if v is None or math.isnan(v) else 1 + order.index(v) for v in values]
