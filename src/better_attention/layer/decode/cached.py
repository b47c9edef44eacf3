"""One step of a decoder: the picture for the tokens that follow those that a cache remembers.

project -> remember -> align -> score -> mix -> output. Shape suffixes as in arguments.py; L new tokens, S all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from better_attention.cache.kv_cache import KVCache, refuse_gradients
from better_attention.cache.streams import KEY, SOURCE, VALUE
from better_attention.call.function_arguments import same_dtype
from better_attention.call.torch_private import is_bare
from better_attention.errors import describe
from better_attention.layer import extra_keys, share, window
from better_attention.layer.alignment import Alignment
from better_attention.layer.arguments import Arguments, Inputs, read, torch_masks
from better_attention.layer.calling import called
from better_attention.layer.heads import join, rotated

from . import decoding, step

if TYPE_CHECKING:
    from better_attention.layer.multihead import MultiheadAttention


def attend(layer: MultiheadAttention, given: Arguments, cache: KVCache) -> tuple[Tensor, Tensor | None]:
    """What ``layer.forward`` returns for the tokens that follow those in ``cache``, which holds them afterwards.

    If anything fails, the cache is as it was.

    Raises:
        TypeError, ValueError: no cache, or one that does not fit the layer or the inputs; more than self-attention; a
            full W_A, whose values change with every token.
    """
    _refuse(layer, given, cache)
    if (output := step.attend(layer, given, cache)) is not None:
        return output, None
    if torch.compiler.is_compiling() or cache.is_allocated:
        return _in_parts(layer, given, cache)
    try:
        return _in_parts(layer, given, cache)
    except BaseException:
        # What the call has allocated would prescribe the dtype and the device of later ones.
        cache.release()
        raise


def _in_parts(layer: MultiheadAttention, given: Arguments, cache: KVCache) -> tuple[Tensor, Tensor | None]:
    """The same by separate operators."""
    x = read(layer, given._replace(attn_mask=None, is_causal=False))
    L, first = x.query_BLD.shape[1], cache.length
    cache.check(layer, x.query_BLD)
    # project
    q_BLD = called(layer.q_proj, x.query_BLD, "q_proj")
    k_BLD = called(layer.k_proj, x.key_BSD, "k_proj")
    v_BLD = x.with_zero_padding(called(layer.v_proj, x.value_BSD, "v_proj"))
    q_BLD, k_BLD, v_BLD = share.columns(layer, *same_dtype(q_BLD, k_BLD, v_BLD, projected=True))
    refuse_gradients(q_BLD)
    projects = "k" in layer.mechanism.projections
    # remember and align
    if projects:
        k_BLD = rotated(k_BLD, layer.here(layer.key_heads), layer.rotary, first)
    cache.write(KEY, k_BLD)
    _remember_values(layer, cache, v_BLD, first)
    x = _with_masks(layer, given, cache, x)
    # score and mix
    # An input that is both key and value is remembered as it came, and its rotation counts from what is remembered:
    # positions matter by their differences.
    q_BLD = rotated(q_BLD, layer.heads_here, layer.rotary, first if projects else x.offset)
    heads_BNLH, weights = _heads(layer, cache, q_BLD, x)
    # output
    weights = weights if layer.share is None else layer.share.gathered(weights)
    output = called(layer.out_proj, join(heads_BNLH, layer.batch_first), "out_proj")
    # Not every gradient comes through keys and values: W_O, a mask or a hook has its own.
    refuse_gradients(output)
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
    if padding is not None and getattr(padding, "dtype", None) != torch.bool:
        raise TypeError(
            f"with a cache key_padding_mask must be bool (True = hide), received {describe(padding)}. Pass "
            "key_padding_mask == -torch.inf if it hides keys by -inf, or biases as attn_mask."
        )
    if isinstance(layer.align, Alignment) and not layer.align.causal:
        raise ValueError(
            f"mechanism {layer.mechanism.name!r} has a full W_A: every new token changes all earlier values, so that "
            "nothing could be remembered. Build the layer with align_causal=True, or with window=..."
        )


def _remember_values(layer: MultiheadAttention, cache: KVCache, v_BLD: Tensor, first: int) -> None:
    """Keep the new values, aligned where W_A acts on values; nothing where the key is the value."""
    if VALUE not in cache.streams:
        return
    if isinstance(layer.align, Alignment):
        # Earlier aligned values stay as they are, because W_A is lower triangular: each new token adds its own.
        if SOURCE in cache.streams:
            cache.write(SOURCE, v_BLD)
        v_BLD = _aligned(layer, layer.align, cache, v_BLD, first)
    cache.write(VALUE, v_BLD)


def _aligned(layer: MultiheadAttention, align: Alignment, cache: KVCache, v_BLD: Tensor, first: int) -> Tensor:
    """The new tokens' own values of W_A, from all that is remembered."""
    source = SOURCE if SOURCE in cache.streams else KEY
    codes_BSD, scale_BSN = cache.stored(source, v_BLD.shape[1])
    bare = is_bare(align) and align.weight.dtype == v_BLD.dtype and not torch.compiler.is_compiling()
    if scale_BSN is not None and first > 0 and bare:
        return align.of_codes(codes_BSD, scale_BSN, first, v_BLD.dtype)
    return window.aligned_values(layer, cache.read(source, v_BLD.shape[1]), first)


def _heads(layer: MultiheadAttention, cache: KVCache, q_BLD: Tensor, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """The heads of the new tokens over all that are remembered, and the weights where they are wanted."""
    if (heads_BNLH := decoding.attend(layer, cache, q_BLD, x)) is not None:
        return heads_BNLH, None
    L = q_BLD.shape[1]
    k_BSD = cache.read(KEY, L)
    v_BSD = cache.read(VALUE, L) if VALUE in cache.streams else k_BSD
    if "k" not in layer.mechanism.projections:
        k_BSD = rotated(k_BSD, layer.heads_here, layer.rotary)
    k_BSD, v_BSD, x = extra_keys.append(layer, k_BSD, v_BSD, x)
    return window.attend(layer, layer.call(q_BLD, k_BSD, v_BSD, x))


def _with_masks(layer: MultiheadAttention, given: Arguments, cache: KVCache, x: Inputs) -> Inputs:
    """The inputs with masks for all keys that are remembered, the new ones included."""
    B, L = x.query_BLD.shape[:2]
    S = cache.held(L)
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
