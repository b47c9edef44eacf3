r"""W_A by least squares: the normal equations are solved by conjugate gradients, without ever being written down.

With weights :math:`A_i`, values :math:`V_i` and the part :math:`W_O^i` of the output map, the output changes by

.. math:: \sum_i A_i (\Delta V_i + \delta \mathbf{1}^\top) W_O^i

when W_A changes by :math:`\Delta` and its bias by :math:`\delta`. This is linear in both, but a matrix for it would
have :math:`(l^2 + l)^2` entries. One product with it costs as much as the mixing of values, batch after batch.
Products are computed in the dtype of the batches, sums in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SOLVE = torch.float64
RIDGE = 1e-3
"""Strength of the pull towards the start, as a share of the mean curvature."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """One batch: weights (B, N, L, S), values before W_A (B, N, S, H), and what the output lacks (rows of B L, D)."""

    weights_BNLS: Tensor
    values_BNSH: Tensor
    missing_RD: Tensor
    rows_BL: Tensor


@dataclass(slots=True)
class KernelFit:
    """The least squares problem of one layer's W_A, shared by all heads.

    Args:
        batches: what the new layer does on the calibration inputs, in float32 or float64.
        output: W_O in torch's orientation (D, N H).
        max_len: size of W_A.
        causal: whether it stays lower triangular.
        bias: whether it has a bias.
        steps: at most that many steps of conjugate gradients.
        enough: they end when the residual of the normal equations is this share of the first.
    """

    batches: list[Mixing]
    output: Tensor
    max_len: int
    causal: bool
    bias: bool
    steps: int = 15
    enough: float = 1e-3

    def solve(self) -> tuple[Tensor, Tensor]:
        """The changes of W_A (l, l) and of its bias (l,)."""
        wanted, curvature = self._gradient()
        pull = RIDGE * curvature.clamp_min(1e-30)
        x = torch.zeros_like(wanted)
        residual, direction = wanted.clone(), wanted.clone()
        size = first = float(residual.square().sum())
        for _ in range(self.steps):
            if size <= first * self.enough**2:
                break
            product = self._product(direction) + pull * direction
            step = size / float((direction * product).sum())
            x += step * direction
            residual -= step * product
            size, before = float(residual.square().sum()), size
            direction = residual + size / before * direction
        return x[:-1], x[-1]

    def _gradient(self) -> tuple[Tensor, Tensor]:
        """The right-hand side, and the mean curvature of an entry."""
        total = torch.zeros(self.max_len + 1, self.max_len, dtype=SOLVE, device=self.output.device)
        count = 0.0
        for batch in self.batches:
            wide = self.output.to(batch.values_BNSH.dtype)
            missing_BLM = wide.new_zeros(*batch.rows_BL.shape, wide.shape[1])
            missing_BLM[batch.rows_BL] = batch.missing_RD @ wide
            self._add(total, batch, missing_BLM)
            count += float(batch.values_BNSH.square().sum())
        # An entry's curvature is about the square of its values, through W_O, times the weight that it gets.
        curvature = count * self.output.to(SOLVE).square().mean() / self.max_len
        return self._kept(total), curvature

    def _product(self, x: Tensor) -> Tensor:
        """The normal matrix times x, W_A's change with that of its bias as a last row."""
        total = torch.zeros_like(x)
        gram = self.output.to(SOLVE).mT @ self.output.to(SOLVE)
        for batch in self.batches:
            values, S = batch.values_BNSH, batch.values_BNSH.shape[2]
            change = x.to(values.dtype)
            mixed_BNLH = batch.weights_BNLS @ (change[:S, :S] @ values + change[-1, :S, None])
            joined_BLM = mixed_BNLH.transpose(1, 2).flatten(2) * batch.rows_BL[..., None]
            self._add(total, batch, joined_BLM @ gram.to(values.dtype))
        return self._kept(total)

    def _add(self, total: Tensor, batch: Mixing, slope_BLM: Tensor) -> None:
        B, N, S, H = batch.values_BNSH.shape
        slope_BNLH = slope_BLM.view(B, -1, N, H).transpose(1, 2)
        back_BNSH = batch.weights_BNLS.mT @ slope_BNLH
        flat = (x.permute(2, 0, 1, 3).reshape(S, -1) for x in (back_BNSH, batch.values_BNSH))
        total[:S, :S] += next(flat) @ next(flat).mT
        total[-1, :S] += back_BNSH.sum(dim=(0, 1, 3))

    def _kept(self, x: Tensor) -> Tensor:
        """Without what must stay zero."""
        square = x[:-1].tril() if self.causal else x[:-1]
        return torch.cat([square, x[-1:] if self.bias else torch.zeros_like(x[-1:])])
