"""Intervals, paired differences and ranks, against SciPy and against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from better_attention.lab.analysis.estimates import Estimate, Ratio, estimate, number, ranks, ratio
from better_attention.lab.analysis.paired import paired_difference

FINITE = st.floats(-1e6, 1e6)


def test_three_values_worked_by_hand() -> None:
    # mean 4, s = 2, t(0.975, 2) = 4.302652729749464: half width t * 2 / sqrt(3)
    found = estimate([2.0, 4.0, 6.0])
    assert found.mean == 4.0
    assert found.half_width == pytest.approx(4.302652729749464 * 2 / math.sqrt(3), rel=1e-12)
    assert found.n == 3


@given(st.lists(FINITE, min_size=2, max_size=12).filter(lambda v: np.ptp(v) > 1e-3))
def test_the_interval_is_scipys(values: list[float]) -> None:
    found = estimate(values)
    theirs = stats.ttest_1samp(values, popmean=0.0).confidence_interval(0.95)
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(theirs.low, rel=1e-9, abs=1e-6)
    assert found.mean + found.half_width == pytest.approx(theirs.high, rel=1e-9, abs=1e-6)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth(rng: np.random.Generator) -> None:
    draws = rng.normal(loc=3.0, size=(1000, 4))
    held = [abs(e.mean - 3.0) <= e.half_width for e in map(estimate, draws.tolist()) if e.half_width is not None]
    # 950 expected; the binomial deviation is 6.9, so that five of them leave 915 ... 985
    assert 915 <= sum(held) <= 985


def test_one_seed_has_no_interval() -> None:
    assert estimate([98.5]) == Estimate(98.5, None, 1)
    assert estimate([98.5]).format(2) == "98.50"


def test_equal_values_have_a_width_of_zero() -> None:
    assert estimate([7.0, 7.0, 7.0]).half_width == 0.0


def test_equal_values_have_no_trace_of_rounding() -> None:
    assert estimate([0.1, 0.1, 0.1]).half_width == 0.0  # their mean is 0.10000000000000002


def test_ends_of_the_interval() -> None:
    assert (Estimate(3.0, 1.0, 4).low, Estimate(3.0, 1.0, 4).high) == (2.0, 4.0)
    assert (Estimate(3.0, None, 1).low, Estimate(3.0, None, 1).high) == (None, None)


def test_ratios_have_a_geometric_mean() -> None:
    found = ratio([0.5, 1.0, 2.0])
    # logarithms -ln 2, 0, ln 2: mean 0, s = ln 2, half width 4.302652729749464 · ln 2 / √3 = 1.72187
    assert (found.mean, found.half_width, found.n) == (1.0, None, 3)
    assert found.factor == pytest.approx(math.exp(4.302652729749464 * math.log(2) / math.sqrt(3)), rel=1e-12)
    assert found.format(2) == "1.00 [0.18, 5.59]"
    assert ratio([2.0, 8.0]).mean == pytest.approx(4.0)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6, unique=True))
def test_the_ratio_of_the_inverse_is_the_inverse(values: list[float]) -> None:
    one, other = ratio(values), ratio([1 / value for value in values])
    assert other.mean == pytest.approx(1 / one.mean, rel=1e-9)
    assert None not in (one.low, other.high)
    assert other.high == pytest.approx(1 / (one.low or math.nan), rel=1e-6)


def test_one_measurement_that_many_runs_share_is_one() -> None:
    assert ratio([0.93, 0.93, 0.93]) == Ratio(pytest.approx(0.93), None, 1)
    assert ratio([0.93, 0.93, 0.93]).format(2) == "0.93"
    assert ratio([0.9, 0.9, 1.0]).n == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_what_is_no_ratio_spoils_the_mean_visibly(bad: float) -> None:
    assert ratio([1.0, bad]).format(2) == "–"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_spoils_the_mean_visibly(bad: float) -> None:
    found = estimate([1.0, bad, 2.0])
    assert not math.isfinite(found.mean)
    assert found.half_width is None
    assert found.format(2) == "diverged"


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_differences_are_taken_seed_by_seed() -> None:
    # The seeds differ by tens, the mechanisms by 1 and 3: only the latter is left.
    found = paired_difference({0: 11.0, 1: 23.0, 2: 99.0}, {1: 20.0, 0: 10.0, 7: 5.0})
    assert found is not None
    assert (found.mean, found.n) == (2.0, 2)
    # Student's t with one degree of freedom is Cauchy's: t(0.975) = tan(0.475 π); s of 1 and 3 is √2, over √2 seeds.
    assert found.half_width == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)


def test_no_seed_in_common_is_no_difference() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=8), st.booleans())
def test_ranks_are_scipys_least_ranks(values: list[float], higher_is_better: bool) -> None:
    signed = [-v if higher_is_better else v for v in values]
    assert ranks(values, higher_is_better=higher_is_better) == stats.rankdata(signed, method="min").tolist()


def test_the_papers_own_ties() -> None:
    # table 2, IMDB, test loss: 0.474 (4), 0.472 (2), 0.468 (1), 0.472 (2)
    assert ranks([0.474, 0.472, 0.468, 0.472], higher_is_better=False) == [4, 2, 1, 2]


def test_what_is_missing_or_nan_has_no_rank_and_costs_none() -> None:
    assert ranks([None, 2.0, math.nan, 1.0], higher_is_better=True) == [None, 1, None, 2]


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (66048, 0, False, "66,048"),
        (-0.0126, 3, False, "−0.013"),
        (0.0126, 3, True, "+0.013"),
        (-0.0004, 3, True, "0.000"),
        (0.0, 2, True, "0.00"),
        (-1234.5, 1, True, "−1,234.5"),
        (math.nan, 2, False, "diverged"),
        (math.nan, 2, True, "diverged"),
        (math.inf, 2, True, "diverged"),
        (-math.inf, 2, False, "diverged"),
    ],
)
def test_numbers_as_people_read_them(value: float, digits: int, sign: bool, text: str) -> None:
    assert number(value, digits, sign=sign) == text
