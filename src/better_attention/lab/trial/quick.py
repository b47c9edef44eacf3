"""Training a tiny model without ceremony: no folder, no checkpoint, one process, a line of results.

At these sizes (an update takes 1.5 to 5 ms on one core) the loop of comparisons spends as long on its records and its
measurement of speed as on the model. What is computed is the same: the task's model, losses, optimiser, splits and
initial weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from better_attention.lab.runs.job import Job
from better_attention.lab.tasks.base import Task, count
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.training.randomness import epoch_order, initial_model


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run.

    Args:
        params: learned values.
        updates: updates made: all, or those until the task was solved or the loss was no number.
        solved_at: updates until the target accuracy on validation was measured; None: never.
        curve: (updates, validation loss, validation accuracy in %) at every measurement.
        test_accuracy: of the weights with the lowest validation loss, in %; None where the run diverged.
        seconds: of updates alone.
    """

    params: int
    updates: int
    solved_at: int | None
    curve: tuple[tuple[int, float, float], ...]
    test_accuracy: float | None
    seconds: float


def train(job: Job, splits: Splits, updates: int, every: int) -> tuple[Outcome, nn.Module]:
    """Train for ``updates``, or until the task is solved; also returns the model with its best weights.

    Args:
        job: what is trained.
        splits: its data.
        updates: most updates.
        every: updates between two measurements on the validation split.
    """
    task, model = job.task, initial_model(job.task, job.variant, job.heads, job.seed)
    optimiser = task.make_optimiser(model)
    curve: list[tuple[int, float, float]] = []
    best, lowest, solved, seconds = model.state_dict(), math.inf, None, 0.0
    began = time.perf_counter()
    for step, batch in enumerate(batches(len(splits.train), task.batch_size, job.seed, updates), 1):
        inputs, targets = splits.train.batch(batch)
        # As a comparison's run divides: the sum by the number, so that the bits are the same.
        (task.losses(model(inputs), targets).sum() * (1 / len(batch))).backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % every and step != updates:
            continue
        seconds += time.perf_counter() - began
        loss, accuracy = measured(model, task, splits.validation)
        if not math.isfinite(loss):
            return Outcome(count(model), step, None, tuple(curve), None, seconds), model
        curve.append((step, loss, accuracy))
        if loss < lowest:
            lowest, best = loss, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if task.solved({"validation_accuracy": accuracy}):
            solved = step
            break
        began = time.perf_counter()
    model.load_state_dict(best)
    accuracy = measured(model, task, splits.test)[1]
    return Outcome(count(model), curve[-1][0], solved, tuple(curve), accuracy, seconds), model


def batches(samples: int, size: int, seed: int, updates: int) -> Iterator[Tensor]:
    """Indices of ``updates`` batches, in the order in which a comparison's run takes them."""
    made, epoch = 0, 1
    while made < updates:
        for batch in epoch_order(samples, seed, epoch).split(size)[: updates - made]:
            yield batch
            made += 1
        epoch += 1


def measured(model: nn.Module, task: Task, split: Split) -> tuple[float, float]:
    """Mean loss and accuracy in per cent."""
    model.eval()
    with torch.inference_mode():
        logits = model(split.inputs)
        loss = float(task.losses(logits, split.targets).mean())
        accuracy = 100 * float(task.correct(logits, split.targets).mean())
    model.train()
    return loss, accuracy
