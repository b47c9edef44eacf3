"""The data of a task: three splits, in memory as tensors, so that an epoch runs no Python code per sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

MOVED_AT_ONCE = 4 * 2**30
"""Bytes up to which a split is kept in an accelerator's memory as a whole."""


@dataclass(frozen=True)
class Split:
    """Inputs (N, ...) and the class of each, int64 (N,), or T classes of each, (N, T).

    ``device`` is where :meth:`batch` brings samples; None: they stay where they lie.
    """

    inputs: Tensor
    targets: Tensor
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device, at_once: int = MOVED_AT_ONCE) -> Split:
        """The same split for a model on ``device``: moved as a whole, or by batches above ``at_once`` bytes."""
        if device.type != "cpu" and self.inputs.nbytes + self.targets.nbytes > at_once:
            return replace(self, device=device)
        return Split(self.inputs.to(device), self.targets.to(device))

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, on the model's device."""
        if isinstance(rows, Tensor):
            rows = rows.to(self.inputs.device)
        inputs, targets = self.inputs[rows], self.targets[rows]
        return (inputs, targets) if self.device is None else (inputs.to(self.device), targets.to(self.device))

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples ``first``, ``first + step``, ... in order, ``size`` at a time; of an empty split, one empty batch.

        Every ``first`` below ``step`` gives as many batches, the last of which may be empty: the processes of a sharded
        model compute together, also for those of them that have run out of samples.
        """
        for start in range(0, max(len(self), 1), size * step):
            yield self.batch(slice(first + start, first + start + size * step, step))


@dataclass(frozen=True)
class Splits:
    """The data of a task, split once and for all mechanisms and seeds alike.

    ``assets`` is what a finished run needs to read new inputs, as plain JSON values: the names of the
    classes, the vocabulary. ``notes`` are sentences about the data that a report must carry; ``departures`` those that
    say why it is not the published set that the task is named for, which each run's record carries too.
    """

    train: Split
    validation: Split
    test: Split
    assets: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Name of a split -> how many samples it has."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every input and target: two runs with equal digests saw the same data."""
        digest = sha256()
        for split in (self.train, self.validation, self.test):
            for tensor in (split.inputs, split.targets):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                # The buffer itself: a copy of a set that is mapped from the disk may not fit into memory.
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> Splits:
        """The same splits on ``device``."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        moved = replace(self, **parts)
        # Moving changes no value, so the digest need not be computed again.
        moved.__dict__["digest"] = self.digest
        return moved


def most_frequent(targets: Tensor) -> tuple[int, float]:
    """The most frequent class of ``targets`` (N,), integers, and its share in per cent: what guessing it achieves.

    >>> most_frequent(torch.tensor([2, 2, 0, 1]))
    (2, 50.0)
    """
    counts = targets.cpu().bincount()
    return int(counts.argmax()), 100 * float(counts.max()) / len(targets)
