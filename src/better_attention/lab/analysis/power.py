"""How many seeds would decide a difference: the power of the paired t-test."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from better_attention.lab.analysis.estimates import CONFIDENCE, Estimate
from better_attention.lab.analysis.paired import LEVEL

POWER = 0.8
"""The chance at which a true difference is to be shown."""

MOST = 1000
"""Numbers of pairs beyond this are not distinguished: nobody trains that many runs."""


POINTS = 4000
"""Deviations over which the power is averaged: its error is then below 0.001."""


def spread(difference: Estimate) -> float | None:
    """The sample deviation of the paired differences, from the interval of their mean; None for a single pair.

    >>> round(spread(Estimate(2.0, 2.4841377, 3)), 6)  # of 1, 2, 3
    1.0
    """
    if difference.half_width is None or difference.n < 2:
        return None
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, df=difference.n - 1))
    return difference.half_width * math.sqrt(difference.n) / quantile


def power(difference: float, deviation: float, pairs: int, level: float = LEVEL) -> float:
    """The chance that the two-sided paired t-test of ``pairs`` pairs shows a true ``difference``.

    The statistic then has a noncentral t distribution of ``pairs`` - 1 degrees of freedom with the noncentrality
    ``difference`` / ``deviation`` · √``pairs`` (Cohen, Statistical Power Analysis, 1988, chapter 2).

    Args:
        difference: the true mean of the differences.
        deviation: their standard deviation, above 0.
        pairs: at least 2.
        level: below this a p counts as a difference.

    >>> f"{power(0.5, 1.0, 34):.3f}"
    '0.808'
    """
    degrees = pairs - 1
    critical = stats.t.ppf(1 - level / 2, df=degrees)
    shift = abs(difference) / deviation * math.sqrt(pairs)
    # Given the deviation that is found the statistic is normal: a mean over that deviation. scipy's own noncentral t
    # gives NaN for many pairs.
    found = np.sqrt(stats.chi2.ppf((np.arange(POINTS) + 0.5) / POINTS, df=degrees) / degrees)
    beyond = stats.norm.cdf(shift - critical * found) + stats.norm.cdf(-shift - critical * found)
    return float(beyond.mean())


def pairs_needed(difference: float, deviation: float, level: float = LEVEL) -> int | None:
    """The fewest pairs with which the test shows a true ``difference`` with a chance of :data:`POWER`.

    Both numbers usually come from the very runs that decided nothing. They are as uncertain as those runs are few, so
    that the result is a guide and no promise.

    Args:
        difference: the true mean of the differences.
        deviation: their standard deviation.
        level: divided by the number of comparisons that share it, the level of the strictest step of Holm's correction.

    Returns:
        None where there is no difference, or where it takes more than :data:`MOST`.

    >>> pairs_needed(0.5, 1.0), pairs_needed(1.0, 1.0), pairs_needed(0.01, 1.0)
    (34, 10, None)
    """
    if difference == 0:
        return None
    if deviation == 0:
        return 2
    low, high = 1, MOST  # power grows with the pairs; a single one has none
    if power(difference, deviation, high, level) < POWER:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, deviation, middle, level) >= POWER else (middle, high)
    return high
