r"""Least squares on calibration inputs, from sums that are gathered one batch after another in float64.

**W_Q without W_K.** The old scores of head i are :math:`q_l \cdot k_s` with :math:`k_s = y_s W_K^i + b_K^i`, the new
ones :math:`q'_l \cdot y_s S_i` with the slice in the place of the key. Scores count up to a constant for each query,
and where the weights :math:`a_{ls}` lie: to second order, the Kullback-Leibler divergence of the weights is half the
variance of the difference of the scores under :math:`a_l`. With :math:`q' = q B`, B of size H x H,

.. math:: \min_B \sum_l q_l \, \mathrm{Cov}_{a_l}(k - B \, S^\top y) \, q_l^\top
          \quad\Rightarrow\quad B = C_{ks} C_{ss}^{-1}

where :math:`C_{ks}` and :math:`C_{ss}` are the covariances of old key and slice, and of the slice, under the weights,
summed over queries as if :math:`q_l` did not depend on them, so that each head needs one H x H system.

**W_O.** The new layer's mixed values, with a column of ones, against the old layer's output: ordinary least squares.

Both are ridge regressions towards the projection of the weights alone, so that directions which the calibration inputs
do not show stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from better_attention.positions import rotate

from .report import HeadFit

# Sums of squares lose half of the digits, so that float32 would leave three or four for the solution.
SOLVE = torch.float64
RIDGE = 1e-4
"""Strength of the pull towards the start, as a share of the mean variance."""


@dataclass(slots=True)
class KeyRegression:
    """Old keys on the slices that take their place, for each head.

    Args:
        towards_NHH: B of the projection of the weights alone, transposed blocks of W_K.
    """

    towards_NHH: Tensor
    across_NHH: Tensor = field(init=False)
    within_NHH: Tensor = field(init=False)
    old_NHH: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.across_NHH, self.within_NHH, self.old_NHH = (torch.zeros_like(self.towards_NHH) for _ in range(3))

    def add(self, old_BNSH: Tensor, new_BNSH: Tensor, weights_BNLS: Tensor) -> None:
        """Add the keys of one batch: old, and new (the slices), under the old weights."""
        old, new, weights = (x.to(SOLVE) for x in (old_BNSH, new_BNSH, weights_BNLS))
        # Keys are counted by all weight that they receive, so that no (B, N, L, S, H) tensor is ever made.
        count_BNS1 = weights.sum(dim=2)[..., None]
        means = (weights @ old, weights @ new)
        self.across_NHH += _covariance(old, new, count_BNS1, *means)
        self.within_NHH += _covariance(new, new, count_BNS1, means[1], means[1])
        self.old_NHH += _covariance(old, old, count_BNS1, means[0], means[0])

    def add_turned(
        self, old_BNSH: Tensor, new_BNSH: Tensor, weights_BNLS: Tensor, cos_BSP: Tensor, sin_BSP: Tensor
    ) -> None:
        """The same in self-attention with rotary positions: each query sees the keys turned by their distance to it."""
        # One query at a time: each sees the keys turned differently, and all at once would need L times the memory.
        for query in range(weights_BNLS.shape[2]):
            cos_l, sin_l = cos_BSP[:, query : query + 1], sin_BSP[:, query : query + 1]
            # Cosine and sine of the difference of two angles, by the addition theorems.
            cos = (cos_BSP * cos_l + sin_BSP * sin_l)[:, None]
            sin = (sin_BSP * cos_l - cos_BSP * sin_l)[:, None]
            old, new = rotate(old_BNSH, cos, sin), rotate(new_BNSH, cos, sin)
            self.add(old, new, weights_BNLS[:, :, query : query + 1])

    def solve(self) -> Tensor:
        """B for each head, (N, H, H): the new query is ``q @ B``."""
        eye = torch.eye(self.within_NHH.shape[-1], dtype=SOLVE, device=self.within_NHH.device)
        # Relative to the variance, so that the strength does not depend on the units of the inputs.
        pull = RIDGE * self.within_NHH.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None].clamp_min(1e-30)
        wanted = self.across_NHH + pull * self.towards_NHH
        # B C_ss = C_ks is solved transposed, because solve() takes the unknown on the right; C_ss is symmetric.
        solution: Tensor = torch.linalg.solve(self.within_NHH + pull * eye, wanted.mT)
        return solution.mT

    def fits(self, B_NHH: Tensor, product_rank: list[int]) -> list[HeadFit]:
        """For each head the rank of its old product, and the share of the keys' variance that is not reproduced."""
        # The variance of k - B s, expanded into the three sums that were gathered.
        missed = self.old_NHH - B_NHH @ self.across_NHH.mT - self.across_NHH @ B_NHH.mT
        missed = missed + B_NHH @ self.within_NHH @ B_NHH.mT
        share = missed.diagonal(dim1=-2, dim2=-1).sum(-1) / self.old_NHH.diagonal(dim1=-2, dim2=-1).sum(-1)
        # A head whose keys do not vary is 0 / 0; rounding can leave the range from 0 to 1.
        shares = share.nan_to_num(0.0).clamp(0.0, 1.0).tolist()
        return [HeadFit(rank, residual) for rank, residual in zip(product_rank, shares, strict=True)]


def _covariance(a: Tensor, b: Tensor, count_BNS1: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
    """Sum over queries of the covariance of a and b under that query's weights, (N, H, H)."""
    # E[a b] - E[a] E[b]. The difference cancels digits, one reason more for float64.
    return ((a * count_BNS1).mT @ b - mean_a.mT @ mean_b).sum(dim=0)


@dataclass(slots=True)
class OutputRegression:
    """The old layer's output on the new layer's mixed values.

    Args:
        towards: W_O of the projection of the weights alone, (D, M), in torch's orientation.
        bias: whether there is a bias.
    """

    towards: Tensor
    bias: bool
    gram: Tensor = field(init=False)
    moment: Tensor = field(init=False)
    total: float = 0.0
    rows: int = 0

    def __post_init__(self) -> None:
        D, M = self.towards.shape
        self.gram = self.towards.new_zeros(M + 1, M + 1, dtype=SOLVE)
        self.moment = self.towards.new_zeros(M + 1, D, dtype=SOLVE)

    def add(self, mixed_RM: Tensor, output_RD: Tensor) -> None:
        """Add rows: mixed values of the new layer, outputs of the old one."""
        mixed, output = mixed_RM.to(SOLVE), output_RD.to(SOLVE)
        # The column of ones makes the bias one more weight; without a bias zeros keep the shapes the same.
        rows = torch.cat([mixed, mixed.new_full((len(mixed), 1), 1.0 if self.bias else 0.0)], dim=1)
        self.gram += rows.mT @ rows
        self.moment += rows.mT @ output
        self.total += float(output.square().sum())
        self.rows += len(rows)

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """Weight (D, M) and bias (D,)."""
        M = self.gram.shape[0] - 1
        pull = RIDGE * self.gram.diagonal()[:M].mean().clamp_min(1e-30)
        # The bias is not pulled. Without one, 1 keeps its row of zeros from making the system singular.
        penalty = torch.diag(torch.cat([pull.expand(M), pull.new_tensor([0.0 if self.bias else 1.0])]))
        start = torch.cat([self.towards.to(SOLVE).mT, self.moment.new_zeros(1, self.moment.shape[1])])
        solution = torch.linalg.solve(self.gram + penalty, self.moment + penalty @ start)
        return solution[:M].mT, solution[M] if self.bias else None

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Norm of what this map misses of the outputs, divided by their norm; from the sums alone."""
        end = self.moment.new_zeros(self.moment.shape[1]) if bias is None else bias.to(SOLVE)
        map_MD = torch.cat([weight.to(SOLVE).mT, end[None]])
        # |y - x W|^2 is |y|^2 - 2 <W, x'y> + <W, x'x W>, so that the rows need not be kept.
        missed = self.total - 2 * float((map_MD * self.moment).sum()) + float((map_MD * (self.gram @ map_MD)).sum())
        # Rounding can make a perfect fit negative.
        return (max(missed, 0.0) / self.total) ** 0.5 if self.total else 0.0


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Norm of a difference divided by the norm of what is right, over batches."""
    pairs = [(g.to(SOLVE), w.to(SOLVE)) for g, w in zip(got, want, strict=True)]
    total = sum(float(w.square().sum()) for _, w in pairs)
    difference = sum(float((g - w).square().sum()) for g, w in pairs)
    return (difference / total) ** 0.5 if total else 0.0
