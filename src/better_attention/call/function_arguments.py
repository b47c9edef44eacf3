"""Arguments of :func:`better_attention.attention` checked, and brought into their one internal form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from better_attention.errors import check_bool, check_choice, check_float, check_int, describe
from better_attention.scores import SCORES
from better_attention.tensors import floating_tensor

from .call import Call
from .masks import check_mask, without_repeats
from .torch_state import autocast_dtype


@dataclass(frozen=True, slots=True)
class Lead:
    """The leading dimensions (..., N) of a call, and which of them are its batch and which its heads.

    Args:
        sizes: (..., N).
        heads: positions of those that become heads, N last; None: N alone.
    """

    sizes: tuple[int, ...]
    heads: tuple[int, ...] | None = None

    def fold(self, x: Tensor) -> Tensor:
        """(..., N, rows, columns) as (B, N, rows, columns); any size may be another than the result's."""
        lead = x.shape[:-2]
        if self.heads is None:
            # The product of no sizes is 1: an input (N, L, H) becomes a batch of one, and (L, H) gets one head besides.
            return x.reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, *x.shape[-2:])
        batch = self._batch(self.heads)
        x = x.permute(*batch, *self.heads, x.dim() - 2, x.dim() - 1)
        return x.reshape(math.prod(lead[d] for d in batch), math.prod(lead[d] for d in self.heads), *x.shape[-2:])

    def unfold(self, x_BNLW: Tensor) -> Tensor:
        """The result (B, N, L, W) as (..., N, L, W)."""
        if self.heads is None:
            return x_BNLW.reshape(*self.sizes, *x_BNLW.shape[-2:])
        order = (*self._batch(self.heads), *self.heads)
        x = x_BNLW.reshape(*(self.sizes[d] for d in order), *x_BNLW.shape[-2:])
        # order.index inverts the permutation of fold(), which puts every dimension back where the caller had it.
        return x.permute(*(order.index(d) for d in range(len(order))), x.dim() - 2, x.dim() - 1)

    def _batch(self, heads: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(d for d in range(len(self.sizes)) if d not in heads)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: str,
    attn_mask: Tensor | None,
    is_causal: bool,
    offset: int,
    window: int | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    need_weights: bool,
) -> tuple[Call, Lead]:
    """The call in its one internal form, and the leading dimensions (..., N) that its result goes back to."""
    check_choice(score, "score", SCORES)
    check_bool(is_causal, "is_causal")
    offset, window = check_band(is_causal, offset, window)
    check_bool(enable_gqa, "enable_gqa")
    check_bool(need_weights, "need_weights")
    query, key, value = (floating_tensor(x, n) for x, n in ((query, "query"), (key, "key"), (value, "value")))
    query, key, value = same_dtype(query, key, value)
    sizes = _check_shapes(query, key, value, enable_gqa)
    lead = Lead(sizes)
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, (*sizes, query.shape[-2], key.shape[-2]), query.device)
        # Up to four dimensions the mask broadcasts by strides with N alone as the heads.
        if attn_mask.dim() > 4:
            lead = Lead(sizes, _grouped(sizes, tuple(attn_mask.shape)))
    call = Call(
        *_four_dimensional(query, key, value, lead, enable_gqa),
        mask_BNLS=None if attn_mask is None else _mask(attn_mask, lead),
        causal=is_causal,
        offset=offset,
        window=window,
        score=score,
        # Heads of width 0 are allowed; all their scores are 0, whatever the scale.
        scale=1.0 / math.sqrt(max(1, query.shape[-1])) if scale is None else check_float(scale, "scale"),
        dropout_p=check_float(dropout_p, "dropout_p", low=0.0, high=1.0),
        need_weights=need_weights,
    )
    return call, lead


def check_band(is_causal: bool, offset: int, window: int | None) -> tuple[int, int | None]:
    """Offset and window if they mean something.

    Raises:
        TypeError, ValueError: no whole numbers in range; or given without ``is_causal=True``.
    """
    if offset == 0 and window is None:  # the most frequent call needs no more
        return 0, None
    offset = check_int(offset, "offset", at_least=0)
    window = None if window is None else check_int(window, "window")
    if not is_causal:
        raise ValueError(
            f"offset={offset} and window={window} say which earlier keys a query sees, which needs is_causal=True. "
            "Pass is_causal=True, or leave them out and pass an attn_mask."
        )
    return offset, window


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
        # A conversion makes a new tensor each time, and the kernels read key and value that are one only once.
        aliased = value is key
        # float64 stays as it is, because torch's autocast does not convert it either.
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
        # The numbers of heads are settled here and set to 1, so that only the dimensions before them have to broadcast.
        heads = lead_q[-1]
        lead_q, lead_k, lead_v = ((*x[:-1], 1) for x in (lead_q, lead_k, lead_v))
    if lead_q == lead_k == lead_v:  # the general answer takes longer than a small attention
        return (*lead_q[:-1], heads) if enable_gqa else lead_q
    try:
        lead = torch.broadcast_shapes(lead_q, lead_k, lead_v)
    except RuntimeError:
        hint = "" if enable_gqa else " (enable_gqa=True for grouped query heads)"
        # torch's message names sizes, but not which argument has them.
        raise wrong(f"leading dimensions that broadcast together{hint}") from None
    return (*lead[:-1], heads) if enable_gqa else tuple(lead)


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, lead: Lead, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, N, length, width), views wherever the input allows one."""
    sizes = lead.sizes

    def shaped(x: Tensor) -> Tensor:
        if x.dim() == 4 and (enable_gqa or x.shape[:2] == sizes) and x.shape[0] == sizes[0]:
            return x
        heads = x.shape[-3] if enable_gqa else (sizes[-1] if sizes else 1)
        x = x.expand(*sizes[:-1], *((heads,) if sizes else ()), *x.shape[-2:])
        return x if x.dim() == 4 else lead.fold(x)

    # shaped() may make a new object, and key and value that are one tensor have to stay one for the kernels.
    k_BNSH = shaped(key)
    return shaped(query), k_BNSH, k_BNSH if value is key else shaped(value)


def _check_mask(attn_mask: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``attn_mask`` with as many dimensions as the call, four at least, each of the call's size or 1."""
    mask = check_mask(attn_mask, "attn_mask", one_means="attend", device=device)
    trailing = shape[len(shape) - mask.dim() :] if 0 < mask.dim() <= len(shape) else ()
    if (
        mask.dim() == 0
        or mask.dim() > len(shape)
        # By hand: broadcast_shapes would accept a mask that enlarges the call. Another rank fails the tests above.
        or any(m not in (1, s) for m, s in zip(mask.shape, trailing, strict=True))
    ):
        raise ValueError(f"attn_mask must broadcast to (..., L, S) = {shape}, received {describe(mask)}.")
    return without_repeats(mask.reshape(*(1,) * (max(4, len(shape)) - mask.dim()), *mask.shape))


def _grouped(sizes: tuple[int, ...], mask: tuple[int, ...]) -> tuple[int, ...] | None:
    """Which leading dimensions to take for heads so that a mask of more than four dimensions need not be repeated.

    Strides can broadcast a mask over the whole batch or over all heads, but not over a part of either: what the mask
    repeats goes to one of them, what it does not to the other.
    """
    # The zip is not strict because the mask ends with L and S, which are not among the leading sizes.
    repeats = [m == 1 and s != 1 for m, s in zip(mask, sizes, strict=False)]
    if not any(repeats[:-1]) or all(repeats[:-1]):
        return None
    return tuple(d for d, repeated in enumerate(repeats) if repeated == repeats[-1])


def _mask(mask: Tensor, lead: Lead) -> Tensor:
    """A checked mask as (B|1, N|1, L|1, S|1)."""
    if mask.dim() == 4:
        return mask
    return lead.fold(mask)
