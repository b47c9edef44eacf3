"""The first thing on a report: which mechanism to use, how sure that is, and where the points of the drawing are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any

import pytest

from better_attention.lab.analysis.advice import Card, advised_column, advised_heads, answer, cards
from better_attention.lab.analysis.estimates import Estimate
from better_attention.lab.analysis.power import pairs_needed
from better_attention.lab.analysis.summary import COLUMNS, columns_of, summarise
from better_attention.lab.report.scatter import ASIDE, LETTER, LINE, Point, scatter
from helpers.studies import record

ACCURACY = next(column for column in COLUMNS if column.key == "test_accuracy")


def runs(mechanism: str, accuracies: Sequence[float], **changes: Any) -> list[dict[str, Any]]:
    return [record(mechanism, s, test_accuracy=value, **changes) for s, value in enumerate(accuracies)]


STANDARD = runs("standard", (90.0, 91.0, 92.0), times_as_fast=1.2, attention_params=4000)
BETTER = runs("super", (92.0, 93.01, 94.02), times_as_fast=0.9, attention_params=2400)
"""Differences 2, 2.01, 2.02: shown."""
NOISE = runs("efficient", (91.5, 90.1, 92.9), times_as_fast=1.8, attention_params=2000)
"""Differences 1.5, -0.9, 0.9."""
WORSE = runs("optimised", (87.0, 88.01, 89.02), attention_params=3000)


def dealt(*groups: list[dict[str, Any]]) -> tuple[list[Card], str]:
    """Cards and answer for these runs."""
    records = [run for group in groups for run in group]
    found = cards(summarise(records), records, ACCURACY)
    return found, answer(found, ACCURACY, 4)


def test_a_card_holds_what_a_choice_needs() -> None:
    (standard, ours), _ = dealt(STANDARD, BETTER)
    assert (standard.params, standard.params_share, standard.speed, standard.difference) == (4000, 1.0, None, None)
    assert standard.verdict == "What the others are compared with."
    assert (ours.params, ours.params_share) == (2400, 0.6)
    assert ours.speed == pytest.approx(0.9 / 1.2)  # both beside torch's layer, which cancels
    assert ours.difference is not None
    assert ours.difference.mean == pytest.approx(2.01)
    assert ours.verdict == "Higher than standard (3 seeds, p < 0.001)."


def test_the_earlier_ratio_of_times_is_read_as_well() -> None:
    older = [{**run, "epoch_ratio": 1 / 1.2} for run in STANDARD]
    for run in older:
        del run["times_as_fast"]
    (_, ours), _ = dealt(older, BETTER)
    assert ours.speed == pytest.approx(0.9 / 1.2)


def test_what_was_not_measured_is_not_shown() -> None:
    bare = [{key: v for key, v in run.items() if key not in ("times_as_fast", "attention_params")} for run in BETTER]
    (_, ours), _ = dealt(STANDARD, bare)
    assert (ours.params, ours.params_share, ours.speed) == (None, None, None)


def test_what_cannot_be_told_says_how_many_seeds_would() -> None:
    (standard, ours), _ = dealt(STANDARD, NOISE)
    mean, deviation = 0.5, math.sqrt(1.56)  # of 1.5, -0.9, 0.9
    needed = pairs_needed(mean, deviation)
    assert ours.verdict == (
        f"Cannot be told from standard with 3 seeds; about {needed} would decide a difference of this size."
    )
    assert (ours.needed, standard.needed) == (f"{needed}", "")
    cards_of_two, _ = dealt(STANDARD, NOISE, WORSE)
    strict = pairs_needed(mean, deviation, 0.05 / 2)
    assert strict is not None
    assert f"about {strict} would decide" in next(c.verdict for c in cards_of_two if c.mechanism == "efficient")


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ((90.0, 91.0, 92.0), "Cannot be told from standard with 3 seeds: the means are equal."),
        ((90.001, 90.0, 93.0), "Cannot be told from standard with 3 seeds, and more than 1,000 would be needed"),
        ((90.5,), "Not tested: one seed tells nothing about chance."),
        ((90.5, math.nan, 91.0), "Not tested: a run diverged"),
    ],
)
def test_every_other_case_has_its_sentence(accuracies: tuple[float, ...], verdict: str) -> None:
    (_, ours), _ = dealt(STANDARD, runs("super", accuracies))
    assert ours.verdict.startswith(verdict)


def test_without_standard_there_is_nothing_to_compare_with() -> None:
    found, text = dealt(BETTER, NOISE)
    assert {card.verdict for card in found} == {
        "Cannot be compared: there are no runs of standard with the same seeds."
    }
    assert text == "With 4 heads, nothing can be recommended: there is no comparison with standard."


# ---------------------------------------------------------------------------------------------------------- answer


def test_what_is_shown_to_be_better_is_recommended() -> None:
    _, text = dealt(STANDARD, BETTER, NOISE)
    assert text == (
        "With 4 heads, use super: +2.01 ± 0.02 points of test accuracy against standard, which is shown; with 60 % of "
        "its attention parameters and 0.75 times its speed in training (measured once)."
    )


def test_else_the_smallest_that_is_not_told_from_standard_with_its_interval() -> None:
    _, text = dealt(STANDARD, NOISE, WORSE)
    assert text == (
        "With 4 heads, no mechanism is shown to be better than standard. Efficient is the smallest of which no "
        "difference is shown, with 50 % of its attention parameters and 1.50 times its speed in training (measured "
        "once): its difference lies between −2.60 and +3.60 points of test accuracy (95 % interval, 3 seeds)."
    )


def test_a_speed_that_was_measured_several_times_is_not_called_a_single_one() -> None:
    twice = [
        [{**run, "times_as_fast": [0.8, 1.25, 1.25][run["seed"]]} for run in group] for group in (STANDARD, BETTER)
    ]
    (_, ours), text = dealt(*twice)
    assert ours.timings == 2  # what two seeds have in common is one measurement
    assert text.endswith("1.00 times its speed in training.")


def test_of_a_text_fewer_bits_are_better() -> None:
    """Both differences are shown; what is lower by 2 bits is recommended, and what is higher is worse."""
    bits = next(column for column in COLUMNS if column.key == "test_bits_per_character")
    given = {"standard": (3.0, 3.1, 3.2), "super": (1.0, 1.11, 1.22), "efficient": (2.0, 2.11, 2.22)}
    given["optimised"] = (5.0, 5.11, 5.22)
    records = [
        record(name, seed, test_bits_per_character=value, attention_params=100)
        for name, values in given.items()
        for seed, value in enumerate(values)
    ]
    rows = summarise(records)
    assert advised_column(columns_of(rows)) == bits
    found = cards(rows, records, bits)
    assert {card.mechanism: card.outcome for card in found} == {
        "standard": "",
        "optimised": "worse",
        "efficient": "better",
        "super": "better",
    }
    assert next(card.verdict for card in found if card.mechanism == "super").startswith("Lower than standard (3 seeds")
    assert answer(found, bits, 4).startswith(
        "With 4 heads, use super: −1.990 ± 0.025 bits per character of the test text against standard, which is shown"
    )
    assert next(row.ranks[bits.key] for row in rows if row.mechanism == "super") == 1


@pytest.mark.parametrize("other", [WORSE, runs("expressive", (91.5, 90.1, 92.9), attention_params=4000)])
def test_what_is_worse_or_no_smaller_is_no_reason_to_leave_standard(other: list[dict[str, Any]]) -> None:
    _, text = dealt(STANDARD, other)
    assert text == (
        "With 4 heads, stay with standard: nothing is shown to be better, and nothing smaller to be as good."
    )


@pytest.mark.parametrize("accuracies", [(95.0,), (95.0, math.nan, 95.0)])
def test_what_was_not_tested_is_never_recommended(accuracies: tuple[float, ...]) -> None:
    _, text = dealt(STANDARD, runs("super", accuracies, attention_params=100))
    assert text.startswith("With 4 heads, nothing can be recommended: nothing was tested")


def test_what_was_not_tested_is_passed_over_where_others_were() -> None:
    _, text = dealt(STANDARD, NOISE, runs("super", (95.0, math.nan, 95.0), attention_params=100))
    assert "Efficient is the smallest" in text


def test_advice_is_on_accuracy_or_bleu_and_on_the_heads_of_most() -> None:
    rows = summarise([*STANDARD, *BETTER, record(heads=8, test_bleu=20.0), record("super", heads=1)])
    assert advised_column(columns_of(rows)) == ACCURACY
    assert advised_heads(rows, ACCURACY) == 4
    both = summarise(record(name, heads=h) for name in ("standard", "super") for h in (1, 2))
    assert advised_heads(both, ACCURACY) == 2  # the greatest of several
    assert advised_column([column for column in COLUMNS if column.key in ("test_loss", "train_accuracy")]) is None


# --------------------------------------------------------------------------------------------------------- drawing


def card(mechanism: str, params: int | None, mean: float, half_width: float | None = None) -> Card:
    return Card(mechanism, Estimate(mean, half_width, 3), params, None, None, None, "", "")


def test_points_are_where_the_numbers_are() -> None:
    found = scatter([card("standard", 4000, 90.0, 5.0), card("efficient", 2000, 85.0)], ACCURACY)
    assert found is not None
    assert [text for _, text in found.across] == ["0", "1,000", "2,000", "3,000", "4,000"]
    assert [(place, text) for place, text in found.up] == [
        (0, "85"),
        (25, "87.5"),
        (50, "90"),
        (75, "92.5"),
        (100, "95"),
    ]
    standard, efficient = found.points
    assert (standard.x, standard.y, standard.low, standard.high) == (100.0, 50.0, 0.0, 100.0)
    assert (efficient.x, efficient.y, efficient.low, efficient.high) == (50.0, 0.0, None, None)
    assert (standard.leftward, efficient.leftward) == (True, False)  # no room to the right of the greatest
    assert standard.text == "4,000 parameters, 90.00 ± 5.00"


@pytest.mark.parametrize("shown", [[], [card("a", 1, 90.0)], [card("a", 1, 90.0), card("b", 2, math.nan)]])
def test_fewer_than_two_points_are_no_drawing(shown: list[Card]) -> None:
    assert scatter(shown, ACCURACY) is None
    assert scatter([*shown[:1], card("c", None, 90.0)], ACCURACY) is None


def test_equal_results_can_be_drawn() -> None:
    found = scatter([card("a", 5, 90.0), card("b", 5, 90.0)], ACCURACY)
    assert found is not None
    assert all(0 < point.y < 100 for point in found.points)


def test_intervals_of_equal_parameters_stand_side_by_side() -> None:
    shown = [card(name, 4000, 90.0 + k, 5.0) for k, name in enumerate(("standard", "expressive", "other"))]
    found = scatter([*shown, card("efficient", 2000, 90.0, 5.0)], ACCURACY)
    assert found is not None
    places = sorted(point.x for point in found.points)
    assert all(b - a >= ASIDE - 1e-6 for a, b in pairwise(places))
    assert fmean(places[1:]) == pytest.approx(100)  # around the place of their parameters
    assert places[0] == 50  # who is alone is not moved


@pytest.mark.parametrize(("neighbour", "leftward"), [(500, True), (1600, False)])
def test_a_label_stands_on_the_left_where_nobody_is_in_the_way(neighbour: int, leftward: bool) -> None:
    shown = [card("standard", 2000, 91.0, 5.0), card("expressive", 2000, 90.0, 5.0)]
    found = scatter([*shown, card("efficient", neighbour, 90.0, 5.0), card("large", 4000, 90.0, 5.0)], ACCURACY)
    assert found is not None
    assert [point.leftward for point in found.points[:2]] == [leftward, False]


@pytest.mark.parametrize("top", [True, False])
def test_no_label_covers_another(top: bool) -> None:
    ends = 100.0 if top else 90.0
    names = ("standard", "optimised", "efficient", "super", "expressive", "super+expressive", "super+per-head")
    some = [card(name, 4000 - 150 * k, ends + k / 100) for k, name in enumerate(names)]
    found = scatter([*some, card("far", 10, 95.0)], ACCURACY)
    assert found is not None
    for one, other in combinations(found.points, 2):
        (a, b), (c, d) = across(one), across(other)
        assert b <= c or d <= a or abs(one.label - other.label) >= LINE - 1e-6, (one, other)
    assert all(0 <= point.label <= 100 for point in found.points)


def across(point: Point) -> tuple[float, float]:
    width = LETTER * (len(point.mechanism) + 2)
    return (point.x - width, point.x) if point.leftward else (point.x, point.x + width)
