"""How many seeds would decide a difference: the power of the paired t-test, against its definition and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from better_attention.lab.analysis.estimates import Estimate, estimate
from better_attention.lab.analysis.power import MOST, POWER, pairs_needed, power, spread


@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), (0.5, -0.5), (3.0, 3.1, 2.9, 3.3, 7.0)])
def test_the_spread_comes_back_from_the_interval(values: tuple[float, ...]) -> None:
    assert spread(estimate(values)) == pytest.approx(np.std(values, ddof=1))


def test_a_single_pair_has_no_spread() -> None:
    assert spread(Estimate(1.0, None, 1)) is None


@pytest.mark.parametrize(("difference", "pairs"), [(5.0, 2), (2.0, 3), (1.2, 5), (0.6, 20)])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_power_is_the_noncentral_t(difference: float, pairs: int, level: float) -> None:
    critical, shift = stats.t.ppf(1 - level / 2, pairs - 1), difference * math.sqrt(pairs)
    expected = stats.nct.sf(critical, pairs - 1, shift) + stats.nct.cdf(-critical, pairs - 1, shift)
    assert power(difference, 1.0, pairs, level) == pytest.approx(expected, abs=1e-3)


def test_power_is_how_often_the_test_shows_the_difference(rng: np.random.Generator) -> None:
    drawn = rng.normal(0.8, 2.0, size=(20_000, 40))
    shows = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05
    assert power(0.8, 2.0, 40) == pytest.approx(shows.mean(), abs=4 * math.sqrt(0.25 / 20_000))


def test_without_a_difference_the_power_is_the_level() -> None:
    assert power(0.0, 1.0, 7) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(("difference", "deviation"), [(1.0, 1.0), (-0.4, 1.0), (0.1, 0.9)])
def test_the_fewest_pairs_with_enough_power(difference: float, deviation: float) -> None:
    needed = pairs_needed(difference, deviation)
    assert needed is not None
    assert power(difference, deviation, needed - 1) < POWER <= power(difference, deviation, needed)


def test_a_stricter_level_takes_more_pairs() -> None:
    assert (pairs_needed(1.0, 1.0, 0.05) or 0) < (pairs_needed(1.0, 1.0, 0.05 / 15) or 0)


def test_what_no_number_of_pairs_decides() -> None:
    assert pairs_needed(0.0, 1.0) is None
    assert pairs_needed(1e-3, 1.0) is None  # beyond MOST
    assert power(1e-3, 1.0, MOST) < POWER
    assert pairs_needed(1.0, 0.0) == 2  # without a spread two agree already
