"""Sums over the keys that one process holds: Σ a v and Σ a, and what comes back through them.

With a the un-normalised weights, attention over all keys is the sum of all processes' Σ a v divided by the sum of their
Σ a. For the expressive score without biases a lies in [0, 1), and the sums simply add. Where a contains an
exponential (softmax, or a float mask) each process takes a constant out of its exponents, the *shift*, and sums are
brought to the largest one before they are added.

Computed by the compiled kernels where they serve, elsewhere by the formula. Shape suffixes as in call/call.py; W width
of v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from better_attention.call.call import Call
from better_attention.impl import native
from better_attention.impl.reference import bias_and_hidden

UNIT = 2.0**-40
"""Sums of expressive weights are counted in it, so that small ones keep their digits in float32."""
FAINT = 1e-35
"""Rows whose weights sum to less have no weight: all their scores are below 3e-18 in absolute value."""
BLOCK = 1 << 24
"""Weights that the formula holds at a time."""


class Sums(NamedTuple):
    """Over the keys of a call.

    Args:
        weighted_BNLW: Σ a v.
        total_BNL: Σ a.
        shift_BNL: the constant taken out of the exponents; None without exponents, where both sums are in ``UNIT``.
    """

    weighted_BNLW: Tensor
    total_BNL: Tensor
    shift_BNL: Tensor | None


def has_exponent(call: Call) -> bool:
    """Whether the weights of a call contain an exponential, so that sums need a shift."""
    return call.score == "softmax" or any(m.is_floating_point() for m in call.masks)


def sums(call: Call) -> Sums:
    """Σ a v and Σ a over the keys of a call, in float32 or float64."""
    return _native_sums(call) if not native.unsupported(call) else _formula_sums(call)


def gradients(
    grad_BNLW: Tensor, call: Call, total_BNL: Tensor, shift_BNL: Tensor | None, delta_BNL: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v through the keys of a call; None for v where k serves as v, with both in that of k.

    Args:
        grad_BNLW: of the outputs over all keys.
        call: the call over some keys.
        total_BNL, shift_BNL: of all keys, ``total_BNL`` infinite in rows without weight.
        delta_BNL: the product of output and gradient, Σ over keys of w dL/dw.
    """
    shift_BNL = torch.zeros_like(total_BNL) if shift_BNL is None else shift_BNL
    if native.unsupported(call):
        return _formula_gradients(grad_BNLW, call, total_BNL, shift_BNL, delta_BNL)
    return native.partial_backward(grad_BNLW, call, torch.stack([total_BNL, shift_BNL], dim=-1), delta_BNL)


# --- by the kernels ---------------------------------------------------------------------------------------------------


def _native_sums(call: Call) -> Sums:
    out, stats = native.partial(call)
    total, shift = stats.unbind(-1)
    faint = total == 0.0
    total = total.masked_fill(total == math.inf, 0.0)
    if has_exponent(call):
        if bool(faint.any()):
            careful, its_shift = _careful_totals(call, faint)
            # Any pair with the same product will do: a total of 1, and all of it in the shift.
            shift = torch.where(faint, (careful.log() + its_shift).to(shift.dtype), shift)
            total = torch.where(faint, (careful > 0.0).to(total.dtype), total)
        return Sums(out * total[..., None], total, shift.masked_fill(total == 0.0, -math.inf))
    total = total / UNIT
    if bool(faint.any()):
        careful, _ = _careful_totals(call, faint)
        total = torch.where(faint, (careful / UNIT).to(total.dtype), total)
    return Sums(out * total[..., None], total, None)


def _careful_totals(call: Call, faint_BNL: Tensor) -> tuple[Tensor, Tensor]:
    """Normaliser and shift in float64 of the heads that have rows which the kernels computed in double precision.

    The kernels return the output of such a row and not its normaliser. They are rare: all scores are below 1e-12.
    """
    total = torch.zeros(faint_BNL.shape, dtype=torch.float64, device=faint_BNL.device)
    shift = torch.zeros_like(total)
    call = call.with_repeated_heads()
    for b, n in faint_BNL.any(dim=-1).nonzero().tolist():
        one = replace(
            call,
            q_BNLH=call.q_BNLH[b : b + 1, n : n + 1].double(),
            k_BNSH=call.k_BNSH[b : b + 1, n : n + 1].double(),
            v_BNSH=call.v_BNSH[b : b + 1, n : n + 1, :, :0].double(),
            mask_BNLS=_of_head(call.mask_BNLS, b, n),
            padding_B11S=_of_head(call.padding_B11S, b, n),
        )
        found = _formula_sums(one)
        total[b, n] = found.total_BNL[0, 0] * (UNIT if found.shift_BNL is None else 1.0)
        shift[b, n] = 0.0 if found.shift_BNL is None else found.shift_BNL[0, 0]
    return total, shift


def _of_head(mask: Tensor | None, b: int, n: int) -> Tensor | None:
    if mask is None:
        return None
    b, n = b if mask.shape[0] > 1 else 0, n if mask.shape[1] > 1 else 0
    return mask[b : b + 1, n : n + 1]


# --- by the formula ---------------------------------------------------------------------------------------------------


def _formula_sums(call: Call) -> Sums:
    call = call.with_repeated_heads()
    parts = []
    for rows in _row_blocks(call):
        a, _, shift = _weights(rows, None)
        a = a if has_exponent(call) else a / UNIT
        parts.append((a @ rows.v_BNSH, a.sum(dim=-1), shift.squeeze(-1)))
    weighted, total, shift = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return Sums(weighted, total, shift if has_exponent(call) else None)


def _formula_gradients(
    grad_BNLW: Tensor, call: Call, total_BNL: Tensor, shift_BNL: Tensor, delta_BNL: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    groups, shared = call.k_BNSH.shape[1], call.v_BNSH is call.k_BNSH
    call = call.with_repeated_heads()
    dq, first = [], 0
    dk, dv = torch.zeros_like(call.k_BNSH), torch.zeros_like(call.v_BNSH)
    all_of_it = 1.0 - 4.0 * torch.finfo(dk.dtype).eps
    for rows in _row_blocks(call):
        here = slice(first, first + rows.q_BNLH.shape[2])
        first = here.stop
        grad, total = grad_BNLW[:, :, here], total_BNL[:, :, here, None]
        a, slope, _ = _weights(rows, shift_BNL[:, :, here, None])
        w = a / total
        dv += w.transpose(-1, -2) @ grad
        dz = slope / total * (grad @ rows.v_BNSH.transpose(-1, -2) - delta_BNL[:, :, here, None])
        # A key with all the weight: of the two terms only their rounding is left, which a steep slope would magnify.
        dz = dz.masked_fill(w >= all_of_it, 0.0) * rows.scale
        dq.append(dz @ rows.k_BNSH)
        dk += dz.transpose(-1, -2) @ rows.q_BNLH
    if groups != dk.shape[1]:
        dk, dv = (x.unflatten(1, (groups, -1)).sum(dim=2) for x in (dk, dv))
    return torch.cat(dq, dim=2), dk + dv if shared else dk, None if shared else dv


def _row_blocks(call: Call) -> Iterator[Call]:
    """The call of some queries after the other."""
    (B, N, L, _), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    rows = max(1, BLOCK // max(1, B * N * S))
    for l0 in range(0, L, rows):
        mask = call.mask_BNLS
        yield replace(
            call,
            q_BNLH=call.q_BNLH[:, :, l0 : l0 + rows],
            mask_BNLS=mask if mask is None or mask.shape[2] == 1 else mask[:, :, l0 : l0 + rows],
            offset=call.offset + l0 if call.causal else 0,
        )


def _weights(call: Call, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Un-normalised weights (B, N, L, S), their derivative by the score, and the shift (B, N, L, 1)."""
    z = (call.q_BNLH * call.scale) @ call.k_BNSH.transpose(-1, -2)
    bias, hide = bias_and_hidden(call, z.dtype) if call.restricted else (None, None)
    if call.score == "softmax":
        x = z if bias is None else z + bias
        x = x if hide is None else x.masked_fill(hide, -math.inf)
        shift = x.amax(dim=-1, keepdim=True) if shift is None else shift
        a = (x - shift.masked_fill(shift == -math.inf, 0.0)).exp()
        return a, a, shift
    z = z if hide is None else z.masked_fill(hide, 0.0)
    far = z.abs() > 1.0
    square = z.masked_fill(far, 0.0).square()
    a = torch.where(far, 1.0 / (1.0 + z.masked_fill(~far, 1.0).pow(-2.0)), square / (1.0 + square))
    # 2 z / (1 + z^2)^2, by a / z, which neither overflows nor loses digits.
    slope = torch.where(z == 0.0, 0.0, 2.0 * a / z.masked_fill(z == 0.0, 1.0)) * (1.0 - a)
    if bias is None:
        return a, slope, torch.zeros_like(z[..., :1]) if shift is None else shift
    visible = bias.expand(z.shape) if hide is None else bias.masked_fill(hide, -math.inf).expand(z.shape)
    shift = visible.amax(dim=-1, keepdim=True) if shift is None else shift
    factor = (visible - shift.masked_fill(shift == -math.inf, 0.0)).exp()
    return a * factor, slope * factor, shift
