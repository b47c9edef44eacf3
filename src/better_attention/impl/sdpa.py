"""PyTorch's own fused softmax attention, for calls that it computes without an L x S tensor of ours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from better_attention.call.call import Call, additive, band
from better_attention.call.torch_state import exporting_onnx_attention, with_tangents
from better_attention.dropout import follows_samples

from .arguments import NOT_BY_SAMPLE

SCORE = "softmax"
"""The only score of ``F.scaled_dot_product_attention``."""
MERGE_LIMIT = 1 << 16
"""Elements up to which padding, mask and triangle are merged into one mask for SDPA, which takes only one."""


def unsupported(call: Call) -> list[str]:
    """Why PyTorch's fused attention should not compute this call."""
    reasons, masks = [], call.masks
    if call.score != SCORE:
        reasons.append(f"it computes {SCORE} weights only, not {call.score!r}")
    if call.need_weights:
        reasons.append("it does not return weights")
    if (len(masks) + call.causal > 1 or call.banded) and _merged_elements(call) > MERGE_LIMIT:
        reasons.append("mask, padding, triangle and window would have to be merged into one (B, N, L, S) mask")
    if call.q_BNLH.dtype == torch.float16 and any(m.dtype not in (torch.bool, torch.float16) for m in masks):
        reasons.append("it takes masks in float16 only, which has no room for large biases")
    if masks and any(m.requires_grad for m in masks):
        reasons.append("it does not differentiate with respect to a mask on every device")
    if with_tangents(call.tensors):
        reasons.append("it has no forward-mode derivative")
    if call.dropout_p > 0.0 and follows_samples():
        reasons.append(NOT_BY_SAMPLE)
    return reasons


def compute(call: Call) -> tuple[Tensor, None]:
    """Head outputs (B, N, L, H)."""
    mask = _merge(call)
    q_BNLH, scale = call.q_BNLH, call.scale
    if scale <= 0.0:  # the fused kernel multiplies the triangle's -inf by it as well
        q_BNLH, scale = q_BNLH * scale, 1.0
    heads_BNLH = F.scaled_dot_product_attention(
        q_BNLH,
        call.k_BNSH,
        call.v_BNSH,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        # The triangle is part of the mask then: torch documents its flag and a mask as exclusive.
        is_causal=call.causal and mask is None,
        scale=scale,
        enable_gqa=bool(call.q_BNLH.shape[1] != call.k_BNSH.shape[1]),  # traced sizes compare to a tensor
    )
    return heads_BNLH, None


def _merged_elements(call: Call) -> int:
    if exporting_onnx_attention():
        return 0  # the operator is faster than the formula all the same, which merges them too
    if torch.compiler.is_compiling():
        return MERGE_LIMIT + 1  # a comparison of symbolic lengths would pin them
    (_, _, L, _), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    heads = max((m.shape[0] * m.shape[1] for m in call.masks), default=1)
    return heads * L * S


def _merge(call: Call) -> Tensor | None:
    """All masks as one, or None where SDPA's own flag is enough."""
    merged = _merged(call)
    if merged is not None and exporting_onnx_attention():
        # ONNX Runtime takes the operator's masks with every query and every sample, and spreads them over heads alone.
        return merged.expand(call.q_BNLH.shape[0], -1, call.q_BNLH.shape[2], call.k_BNSH.shape[2])
    return merged


def _merged(call: Call) -> Tensor | None:
    # A new list at each access: appending to it leaves the call as it is.
    parts = call.masks
    if call.causal and (parts or call.banded):
        (_, _, L, _), S, device = call.q_BNLH.shape, call.k_BNSH.shape[2], call.q_BNLH.device
        places = torch.arange(L, device=device) + call.offset
        parts.append(band(places, torch.arange(S, device=device), call.window)[None, None])
    if not parts:
        return None
    dtype = call.q_BNLH.dtype
    if all(m.dtype == torch.bool for m in parts):
        merged = parts[0]
        for m in parts[1:]:
            merged = merged & m
        return merged
    merged = _additive(parts[0], dtype)
    for m in parts[1:]:
        # -inf plus a finite bias stays -inf, so that what one mask hides stays hidden.
        merged = merged + _additive(m, dtype)
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return additive(mask, dtype)
