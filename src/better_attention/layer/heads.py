"""Heads apart, turned by their positions, and joined. Shape suffixes as in arguments.py; P pairs of features, H/2."""

from __future__ import annotations

import torch
from torch import Tensor

from better_attention.call.call import compute_dtype
from better_attention.errors import check_float
from better_attention.positions import BASE, check_even_width, rotary_angles, rotate


def split(x_BLD: Tensor, num_heads: int, head_dim: int, name: str) -> Tensor:
    """Head i has columns i*H ... (i+1)*H: (B, L, D) -> (B, N, L, H), a view.

    Raises:
        ValueError: the projection called ``name`` returned another width, as in tensor-parallel training.
    """
    B, L, width = x_BLD.shape
    if width != num_heads * head_dim:
        raise ValueError(
            f"{name} returned width {width}, but {num_heads} heads of width {head_dim} need {num_heads * head_dim}. "
            "If its columns are divided among processes, set num_heads to the heads of one process "
            f"({num_heads} divided by their number); every projection has to be divided."
        )
    # Splitting the last dimension is a view in any memory layout, so that no layout of the inputs costs a copy.
    return x_BLD.view(B, L, num_heads, head_dim).transpose(1, 2)


def join(heads_BNLH: Tensor, batch_first: bool) -> Tensor:
    """Heads side by side, in the caller's order of dimensions, so that the output is contiguous there."""
    heads_BLNH = heads_BNLH.transpose(1, 2)
    return (heads_BLNH if batch_first else heads_BLNH.transpose(0, 1)).flatten(-2)


def check_rotary(rotary: bool | float | None, head_dim: int) -> float | None:
    """The base of rotary positions, or None without them.

    Raises:
        ValueError, TypeError: an odd head width, or a base that is no number of at least 1.
    """
    if rotary is None or rotary is False:
        return None
    check_even_width(head_dim)
    return BASE if rotary is True else check_float(rotary, "rotary", low=1.0)


def rotated(x_BLD: Tensor, num_heads: int, base: float | None, first: int = 0) -> Tensor:
    """Every head's pairs of features rotated by the position, from ``first`` on; as they are where ``base`` is None."""
    if base is None:
        return x_BLD
    B, L, D = x_BLD.shape
    # Before the heads are split off: the angles are the same for each head and broadcast over them.
    positions_L = torch.arange(L, device=x_BLD.device) + first
    cos_LP, sin_LP = rotary_angles(positions_L, D // num_heads, base=base, dtype=compute_dtype(x_BLD.dtype))
    heads_BLNH = x_BLD.view(B, L, num_heads, D // num_heads)
    return rotate(heads_BLNH, cos_LP[:, None], sin_LP[:, None]).flatten(2)
