"""The factor on q.k: fixed, or learned for each head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from better_attention.errors import check_float

from .calling import called
from .share import here


def check_scale(scale: float | str | None) -> float | str | None:
    """``scale`` if it is None, a number or "learned".

    Raises:
        ValueError, TypeError: anything else.
    """
    if scale is None or (isinstance(scale, str) and scale == "learned"):
        return scale
    if isinstance(scale, str):
        raise ValueError(f"scale must be None, a number or 'learned', received {scale!r}.")
    return check_float(scale, "scale")


def fixed_scale(scale: float | str | None, head_dim: int) -> float:
    """The part of the factor that is no parameter: a learned scale is on the queries already."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return 1.0 if isinstance(scale, str) else scale


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
        # A logarithm, because no step of an optimiser can then make the factor zero or negative.
        self.log_scale = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to 1/sqrt(head width)."""
        # log(1 / sqrt(H)) = -log(H) / 2: a learned scale starts at the usual one.
        nn.init.constant_(self.log_scale, -0.5 * math.log(self.head_dim))

    def forward(self, q_BNLH: Tensor) -> Tensor:
        """Scale the queries (B, N, L, H), head by head."""
        # The exponential in the parameter's dtype, and only the factor in the (perhaps narrower) one of the queries.
        factor_N11 = here(self, self.log_scale).exp()[:, None, None]
        return q_BNLH * factor_N11.to(q_BNLH.dtype)


def scaled(scaling: LearnedScale | None, q_BNLH: Tensor) -> Tensor:
    """Queries times the learned scale, if there is one."""
    return q_BNLH if scaling is None else called(scaling, q_BNLH, "scaling")
