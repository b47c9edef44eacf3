"""Keys and values that torch's layer adds behind the sequence: learned ones (``add_bias_kv``) and zeros.

The learned ones are sub-modules that are called, one tensor in and out, so that whatever acts on called modules (hooks,
offloading, sharding, gradients per sample) reaches their parameters too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from better_attention.call.call import band

from .calling import called
from .share import here

if TYPE_CHECKING:
    from .arguments import Inputs
    from .multihead import MultiheadAttention


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
        # Under autocast the sequence is in 16 bits while the parameter is not, and cat() would widen the whole.
        return torch.cat([x_BSD, here(self, self.weight).to(x_BSD.dtype).expand(x_BSD.shape[0], 1, -1)], dim=1)


def append(layer: MultiheadAttention, k_BSD: Tensor, v_BSD: Tensor, x: Inputs) -> tuple[Tensor, Tensor, Inputs]:
    """Keys and values that the layer adds behind the sequence: the learned ones, then those of zeros.

    Returns:
        Keys, values, and the inputs with masks that let every query see them.
    """
    added = (layer.extra_k is not None) + layer.add_zero_attn
    if not added:
        return k_BSD, v_BSD, x
    S = k_BSD.shape[1]
    # torch's order: the learned position first, then the zeros. Returned weights then have torch's columns.
    if layer.extra_k is not None and layer.extra_v is not None:
        k_BSD, v_BSD = called(layer.extra_k, k_BSD, "extra_k"), called(layer.extra_v, v_BSD, "extra_v")
    if layer.add_zero_attn:
        k_BSD, v_BSD = (F.pad(y, (0, 0, 0, 1)) for y in (k_BSD, v_BSD))
    mask_BNLS = x.mask_BNLS
    if x.causal:
        # Written out: the triangle of an implementation would hide the added keys, which stand behind the sequence.
        L, device = x.query_BLD.shape[1], x.query_BLD.device
        places = torch.arange(L, device=device) + x.offset
        mask_BNLS = _with_triangle(mask_BNLS, band(places, torch.arange(S, device=device), layer.window))
    padding_B11S = _widened(x.padding_B11S, added)
    return (
        k_BSD,
        v_BSD,
        x._replace(mask_BNLS=_widened(mask_BNLS, added), padding_B11S=padding_B11S, causal=False, offset=0),
    )


def _with_triangle(mask_BNLS: Tensor | None, triangle_LS: Tensor) -> Tensor:
    if mask_BNLS is None:
        return triangle_LS[None, None]
    if mask_BNLS.dtype == torch.bool:
        return mask_BNLS & triangle_LS
    # A float mask stays float, because its other entries are biases.
    return mask_BNLS.masked_fill(~triangle_LS, -math.inf)


def _widened(mask: Tensor | None, added: int) -> Tensor | None:
    """A mask with columns for the added keys, which it neither hides nor biases."""
    return None if mask is None else F.pad(mask, (0, added), value=True if mask.dtype == torch.bool else 0.0)
