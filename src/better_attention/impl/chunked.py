"""Both scores in plain torch, tile by tile: extra memory is one tile, never L x S, in both directions.

A tile holds every key of a few queries of a few heads, so a row is normalised at once and no running maximum
is needed. The backward pass computes the tiles again, and draws again what dropout drops: both directions visit the
tiles in one order, with a generator that starts from the call's seed. Registered as a custom operator, so that
torch.compile and torch.export keep it as one node at any length (a Python loop over tiles would be unrolled for one
length).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from better_attention.torch_state import legacy_batched, operator_obstacles, transformed

from .call import NO_DROPOUT, Call, additive, dropout_seed, flops, fold_batch, hidden, island, one_by_one, triangle

TILE = 1 << 19
"""Elements of one tile: 2 MiB of float32, a few of which fit a desktop processor's cache."""


def unsupported(call: Call) -> list[str]:
    """Why tiles cannot serve this call."""
    reasons = []
    if call.need_weights:
        reasons.append("it never holds all the weights, so it cannot return them")
    if call.dropout_p > 0.0 and transformed():
        reasons.append(NO_DROPOUT)
    return reasons + operator_obstacles(call.tensors)


def compute(call: Call) -> tuple[Tensor, None]:
    """Head outputs (B, N, L, H)."""
    call = call.with_repeated_heads()
    # A custom operator's own autograd does not know torch.func, an autograd.Function does not stay one graph node.
    run = torch.ops.better_attention.chunked if torch.compiler.is_compiling() else _Chunked.apply
    tensors = (call.q_BNLH, call.k_BNSH, call.v_BNSH, call.mask_BNLS, call.padding_B11S, dropout_seed(call))
    heads_BNLH, *_ = run(*tensors, call.causal, call.score, call.scale, call.dropout_p)
    return heads_BNLH, None


# --- tiles ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tile:
    batch: slice
    heads: slice
    rows: slice
    keys: slice


def _tiles(B: int, N: int, L: int, S: int, causal: bool) -> Iterator[_Tile]:
    """Cover (B, N, L) in tiles of about ``TILE`` weights; under the triangle a tile stops at its last visible key."""
    rows = max(1, min(L, max(128, TILE // max(1, N * S))))
    heads = max(1, min(N, TILE // max(1, rows * S)))
    batch = max(1, min(B, TILE // max(1, rows * S * N))) if heads == N else 1
    for l0 in range(0, L, rows):
        l1 = min(L, l0 + rows)
        keys = slice(0, min(S, l1) if causal else S)
        for b0 in range(0, B, batch):
            for n0 in range(0, N, heads):
                yield _Tile(slice(b0, min(B, b0 + batch)), slice(n0, min(N, n0 + heads)), slice(l0, l1), keys)


def _cut(mask: Tensor, tile: _Tile) -> Tensor:
    """The part of a broadcastable mask that a tile needs, still broadcastable."""
    parts = (tile.batch, tile.heads, tile.rows, tile.keys)
    return mask[tuple(part if size > 1 else slice(None) for part, size in zip(parts, mask.shape, strict=True))]


def _restrictions(
    masks: list[Tensor], causal: bool, score: str, tile: _Tile, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What hides keys in this tile and what is added to their log weights."""
    hide: Tensor | None = None
    bias: Tensor | None = None
    for mask in masks:
        cut = _cut(mask, tile)
        here = hidden(cut, score)
        hide = here if hide is None else hide | here
        if cut.dtype != torch.bool:
            finite = additive(cut.masked_fill(here, 0.0), like.dtype)
            bias = finite if bias is None else bias + finite
    if causal:
        later = ~triangle(torch.arange(tile.rows.start, tile.rows.stop, device=like.device), tile.keys.stop)
        hide = later if hide is None else hide | later
    return hide, bias


class _Dropout:
    """The factors 0 and 1/(1-p) of a call's weights, tile after tile."""

    def __init__(self, seed: Tensor | None, p: float, device: torch.device) -> None:
        self.keep = 1.0 - p
        self.generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))

    def next(self, like: Tensor) -> Tensor | None:
        """Those of the next tile, None without dropout; all 0 where everything is dropped."""
        if self.generator is None:
            return None
        kept = torch.empty_like(like).bernoulli_(self.keep, generator=self.generator)
        return kept.div_(self.keep) if self.keep > 0.0 else kept


# --- scores on a tile: weights, and their derivative towards z -------------------------------------------------


def _expressive(z: Tensor, hide: Tensor | None) -> Tensor:
    """z**2 / (1 + z**2) in z's memory, as 1 / (1 + z**-2): three passes, and neither 0 nor infinity needs care."""
    if hide is not None:
        z.masked_fill_(hide, 0.0)
    return z.pow_(-2.0).add_(1.0).reciprocal_()


def _unnormalised(score: str, z: Tensor, hide: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights before division, and per row the constants taken out of their exponent (0) and of z (1 if none)."""
    if score == "softmax":
        if bias is not None:
            z += bias
        if hide is not None:
            z.masked_fill_(hide, -math.inf)
        shift = z.amax(dim=-1, keepdim=True)
        shift.masked_fill_(shift == -math.inf, 0.0)
        return z.sub_(shift).exp_(), shift, torch.ones_like(shift)
    if hide is not None:
        z.masked_fill_(hide, 0.0)  # z = 0 is weight 0
    # Rows of scores so small that z**2 would underflow are measured in their largest; the normaliser cancels it.
    unit = torch.linalg.vector_norm(z, math.inf, dim=-1, keepdim=True)
    unit.masked_fill_((unit == 0.0) | ~(unit <= 1e-8), 1.0)
    in_units = (z / unit).square_() if bool((unit != 1.0).any()) else None
    # 1 + z**2 loses nothing beyond `far`, and inf / inf cannot arise.
    far = 2.0**60 if z.dtype == torch.float64 else 2.0**30
    square = z.square_().clamp_(max=far)
    a = (square if in_units is None else in_units).div_(square + 1.0)
    if bias is None:
        return a, torch.zeros_like(unit), unit
    a.masked_fill_(a < torch.finfo(a.dtype).tiny, 0.0)
    shift = (a.log() + bias).amax(dim=-1, keepdim=True)
    shift.masked_fill_(shift == -math.inf, 0.0)
    return a.mul_(_factor(bias, shift)), shift, unit


def _factor(bias: Tensor, shift: Tensor) -> Tensor:
    """exp(bias - shift); where the weight is zero the exponent may be anything, so it is bounded."""
    return (bias - shift).clamp_(max=-math.log(torch.finfo(bias.dtype).tiny)).exp_()


def _weights_and_slope(
    score: str, z: Tensor, hide: Tensor | None, bias: Tensor | None, total: Tensor, shift: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalised weights w, and s with dw_k/dz_k = s_k before the normaliser's own share: s = w for softmax."""
    if score == "softmax":
        if bias is not None:
            z += bias
        if hide is not None:
            z.masked_fill_(hide, -math.inf)
        weights = z.sub_(shift).exp_().div_(total)
        return weights, weights
    if hide is not None:
        z.masked_fill_(hide, 0.0)
    far = 2.0**30
    beyond = z.abs() >= far if bool(torch.linalg.vector_norm(z, math.inf) >= far) else None
    z.clamp_(-far, far)
    inverse = (z.square() + 1.0).reciprocal_()
    factor = 1.0 / total
    if bias is not None:
        factor = _factor(bias, shift) * factor
    z /= unit
    slope = (z * inverse).mul_(factor)  # z / (1 + z^2) * factor, z in units
    weights = slope * z  # z^2 / (1 + z^2) * factor
    if bias is not None:
        weights.masked_fill_(z.square() * inverse < torch.finfo(z.dtype).tiny, 0.0)
    if beyond is not None:  # the slope falls with z^-3: bounded, it is far too large for what it is multiplied by
        slope.masked_fill_(beyond, 0.0)
    return weights, slope.mul_(inverse).mul_(2.0 / unit)  # 2 z / (1 + z^2)^2 * factor


# --- the operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("better_attention::chunked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head outputs (B, N, L, H); per row the normaliser (inf if there is no weight) and the two constants."""
    (B, N, L, _), S = q.shape, k.shape[2]
    dtype = island(q.dtype)
    masks = [m for m in (mask, padding) if m is not None]
    # Contiguous once: views of (B, L, N H) are the normal case, and every tile would copy its part again.
    q_BNLH, k_BNSH, v_BNSH = (x.to(dtype).contiguous() for x in (q.to(dtype) * scale, k, v))
    heads = q.new_zeros(B, N, L, v.shape[-1])
    total = torch.full((B, N, L, 1), math.inf, dtype=dtype, device=q.device)
    shift = torch.zeros((B, N, L, 1), dtype=dtype, device=q.device)
    unit = torch.ones((B, N, L, 1), dtype=dtype, device=q.device)
    if S == 0:
        return heads, total, shift, unit
    dropout = _Dropout(seed, dropout_p, q.device)
    faint = torch.finfo(dtype).tiny ** 0.63  # below it a row of squares has lost digits to underflow
    for tile in _tiles(B, N, L, S, causal):
        at, keys = (tile.batch, tile.heads, tile.rows), (tile.batch, tile.heads, tile.keys)
        z = q_BNLH[at] @ k_BNSH[keys].transpose(-1, -2)
        hide, bias = _restrictions(masks, causal, score, tile, z)
        if score == "expressive" and bias is None:
            a = _expressive(z, hide)
            row = a.sum(dim=-1, keepdim=True)
            if bool((row < faint).any()):
                z = q_BNLH[at] @ k_BNSH[keys].transpose(-1, -2)
                a, _, unit[at] = _unnormalised(score, z, hide, bias)
                row = a.sum(dim=-1, keepdim=True)
        else:
            a, shift[at], unit[at] = _unnormalised(score, z, hide, bias)
            row = a.sum(dim=-1, keepdim=True)
        row.masked_fill_(row == 0.0, math.inf)
        kept = dropout.next(a)
        heads[at] = (((a if kept is None else a * kept) @ v_BNSH[keys]) / row).to(q.dtype)
        total[at] = row
    return heads, total, shift, unit


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, shift, unit = (q.new_empty((*q.shape[:3], 1), dtype=island(q.dtype)) for _ in range(3))
    return q.new_empty(*q.shape[:3], v.shape[-1]), total, shift, unit


@torch.library.custom_op("better_attention::chunked_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    heads: Tensor,
    total: Tensor,
    shift: Tensor,
    unit: Tensor,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
    mask_grads: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the two masks (empty where ``mask_grads`` says they are not wanted)."""
    (B, N, L, _), S = q.shape, k.shape[2]
    dtype = island(q.dtype)
    masks = [m for m in (mask, padding) if m is not None]
    wanted = [
        torch.zeros_like(m, dtype=dtype) if m is not None and wish else None
        for m, wish in zip((mask, padding), mask_grads, strict=True)
    ]
    q_BNLH, k_BNSH, v_BNSH, g_BNLH = (x.to(dtype).contiguous() for x in (q.to(dtype) * scale, k, v, grad))
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    delta = (g_BNLH * heads.to(dtype)).sum(dim=-1, keepdim=True)  # sum_k w_k dL/dw_k, the normaliser's share
    dropout = _Dropout(seed, dropout_p, q.device)
    for tile in _tiles(B, N, L, S, causal) if S else ():
        at, keys = (tile.batch, tile.heads, tile.rows), (tile.batch, tile.heads, tile.keys)
        z = q_BNLH[at] @ k_BNSH[keys].transpose(-1, -2)
        hide, bias = _restrictions(masks, causal, score, tile, z)
        weights, slope = _weights_and_slope(score, z, hide, bias, total[at], shift[at], unit[at])
        kept = dropout.next(weights)
        dv[keys] += (weights if kept is None else weights * kept).transpose(-1, -2) @ g_BNLH[at]
        dw = g_BNLH[at] @ v_BNSH[keys].transpose(-1, -2)
        dw = (dw if kept is None else dw.mul_(kept)).sub_(delta[at])
        for gradient in wanted:
            if gradient is not None:
                part = _cut(gradient, tile)
                part += (dw * weights).sum_to_size(part.shape)
        dz = dw.mul_(slope)
        dq[at] = dz @ k_BNSH[keys]
        dk[keys] += dz.transpose(-1, -2) @ q_BNLH[at]
    dmask, dpadding = (
        q.new_zeros(0) if m is None or g is None else g.to(m.dtype)
        for g, m in zip(wanted, (mask, padding), strict=True)
    )
    return dq.mul_(scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask, dpadding


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    heads: Tensor,
    total: Tensor,
    shift: Tensor,
    unit: Tensor,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
    mask_grads: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dmask, dpadding = (
        m.new_empty(m.shape) if m is not None and wish else q.new_empty(0)
        for m, wish in zip((mask, padding), mask_grads, strict=True)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dmask, dpadding


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, mask, padding, seed, *settings = inputs
    ctx.save_for_backward(q, k, v, mask, padding, *output, seed)
    ctx.settings = (*settings, [bool(ctx.needs_input_grad[3]), bool(ctx.needs_input_grad[4])])


def _derive(ctx, grad, *_constants):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: checkpointing gives them out no second time
    if saved[-1] is not None and legacy_batched(grad):
        raise ValueError("impl='chunked' has no dropout with is_grads_batched=True: pass impl='reference' for that.")
    run = torch.ops.better_attention.chunked_backward if torch.compiler.is_compiling() else _ChunkedBackward.apply
    gradients = run(grad, *saved, *ctx.settings)
    wished = ctx.settings[-1]
    return (*gradients[:3], *(g if wish else None for g, wish in zip(gradients[3:], wished, strict=True)), *(None,) * 5)


_forward.register_autograd(_derive, setup_context=_save)


class _Chunked(torch.autograd.Function):
    """The same operator and derivative for eager mode, where torch.func transforms go through it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        return torch.ops.better_attention.chunked(*args)

    setup_context = staticmethod(_save)
    backward = staticmethod(_derive)


class _ChunkedBackward(torch.autograd.Function):
    """The backward operator for torch.func, with an answer to those who want to differentiate it again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        return torch.ops.better_attention.chunked_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        return None

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise ValueError("impl='chunked' has a first derivative only: pass impl='reference' for higher ones.")


def _vmap_forward(info, in_dims, *args):  # type: ignore[no-untyped-def]
    if args[5] is not None:
        return one_by_one(info, in_dims, args, torch.ops.better_attention.chunked)
    batch = args[0].shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]
    outputs = torch.ops.better_attention.chunked(*fold_batch(info, in_dims[:5], args[:5], batch), *args[5:])
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in outputs), (0,) * 4


def _vmap_backward(info, in_dims, *args):  # type: ignore[no-untyped-def]
    if args[10] is not None:
        return one_by_one(info, in_dims, args, torch.ops.better_attention.chunked_backward)
    tensors, settings = args[:10], args[10:]
    batch = tensors[1].shape[0 if in_dims[1] is None or in_dims[1] > 0 else 1]
    folded = fold_batch(info, in_dims[:10], tensors, batch)
    *main, mask, padding = (
        x.unflatten(0, (info.batch_size, batch)) if x.dim() == 4 else x.expand(info.batch_size, 0)
        for x in torch.ops.better_attention.chunked_backward(*folded, *settings)
    )
    bias_grads = []
    for gradient, original, dim in zip((mask, padding), tensors[4:6], in_dims[4:6], strict=True):
        broadcast = original is not None and original.shape[0 if dim is None or dim > 0 else 1] != batch
        bias_grads.append(gradient.sum(1, keepdim=True) if broadcast and gradient.dim() == 5 else gradient)
    return (*main, *bias_grads), (0,) * 5


_forward.register_vmap(_vmap_forward)
_backward.register_vmap(_vmap_backward)


@register_flop_formula(torch.ops.better_attention.chunked)
def _forward_flops(q, k, v, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return flops(q, k, v)


@register_flop_formula(torch.ops.better_attention.chunked_backward)
def _backward_flops(grad, q, k, v, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * flops(q, k, v)
