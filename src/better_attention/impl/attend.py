"""A validated call, computed: the choice of an implementation, and numbers that are not finite kept apart."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from better_attention.call.call import Call, hidden, triangle
from better_attention.call.values import autocast_dtype, surely_finite, without

from . import IMPLEMENTATIONS
from .choice import choose, refusal


def attend(call: Call, impl: str) -> tuple[Tensor, Tensor | None]:
    """Compute a validated call: head outputs (B, N, L, H), and weights (B, N, L, S) where they are asked for."""
    chosen = choose(call, impl)
    if chosen is None:
        raise ValueError(refusal(call, impl))
    with _without_autocast(call.q_BNLH.device.type):
        heads_BNLH, weights_BNLS = IMPLEMENTATIONS[chosen].compute(call)
        if call.restricted and not surely_finite(heads_BNLH):
            heads_BNLH, weights_BNLS = _keep_apart(call, chosen, heads_BNLH, weights_BNLS)
    return heads_BNLH, weights_BNLS if call.need_weights else None


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast has had its say in :func:`.same_dtype`; here it would undo the float32 that 16-bit weights need."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


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
