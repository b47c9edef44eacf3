"""A tiny task on scikit-learn's digits: a whole run in about a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from better_attention.lab.comparison import compare
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.runs import manifest
from better_attention.lab.runs.folder import FILES, RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.events import Notify, ignore
from better_attention.lab.training.loop import Training
from better_attention.lab.training.processes import make_accelerator
from better_attention.lab.training.step_time import Measure, Pace


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


def pace(*_: object, **__: object) -> Pace:
    """The speed of every model, for comparisons that have no part in measuring it."""
    return Pace(0.1, None)


def train(plan: Plan, notify: Notify = ignore, measure: Measure = pace) -> list[str]:
    """Train the runs of a comparison and write no results; the names of those that failed."""
    accelerator = make_accelerator(plan.device)
    stored = Snapshot.read(plan.out)
    return compare.train(plan, stored, compare.load(plan, accelerator), accelerator, notify, measure)


def overriding(task: ImageTask, **members: Any) -> ImageTask:
    """The same task with other members, such as ``losses(task, logits, targets)``."""
    kind: type[ImageTask] = type("Changed", (type(task),), members)
    return kind(**{each.name: getattr(task, each.name) for each in fields(task) if each.init})


def sign(folder: Path) -> None:
    """Write the manifest of a finished run anew: a test changed it to what another version would have written."""
    manifest.add(folder, [name for name in FILES if (folder / name).exists()])


def training(folder: Path, mechanism: str = "super", seed: int = 0, **changes: Any) -> Training:
    """A run of the tiny task, or of ``task``; fields of the task and of Training may be changed alike."""
    own = {key: changes.pop(key) for key in ("progress", "stop", "checkpoint_seconds", "splits") if key in changes}
    return Training(
        Job(changes.pop("task", None) or task(**changes), Variant.of(mechanism), 3, seed),
        splits=own.pop("splits", None) or splits(),
        folder=RunFolder(folder),
        accelerator=Accelerator(cpu=True),
        **own,
    )


def plan(out: Path, mechanisms: Sequence[str] = ("standard", "super"), **changes: Any) -> Plan:
    """One run of each mechanism, one epoch, at three heads."""
    names = [Variant.of(name) for name in mechanisms]
    own: dict[str, Any] = {"heads": (3,), "seeds": 1, "device": "cpu", "command": "better-attention compare"}
    return Plan(task=task(epochs=1), variants=names, out=out, **(own | changes))
