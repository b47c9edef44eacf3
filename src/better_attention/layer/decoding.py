"""A step with a cache that the compiled kernels read as it is stored: keys turned, distances counted, int8 multiplied.

Everywhere else a step first makes of the cache what attention takes: keys that are rotated or have more features, or
numbers of int8 codes. For one new token that would cost as much memory as the cache, and more time than attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from better_attention.cache.kv_cache import KVCache
from better_attention.cache.streams import KEY, VALUE
from better_attention.impl import native
from better_attention.positions import alibi_slopes, rotary_angles

from .arguments import Inputs
from .window import WindowAlignment

if TYPE_CHECKING:
    from .multihead import MultiheadAttention


def attend(layer: MultiheadAttention, cache: KVCache, q_BLD: Tensor, x: Inputs) -> Tensor | None:
    """The heads (B, N, L, H) of new tokens over all that ``cache`` holds, or None where a step is as everywhere else.

    Args:
        layer, cache: the layer, and what it remembers.
        q_BLD: the new tokens' queries; of rotary positions with keys that are stored as they came, rotated from
            ``x.offset`` on.
        x: the inputs with the masks of all keys.
    """
    turned = layer.rotary is not None and "k" not in layer.mechanism.projections
    L = x.query_BLD.shape[1]
    k_BSD, k_scale = cache.stored(KEY, L)
    if (k_scale is None and not turned and layer.alibi is None) or not _serves(layer, x):
        return None
    v_BSD, v_scale = cache.stored(VALUE, L) if VALUE in cache.streams else (k_BSD, k_scale)
    call = layer.unbiased_call(q_BLD, k_BSD, v_BSD, x).trimmed()
    S, kept = k_BSD.shape[1], call.k_BNSH.shape[2]
    # The keys that no query sees are cut off at the beginning.
    seen = slice(S - kept, S)
    angles = None
    if turned:
        cos_SP, sin_SP = _angles(layer.rotary, layer.head_dim, 1 << (S - 1).bit_length())
        angles = cos_SP[seen], sin_SP[seen]
    scales = None if k_scale is None or v_scale is None else (k_scale[:, seen], v_scale[:, seen])
    distances = None
    if layer.alibi is not None:
        slopes_N = _slopes(layer.num_heads)[layer.first_head :][: layer.heads_here]
        distances = native.Distances(slopes_N, layer.alibi == "score", kept - L)
    return native.decode(call, angles=angles, scales=scales, distances=distances)


def _serves(layer: MultiheadAttention, x: Inputs) -> bool:
    """Whether the layer has nothing that changes keys or weights on the way, and nobody traces."""
    return (
        not torch.compiler.is_compiling()
        and layer.impl in ("auto", "native")
        and x.query_BLD.device.type == "cpu"
        and not x.need_weights
        and layer.extra_k is None
        and not layer.add_zero_attn
        and not isinstance(layer.align, WindowAlignment)
    )


@lru_cache(maxsize=8)
def _slopes(num_heads: int) -> Tensor:
    """Each head's slope of ALiBi."""
    with torch.inference_mode(False):
        return torch.tensor(alibi_slopes(num_heads))


@lru_cache(maxsize=8)
def _angles(base: float, width: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle at ``length`` positions: one table for all layers of a model."""
    with torch.inference_mode(False):
        return rotary_angles(torch.arange(length), width, base=base)
