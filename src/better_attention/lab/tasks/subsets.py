"""Which samples of a data set a task trains, validates and tests with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from better_attention.lab.tasks.base import Task


def check_classes(task: Task, classes: int, there: Sequence[str]) -> None:
    """Refuse data of another number of classes than the model is built for.

    Raises:
        ValueError: it is another.
    """
    if len(there) != classes:
        raise ValueError(
            f"task {task.name!r} is set to classes={classes}, but data set {task.dataset!r} has {len(there)}: "
            f"leave `classes` as it is, or take classes={len(there)}."
        )


def cut(task: Task, train: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of the training, validation and test samples.

    Validation is cut from the official training split; smaller scales then take subsets of each part.
    All three are random, in an order that depends on ``task.data_seed`` alone.

    Raises:
        ValueError: a part would be empty.
    """
    generator = torch.Generator().manual_seed(task.data_seed)
    # Both draw from one generator: the order of these two lines is part of the split and must never change.
    rows = torch.randperm(train, generator=generator)
    tests = torch.randperm(test, generator=generator)[: task.test_samples].sort().values
    size = train if task.train_samples is None else min(task.train_samples, train)
    held_out = round(size * task.validation_share)
    parts = rows[held_out:size], rows[:held_out], tests
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if len(part) == 0:
            raise ValueError(
                f"task {task.name!r} leaves no {name} samples of {train} training and {test} test samples "
                f"(validation_share={task.validation_share}, train_samples={task.train_samples}, "
                f"test_samples={task.test_samples})."
            )
    return parts


def subsets(task: Task, train: int, validation: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of the training, validation and test samples where all three are given: all, or random subsets.

    ``task.train_samples`` counts training and validation together, as it does where validation is cut from training.

    Raises:
        ValueError: a part would be empty.
    """
    limits: tuple[int | None, int | None] = (None, None)
    if task.train_samples is not None:
        held_out = min(validation, round(task.train_samples * task.validation_share))
        limits = task.train_samples - held_out, held_out
        if min(limits) < 1:
            raise ValueError(
                f"task {task.name!r} leaves no training or no validation samples (train_samples={task.train_samples}, "
                f"validation_share={task.validation_share})."
            )
    generator = torch.Generator().manual_seed(task.data_seed)

    def some(size: int, limit: int | None) -> Tensor:
        return torch.randperm(size, generator=generator)[:limit].sort().values

    return some(train, limits[0]), some(validation, limits[1]), some(test, task.test_samples)
