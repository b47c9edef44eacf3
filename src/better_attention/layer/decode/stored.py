"""A few queries over a cache as it is stored, as one operator: what a compiled program calls, and eager code too.

Shape suffixes as in arguments.py; G heads of keys.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from better_attention import operators
from better_attention.cache.int8 import dequantised
from better_attention.call.call import Call
from better_attention.call.torch_state import is_known_finite
from better_attention.impl import native
from better_attention.impl.dispatch import attend, sees
from better_attention.layer.heads import biased, rotated
from better_attention.positions import alibi_slopes, rotary_angles
from better_attention.tensors import empty_heads

from . import apart


class Stored(NamedTuple):
    """The arguments of the operator.

    Args:
        q: queries (B, N, L, H), turned already.
        k, v: what is stored, (B, G, S, H) and (B, G, S, W): numbers, or codes in int8; v is None where k serves as v.
        mask, padding: as in :class:`Call`.
        k_scale, v_scale: (B, S, G) where k and v are codes.
        causal, offset, window, score, scale: as in :class:`Call`.
        rotary: base of the rotary positions by which keys are turned as they are read, the first one at ``turned``; 0:
            they are not.
        turned: see ``rotary``.
        alibi: the layer's argument; "" without.
        place: where the first query stands among the keys, for ALiBi.
        heads, first_head: number of the layer's heads, and which of them is the first of q.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None
    padding: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    causal: bool
    offset: int
    window: int | None
    score: str
    scale: float
    rotary: float
    turned: int
    alibi: str
    place: int
    heads: int
    first_head: int

    @property
    def call(self) -> Call:
        """The attention call over what is stored."""
        return Call(
            self.q,
            self.k,
            self.k if self.v is None else self.v,
            mask_BNLS=self.mask,
            padding_B11S=self.padding,
            causal=self.causal,
            offset=self.offset,
            window=self.window,
            score=self.score,
            scale=self.scale,
        )


def by_kernels(stored: Stored) -> Tensor | None:
    """The heads (B, N, L, W) by the compiled kernels, or None where they do not serve."""
    heads_BNLW = _by_kernels(stored)
    call = stored.call
    if heads_BNLW is None or not call.restricted or is_known_finite(heads_BNLW):
        return heads_BNLW
    held = {"k": (stored.k, stored.k_scale)}
    if stored.v is not None:
        held["v"] = (stored.v, stored.v_scale)
    bad = {name: apart.bad_rows(*rows) for name, rows in held.items()}
    bad_BNS = apart.for_queries(list(bad.values()), stored.q.shape[1])
    if not bool(bad_BNS.any()):  # a query or an overflow brought the numbers, which belong to their own rows
        return heads_BNLW
    clean: dict[str, Any] = {}
    for name, rows in held.items():
        clean[name], clean[f"{name}_scale"] = apart.without(*rows, bad[name])
    again = _by_kernels(stored._replace(**clean))
    return heads_BNLW if again is None else again.masked_fill(sees(call, bad_BNS), math.nan)


def _by_kernels(stored: Stored) -> Tensor | None:
    """The same, NaN wherever a key is not finite, hidden or not."""
    turns = scales = distances = None
    if stored.rotary:
        S, first = stored.k.shape[2], stored.turned
        cos_SP, sin_SP = angles_to(first + S, stored.rotary, stored.q.shape[3])
        turns = cos_SP[first : first + S], sin_SP[first : first + S]
    if stored.k_scale is not None:
        scales = stored.k_scale, stored.k_scale if stored.v_scale is None else stored.v_scale
    if stored.alibi:
        slopes_N = slopes(stored.heads)[stored.first_head :][: stored.q.shape[1]]
        distances = native.Distances(slopes_N, stored.alibi == "score", stored.place)
    return native.decode(stored.call, angles=turns, scales=scales, distances=distances)


def _compute(stored: Stored) -> Tensor:
    """What the operator does: the kernels, or the same by plain operators where they do not serve."""
    heads_BNLW = by_kernels(stored)
    if heads_BNLW is None:
        heads_BNLW = empty_heads(stored.q, stored.call.v_BNSH.shape[3]).copy_(_plainly(stored))
    return heads_BNLW


def _plainly(stored: Stored) -> Tensor:
    call = stored.call
    k_BGSH = _numbers(call.k_BNSH, stored.k_scale, stored.q.dtype)
    v_BGSW = k_BGSH if stored.v is None else _numbers(stored.v, stored.v_scale, stored.q.dtype)
    if stored.rotary:
        G = k_BGSH.shape[1]
        k_BSD = k_BGSH.transpose(1, 2).flatten(2)
        k_BGSH = rotated(k_BSD, G, stored.rotary, stored.turned).unflatten(2, (G, -1)).transpose(1, 2)
    call = replace(call, k_BNSH=k_BGSH, v_BNSH=v_BGSW)
    if stored.alibi:
        # Without a triangle every key is seen, and the last query's place says where the others stand.
        counted = replace(call, causal=True, offset=stored.place)
        call = biased(stored.alibi, counted, stored.heads, stored.first_head)
    return attend(call, "auto")[0]


def _numbers(x_BGSH: Tensor, scale_BSG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What codes and scales stand for, heads apart; numbers are as they are."""
    if scale_BSG is None:
        return x_BGSH
    x_BSD = dequantised(x_BGSH.transpose(1, 2).flatten(2), scale_BSG, dtype)
    heads_BGSH: Tensor = x_BSD.unflatten(2, (scale_BSG.shape[2], -1)).transpose(1, 2)
    return heads_BGSH


def _fake(stored: Stored) -> Tensor:
    return empty_heads(stored.q, stored.call.v_BNSH.shape[3])


operator = operators.register_inference("decode", Stored, _compute, _fake)


# --- tables, which all layers of a model share ------------------------------------------------------------------------


@lru_cache(maxsize=8)
def slopes(num_heads: int) -> Tensor:
    """Each head's slope of ALiBi, (N,), float32."""
    with torch.inference_mode(False):
        return torch.tensor(alibi_slopes(num_heads))


def angles_to(length: int, base: float, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle at ``length`` positions at least, (length or more, H/2), float32."""
    # A power of two, so that a growing cache needs a new table only now and then.
    return angles(0, 1 << (length - 1).bit_length(), base, width)


@lru_cache(maxsize=16)
def angles(first: int, count: int, base: float, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle at ``count`` positions from ``first`` on, (count, H/2), float32."""
    with torch.inference_mode(False):
        return rotary_angles(torch.arange(first, first + count), width, base=base)
