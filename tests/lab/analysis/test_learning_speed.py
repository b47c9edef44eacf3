"""Epochs and seconds to a threshold: what fixes it, who reaches it, and when the two are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from better_attention.lab.analysis.findings import speed
from better_attention.lab.analysis.learning_speed import check_threshold, epochs_apart, find_threshold, lines, timed
from better_attention.lab.analysis.study import Curve, Threshold
from better_attention.lab.analysis.summary import EPOCHS_TO_THRESHOLD, Row, summarise
from better_attention.lab.tasks.catalogue import TASKS
from helpers.studies import record


def climbing(*accuracies: float | None, seconds: float = 2.0) -> Curve:
    """A run with these validation accuracies, an epoch each."""
    numbered = enumerate(accuracies, start=1)
    return [
        {"epoch": e, "seconds": seconds} | ({} if value is None else {"validation_accuracy": value})
        for e, value in numbered
    ]


def runs(mechanism: str, epochs: Sequence[int | None], **changes: Any) -> list[dict[str, Any]]:
    """Runs that took these numbers of epochs, a seed each."""
    return [record(mechanism, s, epochs_to_threshold=e, **changes) for s, e in enumerate(epochs)]


def row_of(records: Sequence[dict[str, Any]], mechanism: str = "super") -> Row:
    return next(row for row in summarise(records) if row.mechanism == mechanism)


# ------------------------------------------------------------------------------------------------------- threshold


def test_the_threshold_is_fixed_by_standard_alone() -> None:
    curves = {"standard-h4-s0": climbing(40.0, 90.0, 80.0), "standard-h1-s1": climbing(70.0)}
    found = find_threshold(curves, guessing=10.0)
    assert found is not None
    assert found.accuracy == pytest.approx(10 + 0.9 * (80 - 10))  # best values 90 and 70: mean 80
    assert "guessing (10.0 %)" in found.rule
    assert "standard (80.0 %)" in found.rule
    others = {"super-h4-s0": climbing(100.0), "standard+align-h4-s0": climbing(100.0)}
    assert find_threshold(curves | others, guessing=10.0) == found


@pytest.mark.parametrize("curves", [{}, {"super-h4-s0": climbing(90.0)}, {"standard-h4-s0": climbing(None)}])
def test_without_standard_there_is_no_threshold_but_the_users(curves: dict[str, Curve]) -> None:
    assert find_threshold(curves) is None
    assert find_threshold(curves, given=75.0) == Threshold(75.0, "as given by --threshold")


def test_the_users_threshold_comes_before_that_of_the_task_and_both_before_the_rule() -> None:
    curves = {"standard-h4-s0": climbing(90.0)}
    assert find_threshold(curves, given=75.0, fixed=80.0) == Threshold(75.0, "as given by --threshold")
    assert find_threshold({}, fixed=80.0) == Threshold(80.0, "which the task fixed before these runs")
    assert find_threshold(curves) == find_threshold(curves, fixed=None)


def test_a_threshold_is_part_of_its_task_and_no_setting_of_a_run() -> None:
    task = TASKS["digits"]("small")
    assert task.threshold == 90.0
    assert "threshold" not in task.settings()
    assert task.with_settings(task.settings()).threshold == 90.0
    assert replace(task, threshold=50.0).settings() == task.settings()
    with pytest.raises(ValueError, match="threshold"):
        replace(task, threshold=100.5)
    # One or two epochs get nowhere near what was fixed for whole runs.
    assert all(task("smoke").threshold is None for task in TASKS.values())


def test_what_standard_learns_nothing_of_has_no_threshold() -> None:
    assert find_threshold({"standard-h4-s0": climbing(50.0)}, guessing=50.0) is None


@pytest.mark.parametrize("wrong", [0, -1, 100.5, float("nan")])
def test_a_threshold_is_a_percentage(wrong: float) -> None:
    with pytest.raises(ValueError, match="threshold must be"):
        check_threshold(wrong)


def test_a_threshold_of_a_hundred_is_one() -> None:
    assert check_threshold(100) == 100.0


# ----------------------------------------------------------------------------------------------------------- times


def test_epochs_and_seconds_to_the_first_that_is_as_good() -> None:
    curves = {"standard-h4-s0": climbing(50.0, 80.0, 70.0, 90.0), "super-h4-s1": climbing(50.0, 79.9)}
    records = [record(), record("super", 1), record("efficient")]
    first, never, unknown = timed(records, curves, Threshold(80.0, ""))
    assert (first["epochs_to_threshold"], first["seconds_to_threshold"]) == (2, 4.0)
    assert (never["epochs_to_threshold"], never["seconds_to_threshold"]) == (None, None)
    assert "epochs_to_threshold" not in unknown  # no curve: not the same as never
    assert timed(records, curves, None) == records
    assert "epochs_to_threshold" not in records[0]  # the caller's are left as they are


# ------------------------------------------------------------------------------------------------------ comparison


def test_epochs_are_compared_seed_by_seed_and_corrected() -> None:
    standard, fast = runs("standard", [10, 12, 11]), runs("super", [5, 7, 7])
    test = row_of([*standard, *fast]).tests["epochs_to_threshold"]
    assert (test.difference.mean, test.difference.n) == (pytest.approx(-14 / 3), 3)
    assert (test.verdict, test.family) == ("lower", 1)  # t = 14 of 2 degrees of freedom
    both = row_of([*standard, *fast, *runs("efficient", [10, 12, 12])]).tests["epochs_to_threshold"]
    assert both.family == 2
    assert both.corrected_p == pytest.approx(2 * (test.p or 0))


@pytest.mark.parametrize(
    ("standard", "ours", "words", "ranks"),
    [
        # Ranks of 5, 6 and 2 earlier, never: +3 against −1 −2 (differences −5, +∞, −4).
        ([10, 12, 11], [5, None, 7], "earlier on 2 and later on 1 of 3 seeds", [-2, 3, -1]),
        ([10, None, 11], [5, 6, 7], "earlier on 3 of 3 seeds", [-2, -3, -1]),
        ([10, None, 11], [5, None, 7], "earlier on 2 of 3 seeds", [-2, -1]),
        ([None, None, None], [None, None, None], "the same on 3 seeds", []),
    ],
)
def test_never_is_later_than_any_number(
    standard: list[int | None], ours: list[int | None], words: str, ranks: list[int]
) -> None:
    row = row_of([*runs("standard", standard), *runs("super", ours)])
    test = row.tests["epochs_to_threshold"]
    assert (epochs_apart(test), test.difference.n, test.t_p) == (words, 3, None)
    assert test.wilcoxon_p == pytest.approx(signed_rank_p(ranks))
    assert test.verdict == "no difference shown"
    assert ("epochs_to_threshold" in row.ranks) is (None not in ours)
    if ours != [None] * 3:
        assert row.estimates["epochs_to_threshold"].mean == 6.0


def signed_rank_p(ranks: Sequence[int]) -> float:
    """Two-sided p of the signed-rank test by counting every pattern of signs."""
    seen = abs(sum(ranks))
    sums = [sum(s * abs(r) for s, r in zip(signs, ranks, strict=True)) for signs in product((-1, 1), repeat=len(ranks))]
    return sum(abs(one) >= seen for one in sums) / len(sums)


@pytest.mark.parametrize(
    ("standard", "ours", "verdict"), [([9] * 8, [None] * 8, "higher"), ([None] * 8, [9] * 8, "lower")]
)
def test_eight_runs_that_never_get_there_are_shown_to_be_slower(
    standard: list[int | None], ours: list[int | None], verdict: str
) -> None:
    test = row_of([*runs("standard", standard), *runs("super", ours)]).tests["epochs_to_threshold"]
    assert test.corrected_p == pytest.approx(2 / 2**8)
    assert test.verdict == verdict


def test_ranks_and_means_share_one_correction() -> None:
    records = [*runs("standard", [10, 12, 11]), *runs("super", [5, 7, 7]), *runs("efficient", [9, None, 12])]
    test = row_of(records).tests["epochs_to_threshold"]
    assert test.family == 2
    assert test.corrected_p == pytest.approx(2 * (test.t_p or 0))


def test_a_diverged_run_counts_as_one_that_never_got_there() -> None:
    lost = record("super", 2, diverged="its loss was not finite", test_accuracy=None)
    row = row_of([*runs("standard", [10, 12, 11]), *runs("super", [5, 6]), lost])
    assert epochs_apart(row.tests["epochs_to_threshold"]) == "earlier on 2 and later on 1 of 3 seeds"


def test_a_run_without_a_curve_is_no_run_that_never_got_there() -> None:
    unknown = record("super", 2)
    test = row_of([*runs("standard", [10, 12, 11]), *runs("super", [5, 7]), unknown]).tests["epochs_to_threshold"]
    assert (test.difference.n, test.order) == (2, None)


def test_no_claim_on_the_trained_model_rests_on_it() -> None:
    assert (EPOCHS_TO_THRESHOLD.tested, EPOCHS_TO_THRESHOLD.compared) == (False, True)


# ----------------------------------------------------------------------------------------------------------- words


def test_who_is_the_first_and_how_surely() -> None:
    rows = summarise([*runs("standard", [10, 12, 11]), *runs("super", [5, 7, 7])])
    assert speed(rows, Threshold(87.5, "")) == [
        "With 4 heads, super is the first to reach 87.5 % validation accuracy, after 6.3 epochs on average (3 of 3 "
        "runs): −4.7 ± 1.4 epochs against standard, fewer epochs (p 0.005, the only comparison)."
    ]


def test_a_mechanism_of_one_fast_run_is_not_called_the_first() -> None:
    rows = summarise([*runs("standard", [10, 12, 11]), *runs("super", [2, None, None])])
    (sentence,) = speed(rows, Threshold(87.5, ""))
    assert sentence.startswith("With 4 heads, standard is the first to reach 87.5 %")
    assert "3 of 3 runs" in sentence


def test_those_who_are_first_together_are_named_together_and_all_comparisons_counted() -> None:
    rows = summarise([*runs("standard", [2, 2]), *runs("super", [1, 1]), *runs("efficient", [1, 1])])
    assert speed(rows, Threshold(87.5, "")) == [
        "With 4 heads, efficient and super are the first to reach 87.5 % validation accuracy, after 1.0 epoch on "
        "average (2 of 2 runs).",
        "Epochs to the threshold against standard, 2 comparisons: no difference shown in 2.",
    ]


def test_where_nobody_was_timed_nothing_is_said() -> None:
    rows = summarise([record(), record("super")])
    assert speed(rows, Threshold(87.5, "")) == []
    assert lines(rows, [record(), record("super")]) == []


def test_the_lines_name_every_seed() -> None:
    records = [*runs("standard", [10, 12]), *runs("super", [5, None])]
    standard, ours = lines(summarise(records), [*reversed(records)])
    assert standard.by_seed == [("standard-h4-s0", 10), ("standard-h4-s1", 12)]
    assert ours.by_seed == [("super-h4-s0", 5), ("super-h4-s1", None)]
    assert (standard.reached, ours.reached) == ("2 of 2 runs", "1 of 2 runs")
    assert (ours.epochs and ours.epochs.mean, epochs_apart(ours.test)) == (
        5.0,
        "earlier on 1 and later on 1 of 2 seeds",
    )
