"""What a comparison says of its own setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from better_attention.experiments.compare import Plan, compare
from better_attention.experiments.remarks import remarks
from better_attention.experiments.tasks import TASKS
from better_attention.experiments.variant import Variant
from better_attention.experiments.watcher import Watcher

STANDARD = [Variant.of("standard")]


@pytest.mark.parametrize("name", ["mnist", "imdb", "amazon", "translation", "cifar100"])
def test_the_papers_setting_needs_no_remark(name: str) -> None:
    assert remarks(TASKS[name]("paper"), STANDARD, [1, 4]) == ()


def test_what_differs_from_the_papers_setting_is_named() -> None:
    task = replace(TASKS["imdb"]("paper"), epochs=1, train_samples=300, seeds=7)
    assert remarks(task, STANDARD, [4]) == ("the setting is not the paper's: epochs=1, train_samples=300",)


def test_a_task_of_our_own_has_no_setting_of_the_papers() -> None:
    assert remarks(TASKS["recurrence"]("smoke"), STANDARD, [2]) == ()


def test_equal_parameters_are_told_in_numbers() -> None:
    """Table 7 of arXiv 2403.01643: 60.54 and 60.09 million parameters, 768 wide and 8 deep, 804 wide and 9 deep."""
    task = replace(TASKS["imagenet"]("paper"), equal_params=True)
    (found,) = remarks(task, [Variant.of(name) for name in ("standard", "efficient")], [12])
    sizes = "standard 60,539,960 (width 768, layers 8), efficient 60,094,724 (width 804, layers 9)"
    assert found == f"equal parameters with 12 heads: {sizes}"


def test_they_reach_the_study(tmp_path: Path) -> None:
    task = tiny.task(epochs=1, equal_params=True)
    study, _ = compare(Plan(task, STANDARD, [3], 1, tmp_path, device="cpu"), Watcher())
    assert any(note.startswith("equal parameters with 3 heads: standard ") for note in study.notes)
