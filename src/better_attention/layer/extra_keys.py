"""Learned parts of the layer that are neither a projection nor W_A: sub-modules that are called, one tensor in and out.

Whatever acts on called modules (hooks, offloading, sharding, gradients per sample) reaches their parameters too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ExtraPosition(nn.Module):
    """One learned position behind a sequence: torch's ``bias_k`` on keys, ``bias_v`` on values.

    Args:
        width: number of features.
        device, dtype: of the parameter, which is left undrawn: the layer draws in torch's order.
    """

    def __init__(self, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw the position as torch does (Glorot normal)."""
        nn.init.xavier_normal_(self.weight)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S + 1, D)."""
        return torch.cat([x_BSD, self.weight.to(x_BSD.dtype).expand(x_BSD.shape[0], 1, -1)], dim=1)


class LearnedScale(nn.Module):
    """A learned factor on the scores of each head, ``exp(log_scale)``; starts at 1/sqrt(head width).

    Args:
        num_heads, head_dim: number and width of the heads.
        device, dtype: of the parameter.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.log_scale = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to 1/sqrt(head width)."""
        nn.init.constant_(self.log_scale, -0.5 * math.log(self.head_dim))

    def forward(self, q_BNLH: Tensor) -> Tensor:
        """Scale the queries (B, N, L, H), head by head."""
        factor_N11 = self.log_scale.exp()[:, None, None]
        return q_BNLH * factor_N11.to(q_BNLH.dtype)
