"""Samples of a trained model's own kind: for its calibration, its distillation, its judgement and its export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from better_attention.lab.tasks.splits import Splits
from better_attention.lab.trained import host
from better_attention.lab.trained.origin import HostOrigin, Origin, RunOrigin
from better_attention.lab.training.evaluation import evaluate
from better_attention.lab.training.matching import OutputLoss, logits_loss
from better_attention.text import plural

BATCH = 64
"""Samples of a batch for calibration and for measuring agreement."""
Batch = Tensor | dict[str, Tensor]


class Samples(ABC):
    """Where inputs of a model come from."""

    @property
    @abstractmethod
    def available(self) -> int:
        """Training samples that there are."""

    @abstractmethod
    def train(self, count: int | None, batch_size: int = BATCH) -> list[Batch]:
        """Batches of ``count`` training samples, drawn by a fixed seed; None for all of them.

        Raises:
            ValueError: there are fewer.
        """

    @abstractmethod
    def held_out(self, count: int, batch_size: int = BATCH) -> list[Batch]:
        """Batches of at most ``count`` samples that :meth:`train` does not draw from."""

    @abstractmethod
    def accuracy(self, model: nn.Module) -> float | None:
        """Accuracy on the test split in per cent; None where the samples have no classes."""

    @property
    @abstractmethod
    def loss(self) -> OutputLoss | None:
        """The loss of the outputs in a distillation; None for the usual one."""


@dataclass(frozen=True)
class RunSamples(Samples):
    """The data that a run was trained on."""

    origin: RunOrigin
    splits: Splits

    @classmethod
    def read(cls, origin: RunOrigin, folder: Path | None) -> RunSamples:
        """The data set of the run in ``folder``; None: where ``data fetch`` puts it.

        Raises:
            ValueError: it is missing or damaged, or is not what the run was trained on.
        """
        splits = origin.task.load(folder)
        if splits.digest != origin.config.description.get("data_sha256"):
            raise ValueError(
                f"{folder or 'the data set'} is not the data that the run {origin.config.name} of task "
                f"{origin.task.name!r} was trained on: name the folder of that data with --data."
            )
        return cls(origin, splits)

    @property
    def available(self) -> int:
        """See :attr:`Samples.available`."""
        return len(self.splits.train)

    def train(self, count: int | None, batch_size: int = BATCH) -> list[Batch]:
        """See :meth:`Samples.train`."""
        split = self.splits.train
        _check_count(count, self.available)
        # A fixed seed of its own: the same samples calibrate in every call, whatever the caller drew before.
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
        return [split.batch(rows)[0] for rows in order.split(batch_size)]

    def held_out(self, count: int, batch_size: int = BATCH) -> list[Batch]:
        """See :meth:`Samples.held_out`: the first of the test split."""
        return list(self.splits.test.inputs[:count].split(batch_size))

    def accuracy(self, model: nn.Module) -> float | None:
        """See :meth:`Samples.accuracy`."""
        # On the CPU, where models that were read from the disk lie.
        return evaluate(Accelerator(cpu=True), model, self.origin.task, self.splits.test)["accuracy"]

    @property
    def loss(self) -> OutputLoss | None:
        """See :attr:`Samples.loss`: the divergence of the class probabilities."""
        return class_divergence


@dataclass(frozen=True)
class TextSamples(Samples):
    """Texts of the user's for a model of transformers; the last tenth is held out.

    Args:
        origin: of the model, with its tokeniser.
        texts: at least two.
        length: most tokens of a text; None for what the model reads.
    """

    origin: HostOrigin
    texts: Sequence[str]
    length: int | None = None

    @classmethod
    def read(cls, origin: HostOrigin, file: Path, length: int | None = None) -> TextSamples:
        """The lines of a UTF-8 file, empty ones left out.

        Raises:
            ValueError: not UTF-8, or fewer than two texts.
            OSError: it cannot be read.
        """
        try:
            # Editors on Windows put a byte order mark in front, which would become a part of the first text.
            lines = file.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}). Convert it first.") from None
        texts = [line for line in lines if line.strip()]
        if len(texts) < 2:
            raise ValueError(f"{file} holds {plural(len(texts), 'text')}: write at least two, one in each line.")
        return cls(origin, texts, length or host.longest(origin.folder))

    @property
    def available(self) -> int:
        """See :attr:`Samples.available`."""
        return len(self.texts) - max(1, len(self.texts) // 10)

    def train(self, count: int | None, batch_size: int = BATCH) -> list[Batch]:
        """See :meth:`Samples.train`."""
        texts = self.texts[: self.available]
        _check_count(count, self.available)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:count]
        return [self._batch([texts[row] for row in rows.tolist()]) for rows in order.split(batch_size)]

    def held_out(self, count: int, batch_size: int = BATCH) -> list[Batch]:
        """See :meth:`Samples.held_out`."""
        texts = self.texts[self.available :][:count]
        return [self._batch(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]

    def accuracy(self, model: nn.Module) -> float | None:
        """None: texts without labels have no accuracy."""
        return None

    @property
    def loss(self) -> OutputLoss | None:
        """See :attr:`Samples.loss`."""
        return None

    def _batch(self, texts: Sequence[str]) -> Batch:
        return host.tokenised(self.origin.folder, texts, self.length)


def samples_of(origin: Origin, data: Path | None, texts: Path | None) -> Samples | None:
    """The samples of a model: of a run those of its task, of a model of transformers those in a file of texts.

    Args:
        origin: of the model.
        data: the folder of a run's data set.
        texts: the file.

    Returns:
        None for a model of transformers without texts.

    Raises:
        ValueError: data of another run, or an option that belongs to the other kind of model.
        OSError: a file cannot be read.
    """
    if isinstance(origin, RunOrigin):
        if texts is not None:
            raise ValueError(f"--texts {texts}: this model is of a run, and its own data is read. Remove --texts.")
        return RunSamples.read(origin, data)
    if data is not None:
        raise ValueError(f"--data {data}: this model is of transformers: give it a file of texts with --texts.")
    if not isinstance(origin, HostOrigin):
        raise TypeError(f"no samples are known for a {type(origin).__name__}.")
    return None if texts is None else TextSamples.read(origin, texts)


def class_divergence(student: Any, teacher: Any, batch: Any) -> Tensor:
    """Divergence of the student's class probabilities from the teacher's, logits (..., K); K = 1 is two classes."""
    if student.shape[-1] == 1:
        # One logit x of class 1 is the same as the logits (0, x) of two classes: sigmoid(x) = softmax((0, x))[1].
        student, teacher = (torch.cat([torch.zeros_like(x), x], dim=-1) for x in (student, teacher))
    return logits_loss(student, teacher, None, temperature=1.0)


def _check_count(count: int | None, there: int) -> None:
    if count is not None and count > there:
        raise ValueError(f"{plural(count, 'training sample')} were asked for, there are {there:,}.")
