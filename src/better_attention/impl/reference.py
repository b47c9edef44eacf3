"""The formulas of the papers, line by line: any feature, any order of derivative, L x S memory.

The formulas themselves are ``weights`` in each file of ``scores/``. Every other implementation is tested against this
one, and this one against a NumPy oracle that shares no code with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from better_attention.call.call import Call, additive, band, compute_dtype
from better_attention.dropout import drawn_seed, follows_samples, keep
from better_attention.scores import SCORES


def unsupported(call: Call) -> list[str]:
    """The reference computes every call."""
    return []


def compute(call: Call) -> tuple[Tensor, Tensor]:
    """Head outputs (B, N, L, H) and weights (B, N, L, S), the weights after dropout as torch returns them."""
    call = call.with_repeated_heads()
    dtype = compute_dtype(call.q_BNLH.dtype)
    q_BNLH, k_BNSH, v_BNSH = call.q_BNLH, call.k_BNSH, call.v_BNSH
    if dtype != q_BNLH.dtype:
        q_BNLH, k_BNSH, v_BNSH = q_BNLH.to(dtype), k_BNSH.to(dtype), v_BNSH.to(dtype)

    bias, hide = bias_and_hidden(call, dtype) if call.restricted else (None, None)
    weights_BNLS = SCORES[call.score].weights(q_BNLH * call.scale, k_BNSH, bias, hide)
    if call.dropout_p > 0.0:
        weights_BNLS = _dropped(weights_BNLS, call.dropout_p)
    heads_BNLH = weights_BNLS @ v_BNSH

    if dtype != call.q_BNLH.dtype:
        heads_BNLH, weights_BNLS = heads_BNLH.to(call.q_BNLH.dtype), weights_BNLS.to(call.q_BNLH.dtype)
    return heads_BNLH, weights_BNLS


def _dropped(weights_BNLS: Tensor, p: float) -> Tensor:
    """Weights after dropout, which is 0 outside training."""
    if not follows_samples():
        return F.dropout(weights_BNLS, p)
    B, N, L, S = weights_BNLS.shape
    kept = keep(drawn_seed(), p, (B, N, L, S), weights_BNLS.device)
    return torch.where(kept, weights_BNLS * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def bias_and_hidden(call: Call, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The float masks summed (0 where hidden, so that nothing infinite is left), and what is hidden."""
    bias: Tensor | None = None
    hide: Tensor | None = None
    for mask in call.masks:
        here = SCORES[call.score].hides(mask)
        hide = here if hide is None else hide | here
        if mask.dtype != torch.bool:
            # Hidden places are 0 before the masks are added, because -inf in one and +inf in another would be NaN.
            finite = additive(mask.masked_fill(here, 0.0), dtype)
            bias = finite if bias is None else bias + finite
    if call.causal:
        L, S, device = call.q_BNLH.shape[2], call.k_BNSH.shape[2], call.q_BNLH.device
        places = torch.arange(L, device=device) + call.offset
        outside = ~band(places, torch.arange(S, device=device), call.window)
        hide = outside if hide is None else hide | outside
    return bias, hide
