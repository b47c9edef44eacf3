"""What is compared of a student and its teacher: the outputs of their attention layers, and of the whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from better_attention.errors import describe

OutputLoss = Callable[[Any, Any, Any], Tensor]
"""A scalar from what the student returns, what the teacher returns, and the batch."""


def run(model: nn.Module, batch: Any) -> Any:
    """The model on one batch: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules called ``names`` return while the block runs: for each, one tensor per call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen[name].append(_hidden(output))

    # torch's encoder computes past its layers in evaluation mode, unless it is told not to.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def hidden_losses(
    student: Mapping[str, list[Tensor]], teacher: Mapping[str, list[Tensor]], tokens_BL: Tensor | None
) -> Tensor:
    """For each layer the squared difference to the teacher's output, divided by the square of that: (layers,).

    Args:
        student, teacher: what the layers returned, see :func:`recorded`.
        tokens_BL: which positions count, or None for all; it is used for outputs (B, L, D) of the same B and L.
    """
    losses = []
    for name, wanted in teacher.items():
        pairs = list(zip(student[name], wanted, strict=True))
        if not pairs:
            raise ValueError(f"the layer {name} is not called in this batch: leave it out of the conversion.")
        losses.append(torch.stack([_relative(got, want.detach(), tokens_BL) for got, want in pairs]).mean())
    return torch.stack(losses)


def _relative(got: Tensor, want: Tensor, tokens_BL: Tensor | None) -> Tensor:
    if tokens_BL is not None and tokens_BL.shape == got.shape[:2]:
        got, want = got[tokens_BL], want[tokens_BL]
    return F.mse_loss(got, want) / want.square().mean().clamp_min(1e-12)


def tokens_of(batch: Any) -> Tensor | None:
    """Which positions of a batch are tokens: its ``attention_mask``, or None where it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def default_loss(temperature: float) -> OutputLoss:
    """Kullback-Leibler divergence of logits, where the models return some; else relative squared difference."""

    def loss(student: Any, teacher: Any, batch: Any) -> Tensor:
        if hasattr(teacher, "logits"):
            return logits_loss(student.logits, teacher.logits, tokens_of(batch), temperature)
        return _relative(output_tensor(student), output_tensor(teacher).detach(), tokens_of(batch))

    return loss


def logits_loss(student: Tensor, teacher: Tensor, tokens_BL: Tensor | None, temperature: float) -> Tensor:
    """Divergence of the student's probabilities from the teacher's at a temperature, times its square, per position.

    Source: arXiv 1503.02531, section 2.
    """
    if tokens_BL is not None and tokens_BL.shape == student.shape[:-1]:
        student, teacher = student[tokens_BL], teacher[tokens_BL]
    got, want = (x.flatten(0, -2) / temperature for x in (student, teacher.detach()))
    log_got, log_want = got.log_softmax(-1), want.log_softmax(-1)
    return F.kl_div(log_got, log_want, reduction="batchmean", log_target=True) * temperature**2


def output_tensor(output: Any) -> Tensor:
    """The tensor that a model returns: itself, ``last_hidden_state``, ``logits``, or the first of several.

    Raises:
        TypeError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("last_hidden_state", "logits"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"no tensor to compare in what the model returns, {describe(output)}: pass loss=...")
