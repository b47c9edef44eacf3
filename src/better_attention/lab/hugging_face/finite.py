"""A look at the logits of each step of ``generate``: of NaN no token can be chosen, though an argmax finds one."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LogitsProcessor

from better_attention.lab.models.language_checks import without_choice


class FiniteLogits(LogitsProcessor):
    """Refuses logits that are NaN or infinite: on the CPU at once, on other devices when :meth:`check` is called.

    There each look would have to wait for the device. Minus infinity is accepted: it excludes a token.
    """

    def __init__(self) -> None:
        self._worst: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B, V); in the place of those that are refused later, zeros, so that something can be drawn.

        Raises:
            ValueError: on the CPU, NaN or an infinite score.
        """
        largest_B1 = scores.amax(dim=-1, keepdim=True)  # NaN where any number is
        worst = largest_B1.amax()
        self._worst = worst if self._worst is None else torch.maximum(self._worst, worst)
        if scores.device.type == "cpu":
            self.check()
            return scores
        return scores.where(largest_B1 < math.inf, 0.0)

    def check(self) -> None:
        """Raise if any step was refused.

        Raises:
            ValueError: NaN or an infinite score.
        """
        if self._worst is None or (worst := float(self._worst)) < math.inf:
            return
        raise ValueError(without_choice(worst))
