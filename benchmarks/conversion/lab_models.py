"""The lab's own models: the vision transformer on MNIST and the text classifier on IMDB, trained by ``compare``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import better_attention as ba
from better_attention.cli.main import main
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.training.evaluation import evaluate

from .study import Subject

INPUTS = {"mnist": "images", "imdb": "tokens_BL"}
"""What the models call their argument."""
HEADS = {"mnist": (4,), "imdb": (4, 1)}
SETTINGS = {"mnist": ["--epochs", "3", "--set", "test_samples=2000"], "imdb": []}
"""What differs from the task's setting at the scale "small"."""
BATCH = 64


def train(task: str, seeds: int, work: Path, data: Path, *, quick: bool) -> None:
    """Train what is not yet trained: standard attention, ``work/TASK/standard-hH-sS``.

    Raises:
        RuntimeError: the command failed; it has said why.
    """
    heads = ",".join(map(str, HEADS[task]))
    arguments = ["compare", task, "--scale", "smoke" if quick else "small", "--mechanisms", "standard"]
    arguments += ["--heads", heads, "--seeds", str(seeds), "--out", str(work / task), "--data", str(data)]
    if main([*arguments, *([] if quick else SETTINGS[task])]):
        raise RuntimeError(f"the models of {task} were not trained: see above.")


def subject(task: str, heads: int, seed: int, work: Path, data: Path, sizes: tuple[int, int]) -> Subject:
    """A trained model, with training samples to calibrate and distil it.

    Args:
        task, heads, seed: of the run.
        work: where the runs are.
        data: the folder with the data set.
        sizes: samples of the calibration and of the distillation, drawn by the seed.
    """
    run = ba.load_run(work / task / f"standard-h{heads}-s{seed}")
    splits = load(run.task, data)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))

    def batches(rows: Tensor) -> list[dict[str, Tensor]]:
        return [{INPUTS[task]: splits.train.batch(part)[0]} for part in rows.split(BATCH)]

    return Subject(
        *(task, "test accuracy, %", heads, seed, run.model, run.task.length),
        test=accuracy(run.task, splits.test),
        development=accuracy(run.task, splits.validation),
        calibration=batches(order[: sizes[0]]),
        distillation=batches(order[: sizes[1]]),
        loss=divergence,
        output=lambda logits: logits,
    )


@cache
def load(task: Task, data: Path) -> Splits:
    """The data of a task, read once."""
    return task.load(data)


def accuracy(task: Task, split: Split) -> Callable[[nn.Module], float]:
    """The share of right classes in per cent, as the lab counts it."""

    def judge(model: nn.Module) -> float:
        return evaluate(Accelerator(cpu=True), model, task, split)["accuracy"]

    return judge


def divergence(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    """Kullback-Leibler divergence of the probabilities; a single logit (B, 1) is that of the second of two classes."""
    if student.shape[1] == 1:
        student, teacher = (torch.cat([torch.zeros_like(x), x], dim=1) for x in (student, teacher))
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
