"""Loss and accuracy of a split, every sample counted once, on one process or several."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.splits import Split
from better_attention.lab.training.sharding import is_spread


def evaluate(accelerator: Accelerator, model: nn.Module, task: Task, split: Split) -> dict[str, float]:
    """Mean loss and accuracy in per cent of ``split``, every sample counted once over all processes.

    Raises:
        RuntimeError: a sample was lost or counted twice.
    """
    loss = correct = seen = 0.0
    # train_epoch() switches back to training mode.
    model.eval()
    # A model that is spread over processes puts its blocks together in tensors that inference mode would spoil.
    with torch.inference_mode() if not any(map(is_spread, model.parameters())) else torch.no_grad():
        for x, y in split.batches(task.evaluation_batch, accelerator.process_index, accelerator.num_processes):
            logits = model(x)
            # Sums rather than means, because batches and the shares of the processes differ in size.
            loss += float(task.losses(logits, y).sum())
            correct += float(task.correct(logits, y).sum())
            seen += len(y)
    loss, correct, seen = total(accelerator, loss, correct, seen)
    if seen != len(split):
        raise RuntimeError(f"evaluation counted {seen:.0f} samples of {len(split)}: this is a bug of better-attention.")
    return {"accuracy": 100 * correct / seen, "loss": loss / seen}


def total(accelerator: Accelerator, *values: float) -> list[float]:
    """The sum of each value over the processes."""
    if accelerator.num_processes == 1:
        return list(values)
    # float64 keeps counts exact up to 2^53; float32 would lose single samples beyond 2^24.
    sums: Tensor = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    return [float(value) for value in sums.tolist()]
