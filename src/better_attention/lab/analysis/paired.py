"""A mechanism against the baseline, seed by seed: difference, tests, effect size, and the word for what they show.

Seeds are paired over mechanisms: runs of one seed share the split, the order of the samples and, where they can, the
initial weights. Differences are therefore taken seed by seed, and every test is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from better_attention.lab.analysis.estimates import Estimate, estimate

LEVEL = 0.05
"""A corrected p below this shows a difference."""

NOTHING = "no difference shown"
UNTESTED = "not tested"


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
    differences = _differences(ours, baseline)
    return estimate(differences.tolist()) if len(differences) else None


def _differences(ours: Mapping[int, float], baseline: Mapping[int, float]) -> NDArray[np.float64]:
    """``ours - baseline`` for each seed that both have, without the rounding errors of the subtraction.

    Accuracies are counts over a test set: 98.3 - 98.2 and 97.5 - 97.4 are a tie, which in binary they are not.
    """
    seeds = sorted(ours.keys() & baseline.keys())
    pairs = np.array([(ours[seed], baseline[seed]) for seed in seeds], dtype=np.float64).reshape(-1, 2)
    # Only pairs of finite values are subtracted: infinity minus infinity would be NaN with a warning.
    finite = np.isfinite(pairs).all(axis=1)
    found = np.full(len(pairs), math.nan)
    found[finite] = pairs[finite, 0] - pairs[finite, 1]
    top = np.abs(pairs[finite]).max(initial=0.0)
    # Twelve significant digits of the larger value. NumPy rounds by a power of ten, which overflows beyond 308.
    return found if top == 0 else np.round(found, min(12 - math.ceil(math.log10(top)), 290))


@dataclass(frozen=True, slots=True)
class Order:
    """Which of two is the greater, seed by seed, where some values are known to be beyond all others and no more.

    Args:
        lower, higher: pairs in which ours is the lower, or the higher; the rest are ties.
        direction: of the signed ranks: -1 lower, 1 higher, 0 balanced.
    """

    lower: int
    higher: int
    direction: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A mechanism against the baseline in one metric, seed by seed.

    Args:
        difference: mean and 95 % interval of the differences; ``difference.n`` pairs.
        t_p: two-sided p of the paired t-test. None for a single pair, where a value is not finite, and where all
            differences are equal but not zero: without a spread there is no t.
        wilcoxon_p: two-sided p of Wilcoxon's signed-rank test, exact up to 13 pairs. With n pairs it is never below
            2^(1-n): 0.25 for three seeds, 0.0625 for five, so that alone it shows nothing before the sixth seed.
        effect: Cohen's d_z, mean over deviation of the differences, with Hedges' correction for few pairs. None where
            it is not defined: fewer than three pairs, or no spread.
        corrected_p: :attr:`p` after :func:`holm`; None where there is no p.
        family: the number of comparisons that it is corrected for.
        order: where a value is infinite: what is known instead of ``difference``, whose mean is then NaN.
    """

    difference: Estimate
    t_p: float | None
    wilcoxon_p: float | None
    effect: float | None
    corrected_p: float | None = None
    family: int = 0
    order: Order | None = None

    @property
    def p(self) -> float | None:
        """The p that is corrected: of the t-test, or Wilcoxon's where the differences have no spread."""
        return self.wilcoxon_p if self.t_p is None else self.t_p

    @property
    def verdict(self) -> str:
        """``"higher"`` or ``"lower"`` than the baseline where the corrected p is below 0.05, else that nothing shows.

        It describes the number, not which end is good: a higher loss is worse. Where there is no p, a single
        pair for example, nothing was tested.

        >>> Comparison(Estimate(0.5, 0.1, 5), 0.001, 0.0625, 4.1, corrected_p=0.008).verdict
        'higher'
        """
        if self.corrected_p is None:
            return UNTESTED
        if not self.corrected_p < LEVEL:
            return NOTHING
        above = self.difference.mean > 0 if self.order is None else self.order.direction > 0
        return "higher" if above else "lower"

    @property
    def shows(self) -> bool:
        """Whether the verdict is a difference."""
        return self.verdict not in (NOTHING, UNTESTED)


def compare_paired(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Test ``ours - baseline``, seed by seed, against no difference; uncorrected, see :func:`corrected`.

    The t-test assumes that the differences are about normal, which three to five seeds cannot tell; Wilcoxon's test
    does not, and its p stands beside it. A run that diverged (a value that is not finite) leaves the comparison
    without a p: what became of the others says nothing of the mechanism as a whole.

    Args:
        ours: seed -> value.
        baseline: seed -> value.

    Returns:
        The comparison over the seeds that both have; None where they share none.

    >>> found = compare_paired({0: 3.0, 1: 5.0, 2: 7.5}, {0: 1.0, 1: 2.0, 2: 4.0})
    >>> f"{found.t_p:.3f} {found.wilcoxon_p:.2f} {found.effect:.2f}"
    '0.023 0.25 2.09'
    """
    differences = _differences(ours, baseline)
    n = len(differences)
    if n == 0:
        return None
    found = estimate(differences.tolist())
    # A run that diverged decides: a test of the others would choose the seeds that went well.
    if n == 1 or not np.isfinite(differences).all():
        return Comparison(found, None, None, None)
    if not differences.any():  # the same in every seed: nothing speaks against "no difference"
        return Comparison(found, 1.0, 1.0, 0.0 if n > 2 else None)
    # Without a spread t is infinite and its p value 0, which no two or three seeds deserve.
    if np.ptp(differences) == 0:
        return Comparison(found, None, _wilcoxon(differences), None)
    effect = found.mean / float(differences.std(ddof=1)) * _hedges(n) if n > 2 else None
    return Comparison(found, float(stats.ttest_1samp(differences, 0.0).pvalue), _wilcoxon(differences), effect)


def compare_ordered(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Test ``ours - baseline``, seed by seed, where infinity is an outcome: an event that never came.

    Without such a value this is :func:`compare_paired`. With one there is no mean and no interval: Wilcoxon's
    signed-rank test decides, in which never is later than any number, by as much in every pair, and twice never is a
    tie.

    Args:
        ours, baseline: seed -> value, ``math.inf`` for never.

    Returns:
        The comparison over the seeds that both have; None where they share none.

    >>> found = compare_ordered({0: 4, 1: 5, 2: math.inf}, {0: 3, 1: math.inf, 2: math.inf})
    >>> found.order, found.wilcoxon_p
    (Order(lower=1, higher=1, direction=-1), 1.0)
    """
    seeds = sorted(ours.keys() & baseline.keys())
    pairs = [(ours[seed], baseline[seed]) for seed in seeds]
    if all(math.isfinite(value) for pair in pairs for value in pair):
        return compare_paired(ours, baseline)
    differences = np.array([0.0 if a == b else a - b for a, b in pairs])
    ranks = stats.rankdata(np.abs(differences))
    order = Order(
        int((differences < 0).sum()), int((differences > 0).sum()), int(np.sign((np.sign(differences) * ranks).sum()))
    )
    nothing = Estimate(math.nan, None, len(pairs))
    if len(pairs) == 1:
        return Comparison(nothing, None, None, None, order=order)
    return Comparison(nothing, None, _wilcoxon(differences) if differences.any() else 1.0, None, order=order)


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank test; zeros are left out, ties share their mean rank."""
    changed = differences[differences != 0]
    return float(stats.wilcoxon(changed).pvalue)  # counts every pattern of signs up to 13 pairs, ties included


def _hedges(n: int) -> float:
    """Hedges' J of n - 1 degrees of freedom: with it d_z of n normal pairs is right on average (about 1 - 3/(4n-5))."""
    m = n - 1
    # By logarithms, because the gamma function itself overflows from 172 on.
    return math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Each p corrected for the number of comparisons (Holm 1979): the chance of any false "difference" stays below 5 %.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none falls below a smaller one's, none exceeds
    1. None is no comparison: it is not counted.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    order = sorted((p, place) for place, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    least = 0.0
    for left, (p, place) in zip(range(len(order), 0, -1), order, strict=True):
        least = max(least, min(1.0, left * p))
        found[place] = least
    return found


def corrected(family: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons that answer one question together, each with its p corrected by :func:`holm`."""
    values = holm([one.p for one in family])
    size = sum(p is not None for p in values)
    return [replace(one, corrected_p=p, family=size) for one, p in zip(family, values, strict=True)]


def p_text(p: float | None) -> str:
    """``p`` as people read it.

    >>> p_text(1.0), p_text(0.0432), p_text(2e-5), p_text(None)
    ('p 1.00', 'p 0.043', 'p < 0.001', 'p –')
    """
    if p is None:
        return "p –"
    return "p < 0.001" if p < 0.001 else f"p {p:.{2 if p >= 0.1 else 3}f}"
