"""A tiny task on scikit-learn's digits: a whole run in about a second."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from better_attention.experiments import manifest
from better_attention.experiments.image_task import ImageTask
from better_attention.experiments.runs import FILES
from better_attention.experiments.splits import Splits
from better_attention.experiments.tasks import TASKS
from better_attention.experiments.train import Training
from better_attention.experiments.variant import Variant


def task(**changes: Any) -> ImageTask:
    """90 training samples in 6 updates an epoch, 10 of validation, 37 of the test."""
    base = TASKS["digits"]("smoke")
    assert isinstance(base, ImageTask)
    small: dict[str, Any] = {"width": 6, "default_heads": 3, "heads": (3,), "train_samples": 100, "test_samples": 37}
    return replace(base, **(small | {"batch_size": 16, "epochs": 3, "patience": 0, "lr": 1e-2} | changes))


@cache
def splits() -> Splits:
    """The data of the tiny task, read once."""
    return task().load()


def sign(folder: Path) -> None:
    """Write the manifest of a finished run anew: a test changed it to what another version would have written."""
    manifest.add(folder, [name for name in FILES if (folder / name).exists()])


def training(folder: Path, mechanism: str = "super", seed: int = 0, **changes: Any) -> Training:
    """A run of the tiny task; fields of the task and of Training may be changed alike."""
    own = {key: changes.pop(key) for key in ("progress", "stop", "checkpoint_seconds", "splits") if key in changes}
    return Training(
        task=task(**changes),
        splits=own.pop("splits", None) or splits(),
        variant=Variant.of(mechanism),
        heads=3,
        seed=seed,
        folder=folder,
        accelerator=Accelerator(cpu=True),
        **own,
    )
