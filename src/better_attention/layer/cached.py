"""One step of a decoder: the picture for the tokens that follow those that a cache remembers.

project -> remember -> align -> score -> mix -> output. Shape suffixes as in arguments.py; L new tokens, S all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from better_attention.cache.kv_cache import KVCache
from better_attention.cache.streams import KEY, SOURCE, VALUE
from better_attention.call.function_arguments import same_dtype
from better_attention.errors import describe

from . import extra_keys, window
from .alignment import Alignment
from .arguments import Arguments, Inputs, read, torch_masks
from .calling import called
from .heads import join, rotated

if TYPE_CHECKING:
    from .multihead import MultiheadAttention


def attend(layer: MultiheadAttention, given: Arguments, cache: KVCache) -> tuple[Tensor, Tensor | None]:
    """What ``layer.forward`` returns for the tokens that follow those in ``cache``, which holds them afterwards.

    If anything fails, the cache is as it was.

    Raises:
        TypeError, ValueError: no cache, or one that does not fit the layer or the inputs; more than self-attention; a
            full W_A, whose values change with every token.
    """
    _refuse(layer, given, cache)
    x = read(layer, given._replace(attn_mask=None, is_causal=False))
    L, first = x.query_BLD.shape[1], cache.length
    cache.check(layer, x.query_BLD)
    # project
    q_BLD = called(layer.q_proj, x.query_BLD, "q_proj")
    k_BLD = called(layer.k_proj, x.key_BSD, "k_proj")
    v_BLD = x.with_zero_padding(called(layer.v_proj, x.value_BSD, "v_proj"))
    q_BLD, k_BLD, v_BLD = same_dtype(q_BLD, k_BLD, v_BLD, projected=True)
    q_BLD = rotated(q_BLD, layer.num_heads, layer.rotary, first)
    projects = "k" in layer.mechanism.projections
    if projects:
        k_BLD = rotated(k_BLD, layer.num_heads, layer.rotary, first)
    # remember and align
    k_BSD = cache.write(KEY, k_BLD)
    v_BSD = _values(layer, cache, k_BSD, v_BLD, first)
    x = _with_masks(layer, given, cache, x, k_BSD.shape[1])
    # score and mix
    if not projects:
        # The input is remembered once, for keys and values, and only keys are rotated.
        k_BSD = rotated(k_BSD, layer.num_heads, layer.rotary, first - x.offset)
    k_BSD, v_BSD, x = extra_keys.append(layer, k_BSD, v_BSD, x)
    heads_BNLH, weights = window.attend(layer, layer.call(q_BLD, k_BSD, v_BSD, x))
    # output
    output = called(layer.out_proj, join(heads_BNLH, layer.batch_first), "out_proj")
    cache.commit(L)
    return x.returned(output, weights)


def _refuse(layer: MultiheadAttention, given: Arguments, cache: object) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(
            f"cache must be a better_attention.KVCache, received {describe(cache)}. Of a ModelCache pass cache[layer]."
        )
    if given.key is not given.query or given.value is not given.key:
        raise ValueError("a cache is for self-attention: pass the new tokens as query, key and value, one tensor.")
    padding = given.key_padding_mask
    if padding is not None and padding.dtype != torch.bool:
        raise TypeError(
            f"with a cache key_padding_mask must be bool (True = hide), received {describe(padding)}. Pass "
            "key_padding_mask == -torch.inf if it hides keys by -inf, or biases as attn_mask."
        )
    if isinstance(layer.align, Alignment) and not layer.align.causal:
        raise ValueError(
            f"mechanism {layer.mechanism.name!r} has a full W_A: every new token changes all earlier values, so that "
            "nothing could be remembered. Build the layer with align_causal=True, or with window=..."
        )


def _values(layer: MultiheadAttention, cache: KVCache, k_BSD: Tensor, v_BLD: Tensor, first: int) -> Tensor:
    """All values, (B, S, D): aligned where W_A acts on values, and the keys themselves where both are the input."""
    if VALUE not in cache.streams:
        return k_BSD
    if isinstance(layer.align, Alignment):
        # Earlier aligned values stay as they are, because W_A is lower triangular: each new token adds its own.
        source_BSD = cache.write(SOURCE, v_BLD) if SOURCE in cache.streams else k_BSD
        v_BLD = window.aligned_values(layer, source_BSD, first)
    return cache.write(VALUE, v_BLD)


def _with_masks(layer: MultiheadAttention, given: Arguments, cache: KVCache, x: Inputs, S: int) -> Inputs:
    """The inputs with masks for all keys, of which ``S`` are remembered, the new ones included."""
    B, L = x.query_BLD.shape[:2]
    shown_BL = None if x.padding_B11S is None else x.padding_B11S.expand(B, 1, 1, L).reshape(B, L)
    shown_BS = cache.show(shown_BL, L)
    mask_BNLS = None
    if given.attn_mask is not None:
        sizes = (B, layer.num_heads, L, cache.length + L)
        mask_BNLS, _ = torch_masks(given.attn_mask, None, sizes, batched=x.batched, device=given.query.device)
        assert mask_BNLS is not None  # noqa: S101 - for the type checker
        # Columns of tokens that a window has forgotten go.
        mask_BNLS = mask_BNLS[..., cache.length + L - S :]
    padding = None if shown_BS is None else shown_BS[:, None, None]
    return x._replace(mask_BNLS=mask_BNLS, padding_B11S=padding, causal=True, offset=S - L)
