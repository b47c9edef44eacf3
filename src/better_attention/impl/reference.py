"""The formulas of the papers, line by line: any feature, any order of derivative, L x S memory.

Every other implementation is held to this one, and this one to a NumPy oracle that shares no code with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from better_attention.call.call import Call, additive, hidden, island, triangle, unit


def unsupported(call: Call) -> list[str]:
    """The reference computes every call."""
    return []


def compute(call: Call) -> tuple[Tensor, Tensor]:
    """Head outputs (B, N, L, H) and weights (B, N, L, S), the weights after dropout as torch returns them."""
    call = call.with_repeated_heads()
    dtype = island(call.q_BNLH.dtype)
    q_BNLH, k_BNSH, v_BNSH = call.q_BNLH, call.k_BNSH, call.v_BNSH
    if dtype != q_BNLH.dtype:
        q_BNLH, k_BNSH, v_BNSH = q_BNLH.to(dtype), k_BNSH.to(dtype), v_BNSH.to(dtype)

    bias, hide = _bias_and_hidden(call, dtype) if call.restricted else (None, None)
    score = _softmax if call.score == "softmax" else _expressive
    weights_BNLS = score(q_BNLH * call.scale, k_BNSH, bias, hide)
    if call.dropout_p > 0.0:
        weights_BNLS = F.dropout(weights_BNLS, call.dropout_p)
    heads_BNLH = weights_BNLS @ v_BNSH

    if dtype != call.q_BNLH.dtype:
        heads_BNLH, weights_BNLS = heads_BNLH.to(call.q_BNLH.dtype), weights_BNLS.to(call.q_BNLH.dtype)
    return heads_BNLH, weights_BNLS


def _bias_and_hidden(call: Call, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The float masks summed (0 where hidden, so that nothing infinite is left), and what is hidden."""
    bias: Tensor | None = None
    hide: Tensor | None = None
    for mask in call.masks:
        here = hidden(mask, call.score)
        hide = here if hide is None else hide | here
        if mask.dtype != torch.bool:
            finite = additive(mask.masked_fill(here, 0.0), dtype)
            bias = finite if bias is None else bias + finite
    if call.causal:
        later = ~triangle(torch.arange(call.q_BNLH.shape[2], device=call.q_BNLH.device), call.k_BNSH.shape[2])
        hide = later if hide is None else hide | later
    return bias, hide


def _softmax(q_BNLH: Tensor, k_BNSH: Tensor, bias: Tensor | None, hide: Tensor | None) -> Tensor:
    """exp(z + bias) / sum over keys; a row with every key hidden is zero, where torch.softmax gives NaN."""
    z_BNLS = q_BNLH @ k_BNSH.transpose(-1, -2)  # Q W_Q (K W_K)^T / sqrt(d_k): 2403.01643 eq. 3
    if bias is not None:
        z_BNLS = z_BNLS + bias
    if hide is None:
        return torch.softmax(z_BNLS, dim=-1)
    z_BNLS = z_BNLS.masked_fill(hide, -math.inf)
    # Written on z, not on the mask: it has the broadcast shape, and sums of finite biases can reach -inf too.
    nothing = (z_BNLS == -math.inf).all(dim=-1, keepdim=True)
    return torch.softmax(z_BNLS.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)


def _expressive(q_BNLH: Tensor, k_BNSH: Tensor, bias: Tensor | None, hide: Tensor | None) -> Tensor:
    """a exp(bias) / sum over keys with a = z^2 / (1 + z^2) (2407.18601); a row without weight is zero."""
    unit_q, unit_k = unit(q_BNLH, (-1,)), unit(k_BNSH, (-2, -1))
    z_BNLS = (q_BNLH / unit_q) @ (k_BNSH / unit_k).transpose(-1, -2)
    if hide is not None:
        z_BNLS = z_BNLS.masked_fill(hide, 0.0)  # z = 0 is weight 0
    factor, one = _measure(z_BNLS.detach(), unit_q * unit_k)
    z_BNLS = z_BNLS * factor
    # Two ways to write a, so that neither it nor its derivative overflows or loses digits.
    near = z_BNLS.abs() <= 1.0
    square = z_BNLS.masked_fill(~near, 0.0).square()
    a_BNLS = torch.where(near, square / (1.0 + one * square), 1.0 / (1.0 + z_BNLS.masked_fill(near, 1.0).pow(-2.0)))
    if bias is not None:
        a_BNLS = _with_bias(a_BNLS, bias, hide)
    # Divided by its total taken as a constant first: the normaliser cancels any constant, and where one key has all
    # the weight, a is now 1 and the two terms of its derivative cancel to the last bit.
    a_BNLS = a_BNLS / _total(a_BNLS.detach())
    return a_BNLS / _total(a_BNLS)


def _total(a_BNLS: Tensor) -> Tensor:
    """The sum over keys, 1 in a row without weight."""
    total_BNL1 = a_BNLS.sum(dim=-1, keepdim=True)
    return total_BNL1.masked_fill(total_BNL1 == 0.0, 1.0)


def _measure(z_BNLS: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, what turns scores in units into z, and 1.

    Where all of a row are so small that 1 + z^2 is 1 to the last bit, a = z^2, whose size the normaliser cancels: there
    the factor makes the largest of the row 1, and the second number, the share of z^2 in 1 + z^2, is 0.
    """
    if z_BNLS.shape[-1] == 0:
        return unit, torch.ones_like(unit)
    largest_BNL1 = z_BNLS.abs().amax(dim=-1, keepdim=True)
    small = (largest_BNL1 > 0.0) & (largest_BNL1 * unit < torch.finfo(z_BNLS.dtype).eps)
    return torch.where(small, 1.0 / largest_BNL1, unit), 1.0 - small.to(z_BNLS.dtype)


def _with_bias(a_BNLS: Tensor, bias: Tensor, hide: Tensor | None) -> Tensor:
    """a exp(bias - c), c per row the largest log a + bias that is visible, so that no factor overflows."""
    tiny = torch.finfo(a_BNLS.dtype).tiny
    a_BNLS = a_BNLS.masked_fill(a_BNLS < tiny, 0.0)  # denormal weights would need factors beyond the dtype
    if a_BNLS.shape[-1] == 0:
        return a_BNLS
    log_weight = a_BNLS.detach().log() + bias.detach()
    if hide is not None:
        log_weight = log_weight.masked_fill(hide, -math.inf)
    largest_BNL1 = log_weight.amax(dim=-1, keepdim=True)
    largest_BNL1 = largest_BNL1.masked_fill(largest_BNL1 == -math.inf, 0.0)  # a row without weight
    # Where a is 0 the exponent may be anything; elsewhere it is at most -log(a), which this bound admits.
    return a_BNLS * (bias - largest_BNL1).clamp(max=-math.log(tiny)).exp()
