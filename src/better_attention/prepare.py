"""Arguments of :func:`better_attention.attention` checked, and brought into their one internal form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .choice import IMPLS
from .errors import describe, finite_number, flag, floating_tensor, one_of
from .impl.call import Call
from .masks import check_mask
from .mechanism import SCORES
from .values import autocast_dtype


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: str,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    need_weights: bool,
    impl: str,
) -> tuple[Call, tuple[int, ...]]:
    """The call in its one internal form, and the leading dimensions (..., N) of the result."""
    one_of(score, "score", SCORES)
    one_of(impl, "impl", IMPLS)
    flag(is_causal, "is_causal")
    flag(enable_gqa, "enable_gqa")
    flag(need_weights, "need_weights")
    query, key, value = (floating_tensor(x, n) for x, n in ((query, "query"), (key, "key"), (value, "value")))
    query, key, value = same_dtype(query, key, value)
    lead = _check_shapes(query, key, value, enable_gqa)
    shape = (*lead, query.shape[-2], key.shape[-2])
    call = Call(
        *_four_dimensional(query, key, value, lead, enable_gqa),
        mask_BNLS=None if attn_mask is None else _mask(attn_mask, shape, query.device),
        causal=is_causal,
        score=score,
        scale=1.0 / math.sqrt(max(1, query.shape[-1])) if scale is None else finite_number(scale, "scale"),
        dropout_p=finite_number(dropout_p, "dropout_p", low=0.0, high=1.0),
        need_weights=need_weights,
    )
    return call, lead


def same_dtype(query: Tensor, key: Tensor, value: Tensor, *, projected: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype on one device: autocast's where autocast is on, else their own.

    Args:
        query, key, value: tensors.
        projected: whether they are a layer's projections of its inputs, for messages.

    Raises:
        TypeError: different dtypes.
        ValueError: different devices.
    """
    device = query.device.type
    names = "the projected query, key and value" if projected else "query, key and value"
    if key.device != query.device or value.device != query.device:
        raise ValueError(f"{names} must be on one device, received {query.device}, {key.device}, {value.device}.")
    dtype = autocast_dtype(device)
    if dtype is not None:
        aliased = value is key
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
        value = key if aliased else value
    if not query.dtype == key.dtype == value.dtype:
        way = "Let the projections return one dtype" if projected else "Convert them with .to(query.dtype)"
        raise TypeError(f"{names} must have one dtype, received {query.dtype}, {key.dtype} and {value.dtype}. {way}.")
    return query, key, value


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The leading dimensions (..., N) that the three broadcast to."""

    def wrong(expected: str) -> ValueError:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        return ValueError(f"received {shapes}; expected {expected}.")

    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise wrong("query (..., L, H), key (..., S, H) and value (..., S, Hv)")
    if query.shape[-1] != key.shape[-1]:
        raise wrong(f"key with the query's last size {query.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise wrong(f"value with the key's length {key.shape[-2]}")
    lead_q, lead_k, lead_v = (tuple(x.shape[:-2]) for x in (query, key, value))
    if enable_gqa:
        if not lead_q or not lead_k or lead_k[-1] != (lead_v or (0,))[-1] or lead_k[-1] == 0 or lead_q[-1] % lead_k[-1]:
            raise wrong("as many value heads as key heads, and query heads a multiple of them (enable_gqa=True)")
        heads = lead_q[-1]
        lead_q, lead_k, lead_v = ((*x[:-1], 1) for x in (lead_q, lead_k, lead_v))
    if lead_q == lead_k == lead_v:  # the general answer takes longer than a small attention
        return (*lead_q[:-1], heads) if enable_gqa else lead_q
    try:
        lead = torch.broadcast_shapes(lead_q, lead_k, lead_v)
    except RuntimeError:
        hint = "" if enable_gqa else " (enable_gqa=True for grouped query heads)"
        raise wrong(f"leading dimensions that broadcast together{hint}") from None
    return (*lead[:-1], heads) if enable_gqa else tuple(lead)


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, lead: tuple[int, ...], enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, N, length, width), views wherever the input allows one."""

    def shaped(x: Tensor) -> Tensor:
        if x.dim() == 4 and (enable_gqa or x.shape[:2] == lead) and x.shape[0] == lead[0]:
            return x
        heads = x.shape[-3] if enable_gqa else (lead[-1] if lead else 1)
        x = x.expand(*lead[:-1], *((heads,) if lead else ()), *x.shape[-2:])
        batch = math.prod(lead[:-1])
        return x if x.dim() == 4 else x.reshape(batch, heads, *x.shape[-2:])

    k_BNSH = shaped(key)
    return shaped(query), k_BNSH, k_BNSH if value is key else shaped(value)


def _mask(attn_mask: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``attn_mask`` as (B|1, N|1, L|1, S|1)."""
    mask = check_mask(attn_mask, "attn_mask", one_means="attend", device=device)
    trailing = shape[len(shape) - mask.dim() :] if 0 < mask.dim() <= len(shape) else ()
    if (
        mask.dim() == 0
        or mask.dim() > len(shape)
        or any(m not in (1, s) for m, s in zip(mask.shape, trailing, strict=True))
    ):
        raise ValueError(f"attn_mask must broadcast to (..., L, S) = {shape}, received {describe(mask)}.")
    mask = mask.reshape(*(1,) * (max(4, len(shape)) - mask.dim()), *mask.shape)
    if mask.dim() == 4:
        return mask
    batch = math.prod(shape[:-3])
    everywhere = all(size == 1 for size in mask.shape[:-3])
    return (
        mask.reshape(1, *mask.shape[-3:])
        if everywhere
        else mask.expand(*shape[:-3], *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])
    )
