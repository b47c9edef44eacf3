"""A cache of one byte a number: keys and values rounded to 255 steps, with a scale for each token and head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .rows import Rows

STEPS = 127
"""The largest code; the smallest is its negative, so that zero is a code and both signs are alike."""


def row_bytes(width: int, num_heads: int) -> int:
    """Bytes of a row of ``width`` numbers: a byte each, and a float32 for each head."""
    return width + num_heads * torch.float32.itemsize


def quantised(x_BSD: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Codes (B, S, D), int8, and scales (B, S, N), float32: head n's numbers are its codes times its scale.

    The largest number of a head becomes 127 or -127, so that no number errs by more than half its scale.
    """
    heads_BSNH = x_BSD.unflatten(2, (num_heads, -1)).float()
    scale_BSN = heads_BSNH.abs().amax(dim=-1) / STEPS
    # A head of zeros has scale 0, and its codes are zero as well.
    codes = (heads_BSNH / scale_BSN.masked_fill(scale_BSN == 0.0, 1.0)[..., None]).round()
    return codes.to(torch.int8).flatten(2), scale_BSN


def dequantised(codes_BSD: Tensor, scale_BSN: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers (B, S, D) that codes and scales stand for."""
    heads_BSNH: Tensor = codes_BSD.unflatten(2, (scale_BSN.shape[2], -1)) * scale_BSN[..., None]
    return heads_BSNH.flatten(2).to(dtype)


class Int8Rows(Rows):
    """:class:`.rows.Rows` in codes and scales, each stream in two tensors.

    Args:
        limit, window, extra: as for :class:`.rows.Rows`.
        heads: of each stream the number of heads, whose numbers share a scale.
    """

    def __init__(self, limit: int | None, window: int | None, extra: int, heads: Mapping[str, int]) -> None:
        super().__init__(limit, window, extra)
        self.heads, self.dtype = heads, torch.float32

    def write(self, name: str, new: Tensor) -> None:
        """``new`` in codes behind the rows in use."""
        if new.dtype == torch.bool:
            super().write(name, new)
            return
        self.dtype = new.dtype
        codes, scale = quantised(new, self.heads[name])
        super().write(name, codes)
        super().write(scale_name(name), scale)

    def names(self, streams: tuple[str, ...]) -> tuple[str, ...]:
        """The rows that hold those streams: their codes, and behind them their scales."""
        return streams + tuple(map(scale_name, streams))

    def holds(self, widths: Mapping[str, int], dtype: torch.dtype) -> bool:
        """Whether there are codes of all these streams, in rows of their widths, of numbers of that type."""
        tensors = self.tensors
        return self.dtype == dtype and all(n in tensors and tensors[n].shape[2] == width for n, width in widths.items())

    def stored(self, name: str, ahead: int = 0) -> tuple[Tensor, Tensor]:
        """Codes (B, S, D) and scales (B, S, N) of the rows in use, and of ``ahead`` more behind them; views."""
        return self.used(name, ahead), self.used(scale_name(name), ahead)

    def read(self, name: str, ahead: int = 0) -> Tensor:
        """The numbers of a stream, in the dtype in which the newest came."""
        return dequantised(*self.stored(name, ahead), self.dtype)


def scale_name(name: str) -> str:
    """The rows that hold the scales of the stream called ``name``."""
    return f"{name} scale"
