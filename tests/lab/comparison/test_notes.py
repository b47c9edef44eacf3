"""What a comparison says of its own setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from better_attention.lab.comparison.compare import compare
from better_attention.lab.comparison.notes import guessing, remarks
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from helpers import tiny

STANDARD = [Variant.of("standard")]


@pytest.mark.parametrize("name", ["mnist", "imdb", "amazon", "translation", "cifar100"])
def test_the_papers_setting_needs_no_remark(name: str) -> None:
    assert remarks(TASKS[name]("paper"), STANDARD, [1, 4]) == ()


def test_what_differs_from_the_papers_setting_is_named() -> None:
    task = replace(TASKS["imdb"]("paper"), epochs=1, train_samples=300, seeds=7)
    assert remarks(task, STANDARD, [4]) == ("the setting is not the paper's: epochs=1, train_samples=300",)


def test_a_task_of_our_own_has_no_setting_of_the_papers() -> None:
    assert remarks(TASKS["recurrence"]("smoke"), STANDARD, [2]) == ()


def test_whose_heads_are_grouped_is_told() -> None:
    task = replace(TASKS["text-lm"]("smoke"), kv_heads=2)
    variants = [Variant.of(name) for name in ("standard", "super", "optimised", "efficient")]
    (found,) = remarks(task, variants, [4])
    assert found == (
        "2 heads of projected keys and values in standard, optimised; kv_heads=2 does not apply to super, efficient, "
        "without projected keys to group: each query head reads its own slice of the input"
    )
    assert remarks(task, STANDARD, [4]) == ("2 heads of projected keys and values in standard",)
    assert remarks(task, [Variant.of("efficient")], [4])[0].startswith("kv_heads=2 does not apply to efficient, with")
    assert remarks(task, variants, [2]) == ()
    assert remarks(replace(task, kv_heads=None), variants, [4]) == ()


def test_equal_parameters_are_told_in_numbers() -> None:
    """Table 7 of arXiv 2403.01643: 60.54 and 60.09 million parameters, 768 wide and 8 deep, 804 wide and 9 deep."""
    task = replace(TASKS["imagenet"]("paper"), equal_params=True)
    found, odd = remarks(task, [Variant.of(name) for name in ("standard", "efficient")], [12])
    sizes = "standard 60,539,960 (width 768, layers 8), efficient 60,094,724 (width 804, layers 9, −0.7 %)"
    assert found == f"equal parameters with 12 heads: {sizes}"
    assert odd == (
        "widths chosen with 12 heads that are no multiple of 8, which may cost speed that is not the mechanism's: "
        "efficient 804"
    )


def test_a_width_that_is_a_multiple_of_eight_or_was_given_costs_nothing() -> None:
    task = replace(TASKS["imagenet"]("paper"), equal_params=True)
    assert len(remarks(task, [Variant.of("efficient")], [8])) == 1  # of 8 heads every width is
    assert len(remarks(replace(task, width=780), STANDARD, [12])) == 2  # the setting is not the paper's, and the sizes


def test_where_nothing_is_widened_it_is_said() -> None:
    """Nearly all of the model are its embeddings: a column more is more than what a mechanism saves."""
    task = replace(TASKS["imdb"]("paper"), equal_params=True)
    (found,) = remarks(task, [Variant.of("efficient")], [4])
    assert found == (
        "equal parameters with 4 heads: efficient 645,581 (width 32, layers 1, −0.3 %); no other width comes nearer, "
        "so that nothing was widened"
    )


def test_standard_alone_has_nothing_to_widen() -> None:
    task = replace(TASKS["imdb"]("paper"), equal_params=True)
    (found,) = remarks(task, STANDARD, [4])
    assert found == "equal parameters with 4 heads: standard 647,693 (width 32, layers 1)"


def test_other_data_than_the_papers_are_told_of() -> None:
    task, samples = TASKS["amazon"]("paper"), {"train": 23_107, "validation": 2_892, "test": 2_892}
    assert remarks(task, STANDARD, [4], samples) == (
        "the setting is not the paper's: 28,891 samples instead of 3,650,000",
    )
    whole = {"train": 2_700_000, "validation": 300_000, "test": 650_000}
    assert remarks(task, STANDARD, [4], whole) == ()


def splits_of(targets: list[int], classes: list[str]) -> Splits:
    part = Split(torch.zeros(len(targets), 2), torch.tensor(targets))
    return Splits(part, part, part, {"classes": classes})


def test_the_zero_of_an_accuracy_is_that_of_the_samples_that_are_used() -> None:
    assert guessing(splits_of([1] * 75 + [0] * 25, ["ants", "bees"])) == (
        "guessing 'bees', the most frequent class, is right for 75.0 % of the test samples",
    )
    used = tiny.splits()
    often = used.test.targets.bincount().max() / len(used.test)
    assert f"is right for {100 * often:.1f} % of the test samples" in guessing(used)[0]


def test_a_handful_of_test_samples_is_told_of() -> None:
    assert guessing(splits_of([0, 1, 1, 0, 1], ["a", "b"]))[1] == "the test split has 5 samples: one is 20.0 points"


def test_what_is_no_class_a_sample_has_no_such_zero() -> None:
    assert guessing(TASKS["recurrence"]("smoke").load()) == ()


def test_they_reach_the_study(tmp_path: Path) -> None:
    task = tiny.task(epochs=1, equal_params=True)
    study, _ = compare(Plan(task, STANDARD, [3], 1, tmp_path, device="cpu"))
    assert any(note.startswith("equal parameters with 3 heads: standard ") for note in study.notes)


def test_an_epoch_of_one_update_is_told() -> None:
    few = {"train": 64, "validation": 8, "test": 8}
    for size, told in ((63, False), (64, True), (10**8, True)):
        notes = remarks(tiny.task(batch_size=size), [Variant.of("super")], (3,), few)
        assert any("an epoch is a single update: a batch of" in note for note in notes) == told
