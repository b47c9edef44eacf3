"""Checks of tensors and dtypes, and their order in memory. Apart from errors.py, which works without torch."""

from __future__ import annotations

import torch
from torch import Tensor

from better_attention.errors import describe

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that attention computes in."""


def floating_dtype(value: object, name: str) -> torch.dtype:
    """``value`` if it is one of the dtypes that attention computes in, or an error naming the argument.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, torch.dtype) or value not in FLOATING:
        raise TypeError(f"{name} must be torch.float64, float32, bfloat16 or float16, received {describe(value)}.")
    return value


def floating_tensor(value: object, name: str) -> Tensor:
    """``value`` if it is a real floating-point tensor, or an error naming the argument.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, Tensor):
        convert = f" Convert it with torch.as_tensor({name})." if hasattr(value, "__array__") else ""
        raise TypeError(f"{name} must be a floating-point tensor, received {describe(value)}.{convert}")
    if not value.is_floating_point() or value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, received {describe(value)}. "
            "Convert it, with .float() for example."
        )
    # A nested tensor may have a layout of its own as well, and gets the more helpful message below.
    if value.layout != torch.strided and not value.is_nested:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, received one of layout {layout}: pass {name}.to_dense().")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor: pad it (to_padded_tensor) and pass key_padding_mask instead.")
    return value


def contiguous_rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous, as the kernels read it; a copy only where it is not."""
    # With one element in a row its stride has no meaning.
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_heads(like: Tensor, width: int | None = None) -> Tensor:
    """A new (B, N, L, width), its heads side by side, as the layer wants them; None: the width of ``like``."""
    B, N, L, H = like.shape
    return like.new_empty(B, L, N, H if width is None else width).transpose(1, 2)
