"""One conversion, measured at its four stages; the same for the lab's models and for MiniLM."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import better_attention as ba

from .records import Record, Stage, parameters

Judge = Callable[[nn.Module], float]


class OutputLoss(Protocol):
    """The loss of the second stage of ``ba.distil``."""

    def __call__(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        """A scalar."""


@dataclass(frozen=True)
class Subject:
    """A trained model, and what is needed to judge, calibrate and distil it.

    Args:
        task, metric, heads, seed: see :class:`Record`.
        model: the original.
        length: longest input, the size of W_A.
        test, development: the metric on two parts of the data.
        calibration, distillation: batches as the model takes them, none of them of the two parts.
        loss: of the outputs.
        output: the tensor that a model returns.
    """

    task: str
    metric: str
    heads: int
    seed: int
    model: nn.Module
    length: int
    test: Judge
    development: Judge
    calibration: Sequence[Any]
    distillation: Sequence[Any]
    loss: OutputLoss
    output: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Setting:
    """How long the distillation is: passes over the data in its two stages, and the highest learning rate."""

    hidden_epochs: int
    output_epochs: int
    lr: float


def study(subject: Subject, mechanism: str, setting: Setting, before: Stage) -> Record:
    """Convert a copy of the model by its weights alone, and again with calibration, which is then distilled."""
    target = ba.Mechanism.of(mechanism)
    options: dict[str, Any] = {"exact": False, "keep_original": False}
    options |= {"max_len": subject.length} if target.aligned else {}
    student, began = copy.deepcopy(subject.model), time.perf_counter()
    report = ba.convert(student, target, **options)
    seconds = time.perf_counter() - began
    record = Record(
        *(subject.task, subject.metric, mechanism, subject.heads, subject.seed, report.exact),
        parameters={"before": parameters(subject.model), "after": parameters(student)},
        attention={
            "before": sum(layer.size_before.parameters for layer in report.layers),
            "after": sum(layer.size_after.parameters for layer in report.layers),
        },
        difference=difference(subject, student),
        settings=_sizes(subject, setting),
    )
    record.stages += [before, judged(subject, student, "weights", seconds)]
    if report.exact:
        return record
    student, began = copy.deepcopy(subject.model), time.perf_counter()
    report = ba.convert(student, target, calibration=subject.calibration, **options)
    record.errors = [(layer.error_before, layer.error_after) for layer in report.layers]
    record.stages.append(judged(subject, student, "calibrated", time.perf_counter() - began))
    record.curve.append((0, record.stages[-1].development))
    seconds = distil(subject, student, setting, record)
    record.stages.append(judged(subject, student, "distilled", seconds))
    return record


def judged(subject: Subject, model: nn.Module, stage: str, seconds: float) -> Stage:
    """The model on both parts of the data."""
    model.eval()
    return Stage(stage, subject.test(model), subject.development(model), seconds)


def distil(subject: Subject, student: nn.Module, setting: Setting, record: Record) -> float:
    """Distil the student; seconds without those of the curve, which gets a point after every pass over the data."""
    aside = 0.0

    def progress(step: int, steps: int, loss: float) -> None:
        nonlocal aside
        if step % len(subject.distillation) == 0:
            began = time.perf_counter()
            student.eval()
            record.curve.append((step, subject.development(student)))
            student.train()
            aside += time.perf_counter() - began

    began = time.perf_counter()
    ba.distil(
        student,
        subject.model,
        subject.distillation,
        hidden_epochs=setting.hidden_epochs,
        output_epochs=setting.output_epochs,
        lr=setting.lr,
        weight_decay=0.0,
        loss=subject.loss,
        seed=subject.seed,
        progress=progress,
    )
    return time.perf_counter() - began - aside


@torch.no_grad()
def difference(subject: Subject, student: nn.Module) -> float:
    """Largest difference of the two outputs on a batch, as a share of the largest output."""
    batch = subject.calibration[0]
    wanted, got = (subject.output(model.eval()(**batch)) for model in (subject.model, student))
    return float((wanted - got).abs().max() / wanted.abs().max())


def _sizes(subject: Subject, setting: Setting) -> dict[str, Any]:
    def samples(batches: Sequence[Any]) -> int:
        return sum(len(next(iter(batch.values()))) for batch in batches)

    return {
        "calibration_samples": samples(subject.calibration),
        "distillation_samples": samples(subject.distillation),
        "updates_per_epoch": len(subject.distillation),
        "hidden_epochs": setting.hidden_epochs,
        "output_epochs": setting.output_epochs,
        "lr": setting.lr,
    }
