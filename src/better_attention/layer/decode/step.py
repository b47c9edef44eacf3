"""A decoder's step with a few new tokens as one call of the compiled kernels, from the input to the output.

For one token, the way between separate operators takes as long as reading a cache of thousands. Here is the ordinary
case, float32 on the CPU; everything else goes the general way (cached.py), to the same result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from better_attention.cache.kv_cache import KVCache
from better_attention.cache.streams import KEY, VALUE
from better_attention.call.torch_state import address, are_plain, is_known_finite, quiet
from better_attention.layer.arguments import Arguments
from better_attention.layer.fast_path import is_simple, ordinary_parameters
from better_attention.layer.scale import fixed_scale
from better_attention.native import structs
from better_attention.native.library import call as call_library
from better_attention.native.library import current_instruction_set, missing

from . import apart
from .stored import angles, angles_to, slopes

if TYPE_CHECKING:
    from better_attention.layer.multihead import MultiheadAttention

ROWS = 16
"""Most new tokens of a batch together: from 24 or 32 on, products of matrices are faster for wide layers."""


def attend(layer: MultiheadAttention, given: Arguments, cache: KVCache) -> Tensor | None:
    """The layer's output (B, L, D) for new tokens, which ``cache`` then holds; None where this is not for them.

    Raises:
        ValueError: a cache that does not fit the layer or the tokens.
    """
    if torch.is_grad_enabled() or not quiet() or not _is_few(layer, given) or not is_simple(layer):
        return None
    parts = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
    D, H = layer.embed_dim, layer.head_dim
    outputs = (D, layer.key_heads * H, layer.value_heads * H, D)
    if (parameters := ordinary_parameters(parts, outputs, D)) is None:
        return None
    x_BLD, maps = given.query, [p for named in parameters for p in (named.get("weight"), named.get("bias"))]
    cache.check(layer, x_BLD)
    B, L = x_BLD.shape[:2]
    if not are_plain(x_BLD, *maps) or not cache.reserve(L, x_BLD.dtype):
        return None
    c = structs.Step()
    shown_BS = cache.show(None, L)
    # The structure holds addresses only: what these names hold must not be released before the call is over.
    read = _describe(c.attention, layer, cache, shown_BS, L)
    if read is None:
        return None
    kept = [None if p is None else p.contiguous() for p in maps]
    c.isa, c.D = current_instruction_set(), D
    c.x, (c.x_b, c.x_l, _) = address(x_BLD), x_BLD.stride()
    c.wq, c.bq, c.wk, c.bk, c.wv, c.bv, c.wo, c.bo = (0 if p is None else address(p) for p in kept)
    turns = None
    if layer.rotary is not None:
        # As in cached.py: an input that is remembered as it came is turned by its place among what is remembered.
        first = cache.length if "k" in layer.mechanism.projections else cache.held(L) - L
        turns = angles(first, L, layer.rotary, H)
        c.new_cos, c.new_sin = map(address, turns)
    out_BLD = x_BLD.new_empty(B, L, D)
    c.out = out_BLD.data_ptr()
    call_library("ba_layer_step", c)
    if (L > 1 or shown_BS is not None) and not is_known_finite(out_BLD):
        again = _keep_apart(c, layer, cache, x_BLD, out_BLD)
        if again is None:
            return None
        out_BLD = again
    cache.commit(L)
    return out_BLD


def _keep_apart(
    c: structs.Step, layer: MultiheadAttention, cache: KVCache, x_BLD: Tensor, out_BLD: Tensor
) -> Tensor | None:
    """The output of a step whose numbers are not all finite, or None where that is for the general way."""
    L, N, H = x_BLD.shape[1], layer.num_heads, layer.head_dim
    held = [cache.stored(name, L) for name in cache.streams]
    bad = [apart.bad_rows(x.unflatten(2, (-1, H)).transpose(1, 2), scale) for x, scale in held]
    bad_BNS = apart.for_queries(bad, N)
    if bool(bad_BNS[:, :, :-L].any()):  # earlier tokens, which padding or a window may hide
        return None
    bad_BNL = bad_BNS[:, :, -L:]
    if not bool(bad_BNL.any()):  # a query or an overflow brought them, which belong to their own rows
        return out_BLD
    # The step again, without what is not finite; then the cache gets its rows as they were written first.
    rows = [part[:, -L:] for stored in held for part in stored if part is not None]
    written = [x.clone() for x in rows]
    clean_BLD = x_BLD.masked_fill(bad_BNL.any(dim=1)[..., None], 0.0).contiguous()
    c.x, (c.x_b, c.x_l, _) = address(clean_BLD), clean_BLD.stride()
    call_library("ba_layer_step", c)
    for row, first in zip(rows, written, strict=True):
        row.copy_(first)
    seen_BNL = apart.sees_new(bad_BNL, layer.window)
    if type(layer.out_proj) is nn.Identity:  # which leaves heads apart
        heads_BLNH: Tensor = out_BLD.unflatten(2, (N, H)).masked_fill(seen_BNL.transpose(1, 2)[..., None], math.nan)
        return heads_BLNH.flatten(2)
    return out_BLD.masked_fill(seen_BNL.any(dim=1)[..., None], math.nan)


def _is_few(layer: MultiheadAttention, given: Arguments) -> bool:
    """Whether the new tokens are few, float32, and asked for nothing unusual."""
    x = given.query
    return (
        type(x) is Tensor
        and not x.is_nested  # whose sizes cannot be asked for
        and x.dim() == 3
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[2] == layer.embed_dim > 0
        and x.stride(2) == 1
        and 0 < x.shape[0] * x.shape[1] <= ROWS
        and x.shape[1] <= structs.FEW
        and given.attn_mask is None
        and given.key_padding_mask is None
        and not given.need_weights
        # Aligned values depend on all that came before.
        and not layer.mechanism.aligned
        and missing() is None
    )


def _describe(
    c: structs.Call, layer: MultiheadAttention, cache: KVCache, shown_BS: Tensor | None, L: int
) -> list[Tensor] | None:
    """The attention over what ``cache`` holds; None where it is stored in a way that the kernels do not read.

    Returns:
        What the addresses in ``c`` belong to.
    """
    k_BSD, k_scale = cache.stored(KEY, L)
    v_BSD, v_scale = cache.stored(VALUE, L) if VALUE in cache.streams else (k_BSD, k_scale)
    if not are_plain(k_BSD, v_BSD, k_scale, v_scale, shown_BS):
        return None
    tables: list[Tensor] = []
    (B, S, _), N, H = k_BSD.shape, layer.num_heads, layer.head_dim
    # The keys that no query sees are cut off at the beginning; what is left needs a triangle if there are more queries.
    first = 0 if layer.window is None else max(0, S - L - layer.window + 1)
    c.threads, c.dtype = torch.get_num_threads(), structs.ELEMENT_TYPES[torch.float32]
    c.score, c.scale = structs.SCORES[layer.mechanism.score], fixed_scale(layer.scale, H)
    c.B, c.N, c.G, c.L, c.S, c.H, c.W = B, N, layer.value_heads, L, S - first, H, H
    c.key_group = layer.value_heads // layer.key_heads
    if L > 1:
        c.causal, c.offset, c.window = True, S - first - L, layer.window or 0
    c.k, c.k_b, c.k_g, c.k_s = _row(k_BSD, first), k_BSD.stride(0), H, k_BSD.stride(1)
    c.v, c.v_b, c.v_g, c.v_s = _row(v_BSD, first), v_BSD.stride(0), H, v_BSD.stride(1)
    if k_scale is not None and v_scale is not None:
        c.k_scale, (c.k_scale_b, c.k_scale_s, c.k_scale_g) = _row(k_scale, first), k_scale.stride()
        c.v_scale, (c.v_scale_b, c.v_scale_s, c.v_scale_g) = _row(v_scale, first), v_scale.stride()
    if layer.rotary is not None and "k" not in layer.mechanism.projections:
        cos_SP, sin_SP = angles_to(S, layer.rotary, H)
        c.rotary_cos, c.rotary_sin, c.rotary_s = _row(cos_SP, first, 0), _row(sin_SP, first, 0), cos_SP.stride(0)
        tables += [cos_SP, sin_SP]
    if layer.alibi is not None:
        tables.append(slopes(N))
        c.slopes, c.slopes_inside, c.slopes_from = address(tables[-1]), layer.alibi == "score", S - first - L
    c.mask_type = c.padding_type = structs.NO_MASK
    if shown_BS is not None:
        c.padding, c.padding_type = _row(shown_BS, first), structs.ELEMENT_TYPES[torch.bool]
        c.padding_b, c.padding_s = shown_BS.stride()
    return [x for x in (k_BSD, v_BSD, k_scale, v_scale, shown_BS, *tables) if x is not None]


def _row(x: Tensor, number: int, dim: int = 1) -> int:
    """Where a row of ``x`` begins, of those along ``dim``."""
    return address(x) + number * x.stride(dim) * x.element_size()
