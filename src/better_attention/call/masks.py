"""Every form a mask comes in, to one internal form: bool, True = attend, or float added in log-weight space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from better_attention.errors import describe
from better_attention.tensors import FLOATING

from .torch_private import transformed
from .torch_state import values_available


def check_mask(mask: object, name: str, *, one_means: str, device: torch.device) -> Tensor:
    """A bool or additive float mask, or an error.

    Args:
        mask: what the user passed.
        name: the argument's name, for the message.
        one_means: what True means in this argument ("attend" or "hide"), for the message.
        device: where the inputs are.

    Raises:
        TypeError: neither bool nor floating point, or not a dense tensor.
        ValueError: on another device; or a float mask of zeros and ones that requires no gradient, which as an
            additive mask hides nothing (looked at on the CPU in eager mode only).
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a bool or float tensor, received {describe(mask)}.")
    # Before the layout: the older kind of nested tensor has the layout torch.strided and would pass that check.
    if mask.is_nested:
        raise TypeError(f"{name} is a nested tensor: pad it with torch.nested.to_padded_tensor(mask, padding).")
    if mask.layout != torch.strided:
        layout = str(mask.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, received one of layout {layout}: pass mask.to_dense().")
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        other = (
            "Convert it with .float()." if mask.is_floating_point() else "Pass mask.real." if mask.is_complex() else ""
        )
        raise TypeError(
            f"{name} must be bool (True = {one_means}) or float (added to the log weights), received {describe(mask)}. "
            f"{other or _conversions(one_means)}"
        )
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, the inputs are on {device}. Move it with .to({str(device)!r}).")
    # What asks for a gradient is a learned bias, whatever it holds at the start.
    if mask.is_floating_point() and not mask.requires_grad and _zeros_and_ones(mask):
        raise ValueError(
            f"{name} is {describe(mask)} that holds only 0 and 1. A float mask is added to the log weights, where 1 "
            f"hides nothing. {_conversions(one_means)} If it is a bias, pass mask - 1.0: the same number added to "
            "every key changes no weight (the keys of add_bias_kv and add_zero_attn have bias 0; with those, pass "
            "mask.requires_grad_())."
        )
    return mask


def _conversions(one_means: str) -> str:
    """How to write a mask of zeros and ones as bool, for either meaning of its ones."""
    if one_means == "attend":
        return "If 1 means attend, pass mask.bool(); if 1 means hide, mask == 0 (True = attend)."
    return (
        "If 1 means hide, pass mask.bool(); if 1 means attend, as in torch.ones(L, S).tril(), mask == 0 (True = hide)."
    )


def without_repeats(mask: Tensor) -> Tensor:
    """An expanded mask with size 1 where it repeats itself (the keys aside), so that nothing copies the repeats.

    Each repeat of a mask that requires a gradient is an element of its own; those stay.
    """
    if mask.requires_grad or transformed():
        return mask
    for dim in range(mask.dim() - 1):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _zeros_and_ones(mask: Tensor) -> bool:
    # Reading a value would stall the queue of an accelerator.
    if mask.numel() == 0 or mask.device.type != "cpu" or not values_available():
        return False
    try:
        mask = without_repeats(mask)
        low, high = torch.aminmax(mask.detach())
        # A mask of zeros alone is harmless, so there has to be a 1. Most masks end here, after a single pass.
        if not (high == 1.0 and (low == 0.0 or low == 1.0)):
            return False
        # The extremes 0 and 1 alone could belong to a bias with values in between.
        return bool(((mask == 0.0) | (mask == 1.0)).all())
    except RuntimeError:  # no values to look at: meta and fake tensors, vmap
        return False


def together(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask from a mask (bool: True = attend) and an additive bias."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


NEARLY_HIDDEN = -1e3
"""Biases at or below this are what people write instead of -inf (-1e4, -1e9, finfo.min). They hide from W_A too."""


def hides_the_future(mask_BNLS: Tensor) -> bool:
    """Whether a mask lets no query see a later key; False where its values cannot be read.

    Values can be read in eager mode, and by torch.jit.trace: what it traces with, its result is made for.
    """
    # There are no values yet: refuse_leak() in layer/alignment.py makes the question a part of the compiled program.
    if torch.compiler.is_compiling():
        return False
    try:
        conditions = triangle_conditions(mask_BNLS)
        return bool(conditions) and all(bool(condition()) for condition in conditions)
    except RuntimeError:  # no values to look at: meta and fake tensors, vmap
        return False


def triangle_conditions(mask_BNLS: Tensor) -> list[Callable[[], Tensor]]:
    """What all has to be true of a mask that lets no query see a later key, each answered by a bool tensor ().

    Most masks fail the first, and then nothing else has to be computed. The list is empty for sizes that allow no
    statement. A small mask can hide its few later keys by chance, so one below 5 x 5 counts only if it is the triangle
    itself, apart from keys hidden from every query. A mask that shows nothing but the first key is padding.
    """
    L, S = mask_BNLS.shape[-2:]
    if L < 2 or S < 2:
        return []
    keep = mask_BNLS if mask_BNLS.dtype == torch.bool else mask_BNLS > NEARLY_HIDDEN
    conditions = [lambda: ~keep.triu(1).any(), lambda: keep[..., 1:].any()]
    if min(L, S) < 5:
        conditions.append(lambda: (keep == keep.any(dim=-2, keepdim=True).expand_as(keep).tril()).all())
    return conditions
