"""Every form a mask comes in, to one internal form: bool, True = attend, or float added in log-weight space."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import describe
from .values import readable


def check_mask(mask: object, name: str, *, one_means: str, device: torch.device) -> Tensor:
    """A bool or additive float mask, or an error.

    Args:
        mask: what the user passed.
        name: the argument's name, for the message.
        one_means: what True means in this argument ("attend" or "hide"), for the message.
        device: where the inputs are.

    Raises:
        TypeError: neither bool nor floating point.
        ValueError: on another device; or a float mask of zeros and ones, which as an additive mask hides nothing
            (looked at in eager mode only).
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a bool or float tensor, received {describe(mask)}.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name} must be bool (True = {one_means}) or float (added to the log weights), received {describe(mask)}. "
            "Integers could mean either: convert with mask.bool(), or mask.logical_not() for the opposite meaning."
        )
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, the inputs are on {device}. Move it with .to({str(device)!r}).")
    if mask.is_floating_point() and _zeros_and_ones(mask):
        raise ValueError(
            f"{name} is {describe(mask)} that holds only 0 and 1. A float mask is added to the log weights, where 1 "
            f"hides nothing. Pass mask.bool() (True = {one_means}), or use -inf where a key is to be hidden."
        )
    return mask


def _zeros_and_ones(mask: Tensor) -> bool:
    if mask.numel() == 0 or not readable():
        return False
    try:
        low, high = torch.aminmax(mask.detach())
        if not (high == 1.0 and (low == 0.0 or low == 1.0)):
            return False
        return bool(((mask == 0.0) | (mask == 1.0)).all())
    except RuntimeError:  # no values to look at: meta and fake tensors, vmap
        return False


NEARLY_HIDDEN = -1e3
"""Biases at or below this are what people write instead of -inf (-1e4, -1e9, finfo.min). They hide from W_A too."""


def hides_the_future(mask_BNLS: Tensor) -> bool:
    """Whether a mask lets no query see a later key (eager mode only; False where values cannot be read).

    A small mask can hide its few later keys by chance, so one below 5 x 5 counts only if it is the triangle
    itself, apart from keys hidden from every query.
    """
    L, S = mask_BNLS.shape[-2:]
    if L < 2 or S < 2 or not readable():
        return False
    try:
        keep = mask_BNLS if mask_BNLS.dtype == torch.bool else mask_BNLS > NEARLY_HIDDEN
        lower = torch.ones(L, S, dtype=torch.bool, device=keep.device).tril()
        if bool((keep & ~lower).any()):
            return False
        seen = keep.any(dim=-2, keepdim=True)
        if not bool(seen[..., 1:].any()):
            return False  # nothing but the first key is visible at all: padding, not a triangle
        return min(L, S) >= 5 or bool((keep == (lower & seen)).all())
    except RuntimeError:
        return False
