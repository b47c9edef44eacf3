"""The softmax score, exp(z) / sum exp(z). Source: arXiv 2403.01643, equations 3-4."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .score import Score, Slices


def weights(q_BNLH: Tensor, k_BNSH: Tensor, bias: Tensor | None, hide: Tensor | None) -> Tensor:
    """exp(z + bias) / sum over keys; a row with every key hidden is zero, where torch.softmax gives NaN."""
    z_BNLS = q_BNLH @ k_BNSH.transpose(-1, -2)  # Q W_Q (K W_K)^T / sqrt(d_k): 2403.01643 eq. 3
    if bias is not None:
        z_BNLS = z_BNLS + bias
    if hide is None:
        return torch.softmax(z_BNLS, dim=-1)
    z_BNLS = z_BNLS.masked_fill(hide, -math.inf)
    # Read off z, not off the mask: z has the broadcast shape, and sums of finite biases can reach -inf too.
    nothing = (z_BNLS == -math.inf).all(dim=-1, keepdim=True)
    # Zeros before and after: before, so that the derivative is not NaN; after, so that the row has no weight.
    return torch.softmax(z_BNLS.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)


class Tiles:
    """See :class:`.score.Tiles`. A tile holds whole rows, so torch normalises it at once."""

    def __init__(self, q_BNLH: Tensor, k_BNSH: Tensor) -> None:
        self.q, self.k = q_BNLH, k_BNSH

    def weights(self, rows: Slices, keys: Slices, bias: Tensor | None, hide: Tensor | None) -> tuple[Tensor, None]:
        """Normalised weights; 0 in a row with every key hidden."""
        z = self.q[rows] @ self.k[keys].transpose(-1, -2)
        if bias is not None:
            z += bias
        if hide is None:
            return torch.softmax(z, dim=-1), None
        z.masked_fill_(hide, -math.inf)
        nothing = z.amax(dim=-1, keepdim=True) == -math.inf  # sums of finite biases can reach it too
        # There is no derivative of torch's here, so NaN in such a row may be overwritten afterwards.
        return torch.softmax(z, dim=-1).masked_fill_(nothing, 0.0), None

    def slopes(self, rows: Slices, keys: Slices, bias: Tensor | None, hide: Tensor | None) -> tuple[Tensor, Tensor]:
        """The exponential is its own derivative: weights and slope are one tensor."""
        w, _ = self.weights(rows, keys, bias, hide)
        return w, w

    def gradients(self, dq_BNLH: Tensor, dk_BNSH: Tensor) -> tuple[Tensor, Tensor]:
        """As they are: nothing was measured in other units."""
        return dq_BNLH, dk_BNSH


SOFTMAX = Score(
    name="softmax",
    label="Softmax",
    equations=("S_i = softmax({z})",),
    source="arXiv 2403.01643",
    lowest_hides=False,
    weights=weights,
    tiles=Tiles,
)
