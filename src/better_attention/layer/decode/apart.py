"""Tokens whose keys or values are not finite, kept apart from the queries that do not see them.

A hidden key has weight 0, but 0 * NaN is NaN. Where such a number is found in a result, the same kernel computes it
again with zeros in its place, which leaves the bits of all queries before the token as they are, and those that see it
become NaN. Shape suffixes as in stored.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from better_attention.call.call import band
from better_attention.call.torch_state import zero_rows


def bad_rows(x_BGSH: Tensor, scale_BSG: Tensor | None) -> Tensor:
    """Which of a cache's rows are not finite, (B, G, S); of codes the scales say so."""
    return ~x_BGSH.isfinite().all(dim=-1) if scale_BSG is None else ~scale_BSG.isfinite().transpose(1, 2)


def without(x_BGSH: Tensor, scale_BSG: Tensor | None, bad_BGS: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows and their scales with zeros for the marked ones, in new memory."""
    if scale_BSG is None:
        return zero_rows(x_BGSH, bad_BGS), None
    return x_BGSH, scale_BSG.masked_fill(bad_BGS.transpose(1, 2), 0.0)


def for_queries(bad: list[Tensor], num_heads: int) -> Tensor:
    """Which keys each query head finds bad, (B, N, S), from those of the heads of keys and of values."""
    found: Tensor = torch.stack([x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in bad]).any(dim=0)
    return found


def sees_new(bad_BNL: Tensor, window: int | None) -> Tensor:
    """Which of the new tokens see a bad one among themselves, (B, N, L)."""
    places = torch.arange(bad_BNL.shape[2], device=bad_BNL.device)
    seen: Tensor = (bad_BNL[:, :, None] & band(places, places, window)).any(dim=-1)
    return seen
