"""A small layer's self-attention in inference as one call of the compiled kernels.

There the way between operators costs more than the arithmetic. Which layers can go that way is the module's question;
here are only the sizes and the call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from better_attention.call.torch_state import address
from better_attention.native import structs
from better_attention.native.library import call as call_library
from better_attention.native.library import current_instruction_set, missing, rows

WIDTH, LENGTH = 128, 128
"""Largest model width and length at which one call measures faster than separate operators."""


def serves(x_BLD: Tensor, score: str) -> bool:
    """Whether one call can compute inputs of this kind and size, with this score, and is faster."""
    return (
        score in structs.SCORES
        and x_BLD.shape[1] <= LENGTH
        and x_BLD.shape[2] <= WIDTH
        and x_BLD.dtype == torch.float32
        and x_BLD.device.type == "cpu"
        and missing() is None
    )


def self_attention(
    x_BLD: Tensor,
    heads: int,
    projections: tuple[nn.Module, ...],
    alignment: tuple[Tensor, Tensor | None] | None,
    score: str,
    causal: bool,
    scale: float,
) -> Tensor:
    """Output (B, L, D), contiguous, of self-attention on ``x_BLD``.

    Args:
        x_BLD: (B, L, D), float32, on the CPU.
        heads: number of heads.
        projections: those of query, key, value and output: linear maps (D, D), or identities.
        alignment: W_A (L, L) and its bias, of L elements, or None.
        score, causal, scale: as for an attention call.
    """
    x_BLD = rows(x_BLD)
    B, L, D = x_BLD.shape
    out_BLD = x_BLD.new_empty(B, L, D)
    if out_BLD.numel() == 0:
        return out_BLD
    kept: list[Tensor] = []  # their memory has to live until the call is over
    addresses: list[int] = []
    for projection in projections:
        for parameter in (projection.weight, projection.bias) if isinstance(projection, nn.Linear) else (None, None):
            if parameter is not None:
                kept.append(parameter.contiguous())
            addresses.append(0 if parameter is None else address(kept[-1]))
    weight, bias = (None, None) if alignment is None else (rows(alignment[0]), alignment[1])
    bias = None if bias is None else bias.contiguous()
    c = structs.Layer()
    c.isa, c.threads = current_instruction_set(), torch.get_num_threads()
    c.score, c.causal, c.scale = structs.SCORES[score], causal, scale
    c.B, c.N, c.L, c.D = B, heads, L, D
    c.x, (c.x_b, c.x_l, _) = address(x_BLD), x_BLD.stride()
    c.wq, c.bq, c.wk, c.bk, c.wv, c.bv, c.wo, c.bo = addresses
    if weight is not None:
        c.wa, c.wa_i = address(weight), weight.stride(0)
    if bias is not None:
        c.ba = address(bias)
    c.out = out_BLD.data_ptr()
    call_library("ba_layer_forward", c)
    return out_BLD
