"""A step with a cache that the compiled kernels read as it is stored: keys turned, distances counted, int8 multiplied.

Everywhere else a step first makes of the cache what attention takes: keys that are rotated or have more features, or
numbers of int8 codes. For one new token that would cost as much memory as the cache, and more time than attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from better_attention.cache.kv_cache import KVCache
from better_attention.cache.streams import KEY, VALUE
from better_attention.call.torch_state import exporting
from better_attention.impl import native
from better_attention.layer.arguments import Inputs
from better_attention.layer.window import WindowAlignment

from .stored import Stored, by_kernels, operator

if TYPE_CHECKING:
    from better_attention.layer.multihead import MultiheadAttention


def attend(layer: MultiheadAttention, cache: KVCache, q_BLD: Tensor, x: Inputs) -> Tensor | None:
    """The heads (B, N, L, H) of new tokens over all that ``cache`` holds, or None where a step is as everywhere else.

    Args:
        layer, cache: the layer, and what it remembers.
        q_BLD: the new tokens' queries; of rotary positions with keys that are stored as they came, rotated from
            ``x.offset`` on.
        x: the inputs with the masks of all keys.
    """
    base = None if "k" in layer.mechanism.projections else layer.rotary
    L = x.query_BLD.shape[1]
    k_BSD, k_scale = cache.stored(KEY, L)
    if (k_scale is None and base is None and layer.alibi is None) or not _serves(layer, x):
        return None
    shared = VALUE not in cache.streams
    v_BSD, v_scale = (k_BSD, k_scale) if shared else cache.stored(VALUE, L)
    call = layer.unbiased_call(q_BLD, k_BSD, v_BSD, x).trimmed()
    kept = call.k_BNSH.shape[2]
    # The keys that no query sees are cut off at the beginning.
    first = k_BSD.shape[1] - kept
    stored = Stored(
        q=call.q_BNLH,
        k=call.k_BNSH,
        v=None if shared else call.v_BNSH,
        mask=call.mask_BNLS,
        padding=call.padding_B11S,
        k_scale=None if k_scale is None else k_scale[:, first:],
        v_scale=None if shared or v_scale is None else v_scale[:, first:],
        causal=call.causal,
        offset=call.offset,
        window=call.window,
        score=call.score,
        scale=call.scale,
        rotary=base or 0.0,
        turned=first,
        alibi=layer.alibi or "",
        place=kept - L,
        heads=layer.num_heads,
        first_head=layer.first_head,
    )
    if not torch.compiler.is_compiling():
        return by_kernels(stored)
    return operator(*stored) if native.decodes(call) else None


def _serves(layer: MultiheadAttention, x: Inputs) -> bool:
    """Whether the layer has nothing that changes keys or weights on the way, and no program is exported."""
    return (
        not exporting()
        and layer.impl in ("auto", "native")
        and x.query_BLD.device.type == "cpu"
        and not x.need_weights
        and layer.extra_k is None
        and not layer.add_zero_attn
        and not isinstance(layer.align, WindowAlignment)
    )
