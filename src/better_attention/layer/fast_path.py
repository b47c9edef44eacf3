"""A small layer's self-attention in inference as one call of the compiled kernels.

At these sizes, calling separate operators takes longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from better_attention.call.torch_private import is_bare, is_unpatched, own_parameters
from better_attention.call.torch_state import address, are_plain, autocast_dtype, quiet
from better_attention.native import structs
from better_attention.native.library import call as call_library
from better_attention.native.library import current_instruction_set, missing
from better_attention.tensors import contiguous_rows

from .alignment import Alignment
from .arguments import Inputs
from .scale import fixed_scale

if TYPE_CHECKING:
    from .multihead import MultiheadAttention

WIDTH, LENGTH = 128, 128
"""Largest model width and length at which one call measures faster than separate operators."""


def attend(layer: MultiheadAttention, x: Inputs) -> Tensor | None:
    """The layer's output (B, L, D), or None where it has to be computed step by step."""
    # Under the triangle a past row keeps its bits whatever the future holds, NaN included: one way for both.
    if not x.is_self or x.need_weights or x.mask_BNLS is not None or x.padding_B11S is not None or x.causal:
        return None
    x_BLD = x.query_BLD
    # The one call records no graph, and nothing that traces or counts operators would see it.
    if torch.is_grad_enabled() or not quiet() or not _is_small(x_BLD) or not is_simple(layer):
        return None
    if layer.rotary is not None or layer.alibi is not None or layer.kv_group > 1:
        return None
    align = layer.align
    parts = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj, align)
    if (parameters := ordinary_parameters(parts, (layer.embed_dim,) * len(parts), layer.embed_dim)) is None:
        return None
    if not are_plain(x_BLD, *(p for named in parameters for p in named.values())):
        return None
    alignment = None
    if isinstance(align, Alignment):
        if not align.is_plain(x_BLD.shape[1]):
            return None
        alignment = align.sliced_to(x_BLD.shape[1])
    maps = [(named.get("weight"), named.get("bias")) for named in parameters[:4]]
    scale = fixed_scale(layer.scale, layer.head_dim)
    return _self_attention(x_BLD, layer.num_heads, maps, alignment, layer.mechanism.score, scale)


def _is_small(x_BLD: Tensor) -> bool:
    """Whether inputs of this kind and size are faster in one call."""
    return (
        x_BLD.shape[1] <= LENGTH
        and x_BLD.shape[2] <= WIDTH
        and x_BLD.dtype == torch.float32
        and x_BLD.device.type == "cpu"
        and missing() is None
    )


def is_simple(layer: MultiheadAttention) -> bool:
    """Whether the layer has nothing that whole-layer calls do not compute; positions and W_A are not looked at."""
    return (
        layer.impl in ("auto", "native")
        and layer.share is None
        and layer.mechanism.score in structs.SCORES
        and layer.batch_first
        and layer.kdim == layer.vdim == layer.embed_dim
        and layer.extra_k is None
        and not layer.add_zero_attn
        and layer.scaling is None
        and not (layer.training and layer.dropout > 0.0)
        and autocast_dtype("cpu") is None
        and is_unpatched()
    )


def ordinary_parameters(
    parts: Sequence[nn.Module], outputs: Sequence[int], inputs: int
) -> list[Mapping[str, nn.Parameter | None]] | None:
    """The parameters of each part; None if one of them is not just what it seems, see :func:`_is_ordinary`.

    Args:
        parts: the parts.
        outputs, inputs: the width of each map's output, and that of their input.
    """
    parameters = [own_parameters(part) for part in parts]  # asked once: a module's attributes are slow
    ordinary = all(
        _is_ordinary(part, named, (width, inputs))
        for part, named, width in zip(parts, parameters, outputs, strict=True)
    )
    return parameters if ordinary else None


def _is_ordinary(part: nn.Module, parameters: Mapping[str, Tensor | None], shape: tuple[int, int]) -> bool:
    """Whether a part is just what it seems: no adapter, hook, patch or special weight would be skipped.

    Args:
        part, parameters: the part, and its own parameters.
        shape: of a map's weight. A kernel would read beyond a smaller one that a user put in its place.
    """
    # An nn.Linear registers weight and bias, the latter perhaps as None. Another number means that something was added.
    if type(part) not in (nn.Linear, nn.Identity, Alignment) or not is_bare(part) or len(parameters) not in (0, 2):
        return False
    if type(part) is nn.Linear and not all(p is None or p.shape == shape[: p.dim()] for p in parameters.values()):
        return False
    return all(p is None or p.dtype == torch.float32 for p in parameters.values())


def _self_attention(
    x_BLD: Tensor,
    heads: int,
    maps: Sequence[tuple[Tensor | None, Tensor | None]],
    alignment: tuple[Tensor, Tensor | None] | None,
    score: str,
    scale: float,
) -> Tensor:
    """Output (B, L, D), contiguous, of self-attention on ``x_BLD``.

    Args:
        x_BLD: (B, L, D), float32, on the CPU.
        heads: number of heads.
        maps: weight (D, D) and bias (D,) of W_Q, W_K, W_V and W_O; None and None for an identity.
        alignment: W_A (L, L) and its bias, of L elements, or None.
        score, scale: as for an attention call.
    """
    x_BLD = contiguous_rows(x_BLD)
    B, L, D = x_BLD.shape
    out_BLD = x_BLD.new_empty(B, L, D)
    if out_BLD.numel() == 0:
        return out_BLD
    kept: list[Tensor] = []  # their memory has to live until the call is over
    addresses: list[int] = []
    for parameter in (p for pair in maps for p in pair):
        if parameter is not None:
            # contiguous() returns the parameter itself in the ordinary case, so that nothing is copied.
            kept.append(parameter.contiguous())
        addresses.append(0 if parameter is None else address(kept[-1]))
    # The kernel takes any stride between rows, so that a slice of W_A for a shorter input needs no copy.
    weight, bias = (None, None) if alignment is None else (contiguous_rows(alignment[0]), alignment[1])
    bias = None if bias is None else bias.contiguous()
    c = structs.Layer()
    c.isa, c.threads = current_instruction_set(), torch.get_num_threads()
    c.score, c.causal, c.scale = structs.SCORES[score], False, scale
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
