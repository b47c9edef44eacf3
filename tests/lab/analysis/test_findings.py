"""What a report says in words: every claim names its split, seeds and correction, and none is without a test."""

from __future__ import annotations

import math
from typing import Any

import pytest

from better_attention.lab.analysis import findings
from better_attention.lab.analysis.findings import finding, gaps, origin, sentences, standings, tally, waiting
from better_attention.lab.analysis.paired import NOTHING
from better_attention.lab.analysis.summary import COLUMNS, Column, Row, summarise
from better_attention.lab.report.forest import forest
from helpers.studies import record

KEYS = {column.key: column for column in COLUMNS}


def said(one: str) -> str:
    return one.replace("\N{NO-BREAK SPACE}", " ")


def runs(mechanism: str, *accuracies: float, heads: int = 4, **changes: Any) -> list[dict[str, Any]]:
    return [record(mechanism, s, heads, test_accuracy=value, **changes) for s, value in enumerate(accuracies)]


CLEAR = [*runs("standard", 90.0, 91.0, 92.0), *runs("super", 92.0, 93.01, 94.02)]
"""Differences 2, 2.01, 2.02: t = 348, p = 8.2e-6 (1 - t/√(2 + t²))."""
NOISE = [*runs("standard", 90.0, 91.0, 92.0), *runs("super", 91.5, 90.1, 92.9)]
"""Differences 1.5, -0.9, 0.9: mean 0.5, s = 1.249, t = 0.693, p = 0.56."""

# ----------------------------------------------------------------------------------------------------------- claims


def test_a_difference_that_is_shown() -> None:
    assert said(sentences(summarise(CLEAR))[0]) == (
        "With 4 heads, super has the highest test accuracy, 93.01 ± 2.51 % (3 seeds): +2.01 ± 0.02 points against "
        "standard, higher (p < 0.001, the only comparison)."
    )


def test_a_difference_that_is_not() -> None:
    assert said(sentences(summarise(NOISE))[0]) == (
        "With 4 heads, super has the highest test accuracy, 91.50 ± 3.48 % (3 seeds): +0.50 ± 3.10 points against "
        "standard, no difference shown (p 0.56, the only comparison)."
    )


def test_the_correction_is_told_and_decides() -> None:
    # p = 0.0091 uncorrected: clear alone, not among ten comparisons
    clear = [*runs("standard", 90.0, 90.0, 90.0), *runs("super", 91.0, 91.2, 91.4)]
    assert "higher (p 0.009, the only comparison)" in sentences(summarise(clear))[0]
    rest = [run for name in "abcdefghi" for run in runs(name, 90.1, 89.0, 90.0)]
    (sentence,) = [s for s in sentences(summarise([*clear, *rest])) if s.startswith("With")]
    assert "no difference shown (p 0.091, corrected for 10 comparisons)." in sentence


def test_a_single_seed_claims_nothing() -> None:
    (sentence, *_) = sentences(summarise([*runs("standard", 90.0), *runs("super", 92.0)]))
    assert said(sentence) == (
        "With 4 heads, super has the highest test accuracy, 92.00 % (1 seed): +2.00 points against standard, "
        "not tested (a single pair of seeds tells nothing about chance)."
    )


def test_standard_at_the_top_is_compared_with_nothing() -> None:
    rows = summarise([*runs("standard", 95.0, 95.5), *runs("super", 92.0, 93.0)])
    assert said(sentences(rows)[0]) == "With 4 heads, standard has the highest test accuracy, 95.25 ± 3.18 % (2 seeds)."
    rows = summarise([*runs("standard", 95.0, 95.0), *runs("super", 95.0, 95.0)])
    assert said(sentences(rows)[0]).startswith(
        "With 4 heads, standard and super share the highest test accuracy, 95.00"
    )
    assert "against" not in sentences(rows)[0]


def test_two_that_share_the_top_name_whose_difference_it_is() -> None:
    rows = summarise([*CLEAR, *runs("expressive", 92.0, 93.0, 94.03)])
    assert "super and expressive share" in sentences(rows)[0]
    assert ": super +2.01" in said(sentences(rows)[0])


def test_every_metric_of_the_test_split_is_counted() -> None:
    found = sentences(summarise(CLEAR))
    assert found[1:] == [
        "Test accuracy against standard, 1 comparison: higher in 1.",
        f"Test loss against standard: {NOTHING} in the only comparison.",
    ]
    bleu = [record("standard", s, test_bleu=20.0 + s) for s in (0, 1, 2)]
    bleu += [record("super", s, test_bleu=18.0 + s + s / 100) for s in (0, 1, 2)]
    found = [said(one) for one in sentences(summarise(bleu))]
    assert "With 4 heads, standard has the highest test BLEU, 21.0 ± 2.5 (3 seeds)." in found
    assert "Test BLEU against standard, 1 comparison: lower in 1." in found


def test_counts_over_heads_and_mechanisms() -> None:
    both = [
        *CLEAR,
        *runs("efficient", 90.0, 91.1, 91.9),
        *runs("standard", 90.0, heads=2),
        *runs("super", 91.0, heads=2),
    ]
    assert tally(summarise(both), KEYS["test_accuracy"]) == (
        "Test accuracy against standard, 3 comparisons: higher in 1, no difference shown in 1, not tested in 1."
    )
    assert tally(summarise(runs("super", 90.0)), KEYS["test_accuracy"]) is None


@pytest.mark.parametrize("column", [c for c in COLUMNS if not c.tested], ids=lambda c: c.key)
def test_no_claim_rests_on_anything_but_the_test_split(column: Column) -> None:
    for claim in (finding, tally):
        with pytest.raises(ValueError, match="claims rest on the test split, received column"):
            claim(summarise(CLEAR), column)


def test_every_column_of_the_test_split_has_its_words() -> None:
    assert {c.key for c in COLUMNS if c.tested} == set(findings._WORDS)
    assert all("train" not in sentence.lower() for sentence in sentences(summarise(CLEAR)))
    assert all("est " in sentence for sentence in sentences(summarise(CLEAR)))  # "test", "Test"


def test_training_figures_move_no_sentence() -> None:
    changed = [run | {"train_accuracy": 1.0 + run["seed"], "train_loss": 9.0} for run in CLEAR]
    assert sentences(summarise(changed)) == sentences(summarise(CLEAR))


def test_nothing_to_compare_is_nothing_to_say() -> None:
    assert sentences([]) == []
    assert sentences(summarise(runs("super", 90.0, 91.0))) == []


# ------------------------------------------------------------------------------------------------------------- gaps


def test_missing_seeds_are_told() -> None:
    some = [*runs("standard", 90.0, 91.0, 92.0, 93.0), *runs("super", 92.0)]
    assert gaps(summarise(some)) == [
        "super with 4 heads lacks seeds 1, 2 and 3: its means are over the other seeds, its differences over those "
        "that standard has, too."
    ]
    assert gaps(summarise(CLEAR)) == []


def test_a_diverged_run_is_told() -> None:
    (note,) = gaps(summarise([*runs("standard", 90.0, 91.0), *runs("super", 92.0, math.nan)]))
    assert note == "super with 4 heads: Test acc. % of at least one run is no number; nothing is claimed of it."


def test_a_missing_baseline_is_told() -> None:
    rows = summarise([*CLEAR, *runs("super", 90.0, heads=1), *runs("efficient", 90.0, heads=1)])
    assert gaps(rows) == ["standard was not run with 1 head: nothing is compared with it there."]


# ----------------------------------------------------------------------------------------------------------- origin


def test_what_is_the_papers_and_what_is_ours() -> None:
    names = ("standard", "super", "expressive", "super+expressive", "standard+align")
    line = origin("imdb", summarise([record(name, task="imdb") for name in names]))
    assert line == (
        "The task is that of arXiv 2403.01643 (table 8), what it leaves open is our choice; arXiv 2403.01643 defines "
        "standard and super; expressive takes its score from arXiv 2407.18601; super+expressive and standard+align are "
        "our own variants. Seeds, intervals, tests, speeds and pictures are ours."
    )


def test_what_the_paper_has_no_results_of_is_marked() -> None:
    rows = summarise([record(name, task="translation") for name in ("standard", "super")])
    assert "it has no results of super on this task" in origin("translation", rows)


def test_a_task_of_our_own_says_so() -> None:
    line = origin("recurrence", summarise(CLEAR))
    assert line.startswith("The task is not the paper's: its definition and its setting are our own;")


# ---------------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize(
    ("shares", "text", "flagged"),
    [
        ((0.001, 0.0123), "at most 1.2 % of a step (standard-h4-s1)", False),
        ((0.05, 0.0), "at most 5.0 % of a step (standard-h4-s0): 5 % or more, so that times include the data pipeline "
         "as well", True),
    ],
)  # fmt: skip
def test_the_worst_share_of_waiting(shares: tuple[float, ...], text: str, flagged: bool) -> None:
    assert waiting([record(seed=s, waiting_share=share) for s, share in enumerate(shares)]) == (text, flagged)


@pytest.mark.parametrize("odd", [None, "0.5", math.nan, True])
def test_shares_that_nobody_measured(odd: object) -> None:
    assert waiting([record(waiting_share=odd), record(seed=1)]) is None


# ------------------------------------------------------------------------------------------------------------ ranks


def ranked() -> list[Row]:
    """Ranks of accuracy and loss with 4 heads: standard 2, 1; super 1, 2; efficient 3, 3, which was not run with 1."""
    values = {
        ("standard", 4): (91.0, 0.1), ("super", 4): (92.0, 0.2), ("efficient", 4): (90.0, 0.3),
        ("standard", 1): (95.0, 0.1), ("super", 1): (94.0, 0.2),
    }  # fmt: skip
    return summarise(record(name, 0, h, test_accuracy=a, test_loss=loss) for (name, h), (a, loss) in values.items())


def test_mean_ranks_are_over_the_heads_that_every_mechanism_was_run_at() -> None:
    found = [(one.mechanism, one.places, one.mean, one.blocks) for one in standings(ranked())]
    assert found == [
        ("standard", {"test_accuracy": 2.0, "test_loss": 1.0}, 1.5, 2),
        ("super", {"test_accuracy": 1.0, "test_loss": 2.0}, 1.5, 2),
        ("efficient", {"test_accuracy": 3.0, "test_loss": 3.0}, 3.0, 2),
    ]


def test_ranks_are_of_the_test_split_alone() -> None:
    assert {key for one in standings(ranked()) for key in one.places} == {"test_accuracy", "test_loss"}


def test_one_mechanism_has_no_rank_table() -> None:
    assert standings(summarise(runs("super", 90.0))) == []


# ----------------------------------------------------------------------------------------------------------- forest


def test_places_are_on_a_line_symmetric_around_zero() -> None:
    rows = summarise([*runs("standard", 90.0, 91.0, 92.0), *runs("super", 91.0, 93.0, 95.0), *runs("efficient", 88.0)])
    found = forest(rows, KEYS["test_accuracy"])
    assert found is not None
    efficient, ours = found.bars
    # super: 1, 2, 3: 2 ± 4.3027/√3 = 2.4841; the line reaches to the farthest end, 4.4841, rounded up, at 98
    assert found.reach == "5"
    assert (ours.low, ours.at, ours.high) == tuple(
        pytest.approx(50 + 48 * v / 5, abs=0.01) for v in (-0.48414, 2.0, 4.48414)
    )
    assert ours.text == "+2.00 ± 2.48 (p 0.074)"
    assert (ours.verdict, ours.shown) == (NOTHING, False)
    assert (efficient.low, efficient.at, efficient.high) == (None, pytest.approx(50 - 48 * 2 / 5, abs=0.01), None)


def test_what_is_no_number_has_no_place() -> None:
    rows = summarise([*runs("standard", 90.0, 91.0), *runs("super", 91.0, math.nan)])
    found = forest(rows, KEYS["test_accuracy"])
    assert found is not None
    assert (found.bars[0].at, found.bars[0].low, found.reach) == (None, None, "1")
    assert found.bars[0].text == "diverged (p –)"


def test_equal_runs_stand_on_zero() -> None:
    found = forest(summarise([*runs("standard", 90.0, 91.0), *runs("super", 90.0, 91.0)]), KEYS["test_accuracy"])
    assert found is not None
    assert (found.bars[0].low, found.bars[0].at, found.bars[0].high) == (50, 50, 50)
    assert forest(summarise(CLEAR), KEYS["test_bleu"]) is None
