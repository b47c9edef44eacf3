"""attention(): validate, choose an implementation, compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, overload

import torch
from torch import Tensor

from .errors import describe, finite_number, flag, floating_tensor, one_of
from .impl import IMPLEMENTATIONS
from .impl.call import Call, hidden, triangle
from .masks import check_mask
from .mechanism import SCORES
from .values import autocast_dtype, surely_finite, without

IMPLS = ("auto", *IMPLEMENTATIONS)

# Crossovers measured on CPUs, forward and backward (benchmarks/results): below them calls between Python and the
# implementation take longer than the arithmetic.
PLAIN = MappingProxyType({"softmax": 1 << 20, "expressive": 1 << 17})
"""Weights (B N L S) up to which the plain formula is taken where no compiled kernel serves, per score."""
SHORT = 32
"""Longest S at which it still beats PyTorch's fused softmax attention (it also has derivatives of every order)."""
HEADS = 32
"""Heads (B N) from which the compiled kernels beat PyTorch's fused softmax attention at any length."""
WORK = 1 << 20
"""Multiplications for the scores (B N L S H) from which they do with fewer heads."""
WIDE = 128
"""Widest heads for which they do where a mask hides keys; a triangle costs them nothing."""
HALF, HALF_TRAINED = 128, 512
"""Longest S at which they do in bfloat16, in inference and in training; beyond, PyTorch has matrix instructions."""
DROPPED = 1 << 20
"""Weights of a head (L S) from which tiles are as fast under dropout as PyTorch, which then keeps every weight."""


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = ...,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    need_weights: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = ...,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    need_weights: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    need_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Weighted mean of values, weights from queries and keys.

    softmax: :math:`w_{ls} \propto e^{z_{ls} + b_{ls}}`; expressive: :math:`w_{ls} \propto
    \frac{z_{ls}^2}{1 + z_{ls}^2} e^{b_{ls}}`, with :math:`z = q \cdot k \cdot scale`; both normalised over the keys s.

    Args:
        query: (..., N, L, H), floating point.
        key: (..., N, S, H), dtype and device of the query.
        value: (..., N, S, Hv).
        score: "softmax" or "expressive".
        attn_mask: broadcastable to (..., N, L, S). bool: True = attend (as in
            ``F.scaled_dot_product_attention``, the opposite of ``nn.MultiheadAttention``). float: b, added in
            log-weight space; -inf hides, and for the expressive score so does anything <= ``finfo(dtype).min``.
        is_causal: query l sees keys s <= l. Together with ``attn_mask`` both apply.
        dropout_p: probability of dropping a weight; applies always, so pass 0.0 outside training.
        scale: factor on q.k; None means 1/sqrt(H).
        enable_gqa: allow query heads to be a multiple of the key and value heads.
        need_weights: return (output, weights), the weights (..., N, L, S) after dropout.
        impl: "auto", or one implementation by name, which then computes or refuses. A second derivative needs
            "reference".

    Returns:
        (..., N, L, Hv), or that and the weights. A query from which every key is hidden (expressive: also one
        orthogonal to every visible key) gets weights and output 0, and finite gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape, or an ``impl`` that cannot compute this call.

    Note:
        With NaN or infinite numbers in keys or values, queries that may not see them stay clean. This is
        checked on the CPU in eager mode; elsewhere only finite numbers are kept apart.

    Source: arXiv 2403.01643 eqs. 3-4 (softmax); arXiv 2407.18601 (expressive).

    >>> q = torch.ones(2, 4, 5, 8)
    >>> attention(q, q, q, score="expressive", is_causal=True).shape
    torch.Size([2, 4, 5, 8])
    """
    call, lead = _prepare(
        query, key, value, score, attn_mask, is_causal, dropout_p, scale, enable_gqa, need_weights, impl
    )
    heads_BNLH, weights_BNLS = attend(call, impl)
    output = heads_BNLH.reshape(*lead, *heads_BNLH.shape[-2:])
    if not need_weights:
        return output
    assert weights_BNLS is not None  # noqa: S101 - the chosen implementation returns weights, for the type checker
    return output, weights_BNLS.reshape(*lead, *weights_BNLS.shape[-2:])


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which implementation would compute a call, and why not the others.

    Args:
        chosen: its name, or None where none would (only with an explicit ``impl``).
        reasons: per implementation, why it is not chosen; empty for the chosen one.
        inputs: the call in one line.
    """

    chosen: str | None
    reasons: Mapping[str, list[str]]
    inputs: str

    def __str__(self) -> str:
        lines = [f"attention({self.inputs})", f"  chosen: {self.chosen or 'none'}"]
        for name, why in self.reasons.items():
            if name != self.chosen:
                lines.append(f"  {name}: " + "; ".join(why))
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    need_weights: bool = False,
    impl: str = "auto",
) -> Explanation:
    """Which implementation :func:`attention` would take for the same arguments, and why not the others.

    Args:
        query, key, value, score, attn_mask, is_causal, dropout_p, scale, enable_gqa, need_weights, impl:
            as for :func:`attention`.

    Raises:
        TypeError, ValueError: as for :func:`attention`, but not for an ``impl`` that cannot compute the call.

    >>> q = torch.ones(1, 1, 512, 8)
    >>> print(explain(q, q, q, score="expressive", impl="sdpa"))
    attention(q (1, 1, 512, 8), k (1, 1, 512, 8), v (1, 1, 512, 8), float32 on cpu, score='expressive')
      chosen: none
      native: impl='sdpa' was asked for
      sdpa: it computes softmax weights only, not 'expressive'
      chunked: impl='sdpa' was asked for
      reference: impl='sdpa' was asked for
    """
    call, _ = _prepare(query, key, value, score, attn_mask, is_causal, dropout_p, scale, enable_gqa, need_weights, impl)
    chosen = _choose(call, impl)
    reasons = {}
    for name, implementation in IMPLEMENTATIONS.items():
        why = implementation.unsupported(call)
        if not why and name != chosen:
            why = [f"impl={impl!r} was asked for" if impl != "auto" else f"{chosen!r} is faster or leaner here"]
        reasons[name] = why
    return Explanation(chosen, MappingProxyType(reasons), _summary(call))


def attend(call: Call, impl: str) -> tuple[Tensor, Tensor | None]:
    """Compute a validated call: head outputs (B, N, L, H), and weights (B, N, L, S) where they are asked for."""
    chosen = _choose(call, impl)
    if chosen is None:
        raise ValueError(_refusal(call, impl))
    with _without_autocast(call.q_BNLH.device.type):
        heads_BNLH, weights_BNLS = IMPLEMENTATIONS[chosen].compute(call)
        if call.restricted and not surely_finite(heads_BNLH):
            heads_BNLH, weights_BNLS = _keep_apart(call, chosen, heads_BNLH, weights_BNLS)
    return heads_BNLH, weights_BNLS if call.need_weights else None


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast has had its say in :func:`same_dtype`; inside, it would undo the float32 that 16-bit weights need."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _choose(call: Call, impl: str) -> str | None:
    """The implementation for a call, or None where the one asked for refuses it."""
    if impl != "auto":
        return None if IMPLEMENTATIONS[impl].unsupported(call) else impl
    choosy = call.q_BNLH.device.type == "cpu" and not torch.compiler.is_compiling()  # there, sizes may be symbols
    first = None
    for name, implementation in IMPLEMENTATIONS.items():  # the first that is not slow; small calls feel each question
        if not implementation.unsupported(call):
            if not (choosy and _slow(call, name)):
                return name
            first = first or name
    return first


def _slow(call: Call, name: str) -> bool:
    """Whether something later in the order of implementations is faster on a CPU at these sizes."""
    (B, N, L, H), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    if name == "native":
        if call.score != "softmax" or IMPLEMENTATIONS["sdpa"].unsupported(call):
            return False
        if call.dropout_p > 0.0:  # torch draws a number for each weight, one by one, and keeps them all
            return False
        if call.q_BNLH.dtype == torch.bfloat16 and (HALF_TRAINED if _trains(call) else HALF) < S:
            return True
        if call.masks and H > WIDE:
            return True
        return B * N < HEADS and B * N * L * S * H < WORK
    if name == "sdpa" and call.dropout_p > 0.0 and L * S >= DROPPED:
        return True
    small = PLAIN[call.score] >= B * N * L * S and (call.score != "softmax" or S <= SHORT)
    return small and name != "reference"


def _trains(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q_BNLH, call.k_BNSH, call.v_BNSH))


def _refusal(call: Call, impl: str) -> str:
    lines = [f"impl={impl!r} cannot compute attention({_summary(call)}):"]
    for name, implementation in IMPLEMENTATIONS.items():
        why = implementation.unsupported(call)
        lines.append(f"  {name}: {'; '.join(why) if why else 'can'}")
    return "\n".join([*lines, "Pass impl='auto', or the name of one that can."])


def _summary(call: Call) -> str:
    parts = [f"{n} {tuple(x.shape)}" for n, x in (("q", call.q_BNLH), ("k", call.k_BNSH), ("v", call.v_BNSH))]
    parts.append(f"{str(call.q_BNLH.dtype).removeprefix('torch.')} on {call.q_BNLH.device.type}")
    parts.append(f"score={call.score!r}")
    for name, mask in (("mask", call.mask_BNLS), ("padding", call.padding_B11S)):
        if mask is not None:
            parts.append(f"{name}={str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}")
    parts += ["is_causal=True"] * call.causal
    parts += [f"dropout_p={call.dropout_p:g}"] * (call.dropout_p > 0.0)
    parts += ["need_weights=True"] * call.need_weights
    return ", ".join(parts)


# --- numbers that are not finite -------------------------------------------------------------------------------


def _keep_apart(
    call: Call, chosen: str, heads_BNLH: Tensor, weights_BNLS: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Redo a call whose keys or values are not all finite, so that only queries that see those become NaN.

    A hidden key has weight 0, but 0 * NaN is NaN. The same implementation runs again with those keys and values
    zeroed, which leaves every other query bit for bit as with finite ones (without dropout, which draws again).
    """
    bad_BNS = ~(call.k_BNSH.isfinite().all(dim=-1) & call.v_BNSH.isfinite().all(dim=-1))
    if not bool(bad_BNS.any()):
        return heads_BNLH, weights_BNLS
    clean = replace(
        call,
        k_BNSH=without(call.k_BNSH, bad_BNS),
        v_BNSH=without(call.v_BNSH, bad_BNS),
    )
    heads_BNLH, weights_BNLS = IMPLEMENTATIONS[chosen].compute(clean)
    sees_bad_BNL1 = _sees(call, bad_BNS)
    if weights_BNLS is not None:
        weights_BNLS = weights_BNLS.masked_fill(sees_bad_BNL1, math.nan)
    return heads_BNLH.masked_fill(sees_bad_BNL1, math.nan), weights_BNLS


def _sees(call: Call, keys_BNS: Tensor, rows: int = 256) -> Tensor:
    """Which queries may see any of the marked keys, (B, N, L, 1); a few rows at a time, for memory's sake."""
    (B, N, L, _), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    keys_BNS = keys_BNS.repeat_interleave(N // max(1, keys_BNS.shape[1]), dim=1)
    parts = []
    for first in range(0, L, rows):
        last = min(L, first + rows)
        seen = keys_BNS[:, :, None, :]
        for mask in call.masks:
            cut = mask[:, :, first:last] if mask.shape[2] > 1 else mask
            seen = seen & ~hidden(cut, call.score)
        if call.causal:
            seen = seen & triangle(torch.arange(first, last, device=seen.device), S)
        parts.append(seen.any(dim=-1, keepdim=True).expand(B, N, last - first, 1))
    return torch.cat(parts, dim=2)


# --- validation ------------------------------------------------------------------------------------------------


def _prepare(
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


def same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype on one device: autocast's where autocast is on, else their own.

    Raises:
        TypeError: different dtypes.
        ValueError: different devices.
    """
    device = query.device.type
    if key.device != query.device or value.device != query.device:
        raise ValueError(
            f"query, key and value must be on one device, received {query.device}, {key.device}, {value.device}."
        )
    dtype = autocast_dtype(device)
    if dtype is not None:
        aliased = value is key
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
        value = key if aliased else value
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one dtype, received {query.dtype}, {key.dtype} and {value.dtype}. "
            "Convert them with .to(query.dtype)."
        )
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
