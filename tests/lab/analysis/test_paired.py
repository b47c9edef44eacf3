"""Comparisons seed by seed: tests, effect sizes, correction, verdicts, against formulas that the code does not use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from better_attention.lab.analysis.estimates import Estimate
from better_attention.lab.analysis.paired import (
    NOTHING,
    UNTESTED,
    Comparison,
    compare_paired,
    corrected,
    holm,
    p_text,
    paired_difference,
)


def against_zero(*differences: float) -> Comparison:
    """The comparison of runs that differ by so much from baselines that are zero."""
    found = compare_paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    assert found is not None
    return found


def student_p(t: float, df: int) -> float:
    """Two-sided p of Student's t in closed form, for the degrees of freedom of 2, 3 and 5 seeds."""
    if df == 1:  # Cauchy's distribution
        return 1 - 2 / math.pi * math.atan(abs(t))
    if df == 2:
        return 1 - abs(t) / math.sqrt(2 + t * t)
    assert df == 4
    w = 1 + t * t / 4
    return 1 - 2 * (3 / 8) * abs(t) / math.sqrt(w) * (1 - t * t / w / 12)


def signed_rank_p(differences: Sequence[int]) -> float:
    """Two-sided p of the signed-rank test: a permutation test that recomputes the statistic for every pattern of signs.

    Ranks are counted in halves (zeros are dropped, ties shared), sums run over negative and positive differences.
    """
    changed = [d for d in differences if d != 0]

    def statistic(sample: Sequence[int]) -> int:
        halves = [2 * sum(abs(e) < abs(d) for e in sample) + sum(abs(e) == abs(d) for e in sample) + 1 for d in sample]
        signed = [half if d > 0 else -half for d, half in zip(sample, halves, strict=True)]
        return abs(sum(signed))

    flipped = [[d * sign for d, sign in zip(changed, signs, strict=True)]
               for signs in itertools.product((-1, 1), repeat=len(changed))]  # fmt: skip
    return sum(statistic(sample) >= statistic(changed) for sample in flipped) / len(flipped)


DISTINCT = st.lists(st.integers(-1000, 1000), min_size=2, max_size=7).filter(lambda v: len(set(v)) > 1)


@given(st.sampled_from([2, 3, 5]).flatmap(lambda n: st.lists(st.integers(-50, 50), min_size=n, max_size=n)))
def test_the_t_test_in_closed_form(values: list[int]) -> None:
    if len(set(values)) == 1:
        return
    found = against_zero(*map(float, values))
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert found.t_p == pytest.approx(
        student_p(mean / deviation * math.sqrt(len(values)), len(values) - 1), rel=1e-6, abs=1e-9
    )


@given(DISTINCT.filter(any))
def test_wilcoxon_counts_every_pattern_of_signs(values: list[int]) -> None:
    assert against_zero(*map(float, values)).wilcoxon_p == pytest.approx(signed_rank_p(values), rel=1e-12)


def test_wilcoxon_is_scipys_where_nothing_is_tied(rng: np.random.Generator) -> None:
    for n in (2, 5, 9):
        draws = rng.normal(loc=0.5, size=n)
        assert against_zero(*draws).wilcoxon_p == pytest.approx(stats.wilcoxon(draws, method="exact").pvalue, rel=1e-12)


@pytest.mark.parametrize(("seeds", "least"), [(2, 0.5), (3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_wilcoxon_alone_shows_nothing_before_the_sixth_seed(seeds: int, least: float) -> None:
    assert against_zero(*(1.0 + k for k in range(seeds))).wilcoxon_p == pytest.approx(least, rel=1e-12)


def test_many_pairs_have_a_wilcoxon_p_too(rng: np.random.Generator) -> None:
    # 20 of 20 positive and distinct: exactly 2 · 2^-20
    assert against_zero(*(rng.permutation(20) + 1.0)).wilcoxon_p == pytest.approx(2**-19, rel=1e-9)


def test_a_comparison_worked_by_hand() -> None:
    # differences 1, 2, 3: mean 2, s = 1, t = 2√3, df 2: p = 1 - t / √(2 + t²) = 1 - √12/√14; J(2) = 1/√π
    found = compare_paired({0: 91.0, 1: 95.0, 2: 93.0}, {2: 90.0, 0: 90.0, 1: 93.0, 9: 1.0})
    assert found is not None
    assert (found.difference.mean, found.difference.n) == (2.0, 3)
    assert found.t_p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    assert found.wilcoxon_p == 0.25
    assert found.effect == pytest.approx(2 / math.sqrt(math.pi), rel=1e-9)
    assert found.difference == paired_difference({0: 91.0, 1: 95.0, 2: 93.0}, {0: 90.0, 1: 93.0, 2: 90.0})


@pytest.mark.parametrize("n", [3, 5, 10])
def test_hedges_correction_is_the_usual_approximation(n: int) -> None:
    values = np.arange(n, dtype=float)
    found = against_zero(*values).effect
    assert found is not None
    plain = values.mean() / values.std(ddof=1)
    assert found / plain == pytest.approx(1 - 3 / (4 * (n - 1) - 1), rel=0.02)


def test_effects_are_right_on_average(rng: np.random.Generator) -> None:
    draws = rng.normal(loc=0.8, size=(400, 6))
    effects = [found.effect for row in draws.tolist() if (found := against_zero(*row)).effect is not None]
    # Their deviation is about 0.53, that of the mean 0.027; the uncorrected d_z would be 0.95 on average
    assert np.mean(effects) == pytest.approx(0.8, abs=0.08)


# ------------------------------------------------------------------------------------------------ where little is known


def test_a_single_pair_has_no_test_and_no_effect() -> None:
    assert against_zero(1.5) == Comparison(Estimate(1.5, None, 1), None, None, None)
    assert against_zero(1.5).verdict == UNTESTED


def test_two_pairs_have_a_test_and_no_effect() -> None:
    found = against_zero(1.0, 3.0)  # t = 2: Cauchy
    assert found.t_p == pytest.approx(1 - 2 / math.pi * math.atan(2), rel=1e-9)
    assert found.effect is None


def test_no_pair_is_no_comparison() -> None:
    assert compare_paired({0: 1.0}, {1: 1.0}) is None


def test_equal_runs_are_as_likely_as_can_be() -> None:
    found = against_zero(0.0, 0.0, 0.0)
    assert (found.t_p, found.wilcoxon_p, found.effect) == (1.0, 1.0, 0.0)


def test_without_a_spread_the_t_test_gives_way_to_wilcoxons() -> None:
    # Twice +1 of 100 samples is no proof, though t is infinite.
    found = against_zero(1.0, 1.0)
    assert (found.t_p, found.wilcoxon_p, found.p, found.effect) == (None, 0.5, 0.5, None)
    assert corrected([found])[0].verdict == NOTHING
    assert corrected([against_zero(*[1.0] * 6)])[0].verdict == "higher"


def test_rounding_errors_are_no_spread() -> None:
    ours, theirs = {0: 98.3, 1: 97.8, 2: 0.3}, {0: 98.2, 1: 97.7, 2: 0.2}
    assert len({ours[k] - theirs[k] for k in ours}) > 1  # in binary they differ
    found = compare_paired(ours, theirs)
    assert found is not None
    assert found.t_p is None
    assert found.difference.half_width == 0.0
    # ... and ties are ties: |d| = 0.1 twice, once up and once down, among three
    assert against_zero(0.1, 0.3 - 0.4, 0.7).wilcoxon_p == pytest.approx(signed_rank_p([1, -1, 7]), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_leaves_no_claim(bad: float) -> None:
    found = corrected([against_zero(1.0, bad, 1.1), against_zero(1.0, 1.1, 1.2)])
    assert (found[0].p, found[0].corrected_p, found[0].verdict) == (None, None, UNTESTED)
    assert not math.isfinite(found[0].difference.mean)
    assert found[1].family == 1  # what has no p is not counted


# --------------------------------------------------------------------------------------------------------- correction


def closed_testing(values: Sequence[float]) -> list[float]:
    """Holm's p as what it is: the closure of Bonferroni's test over every subset of the hypotheses."""
    places = range(len(values))
    subsets = [s for size in range(1, len(values) + 1) for s in itertools.combinations(places, size)]
    return [max(min(1.0, len(s) * min(values[k] for k in s)) for s in subsets if place in s) for place in places]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(values: list[float]) -> None:
    assert holm(values) == pytest.approx(closed_testing(values), rel=1e-12)


def test_holm_by_hand() -> None:
    # 0.005 · 4, then 0.01 · 3, then 0.03 · 2, then 0.04 · 1, which must not fall below 0.06
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == [pytest.approx(0.03), 0.06, None, 0.06, 0.02]
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_correction_takes_a_verdict_back() -> None:
    clear = against_zero(1.0, 1.2, 1.4)  # t = 10.4, p = 0.0091
    assert corrected([clear])[0].verdict == "higher"
    many = corrected([clear, *[against_zero(1.0, -1.0, 0.1)] * 9])
    assert many[0].verdict == NOTHING
    assert clear.t_p is not None
    assert many[0].corrected_p == pytest.approx(10 * clear.t_p)
    assert many[0].family == 10


@pytest.mark.parametrize(
    ("p", "mean", "verdict"),
    [
        (0.049, 1.0, "higher"),
        (0.049, -1.0, "lower"),
        (0.05, 1.0, NOTHING),
        (None, 1.0, UNTESTED),
        (math.nan, 1, NOTHING),
    ],
)
def test_the_word_for_it(p: float | None, mean: float, verdict: str) -> None:
    assert (NOTHING, UNTESTED) == ("no difference shown", "not tested")
    assert Comparison(Estimate(mean, 0.1, 3), p, 0.25, None, corrected_p=p).verdict == verdict


def test_five_in_a_hundred_claims_are_false_where_nothing_differs(rng: np.random.Generator) -> None:
    # Six comparisons of five seeds each, none different: the chance of any claim at all stays below 5 %.
    families = rng.normal(size=(100, 6, 5))
    claims = [
        any(c.verdict != NOTHING for c in corrected([against_zero(*row) for row in f])) for f in families.tolist()
    ]
    # 5 expected at most; the binomial deviation is 2.2, so that four of them leave 14; uncorrected it would be 26
    assert sum(claims) <= 14


@pytest.mark.parametrize(
    ("p", "text"), [(1.0, "p 1.00"), (0.1, "p 0.10"), (0.0999, "p 0.100"), (0.001, "p 0.001"), (0.0, "p < 0.001")]
)
def test_p_as_people_read_it(p: float, text: str) -> None:
    assert p_text(p) == text
