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

from better_attention.call.call import (
    NO_DROPOUT,
    Call,
    additive,
    dropout_seed,
    flops,
    fold_batch,
    hidden,
    island,
    one_by_one,
    triangle,
    unit,
)
from better_attention.call.torch_state import legacy_batched, operator_obstacles, transformed

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
    return run(*tensors, call.causal, call.score, call.scale, call.dropout_p), None


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


def _softmax(z: Tensor, hide: Tensor | None, bias: Tensor | None) -> Tensor:
    """Normalised weights; 0 in a row with every key hidden."""
    if bias is not None:
        z += bias
    if hide is None:
        return torch.softmax(z, dim=-1)
    z.masked_fill_(hide, -math.inf)
    nothing = z.amax(dim=-1, keepdim=True) == -math.inf  # sums of finite biases can reach it too
    return torch.softmax(z, dim=-1).masked_fill_(nothing, 0.0)


def _plain_expressive(z: Tensor, hide: Tensor | None) -> Tensor:
    """z**2 / (1 + z**2) in z's memory, as 1 / (1 + z**-2): three passes, and neither 0 nor infinity needs care."""
    if hide is not None:
        z.masked_fill_(hide, 0.0)
    return z.pow_(-2.0).add_(1.0).reciprocal_()


def _expressive(z: Tensor, units: Tensor, hide: Tensor | None, bias: Tensor | None, *, derive: bool = False) -> Tensor:
    """Weights before division by their sum, from scores in ``units``; these become the derivative, if it is wanted.

    Where all scores of a row are so small that 1 + z**2 is 1 to the last bit, the weight is z**2, whose size the
    normaliser cancels: such rows are measured in their largest.
    """
    limits = torch.finfo(z.dtype)
    if hide is not None:
        z.masked_fill_(hide, 0.0)  # z = 0 is weight 0
    largest = torch.linalg.vector_norm(z, math.inf, dim=-1, keepdim=True)
    small = (largest > 0.0) & (largest * units < limits.eps)
    factor = torch.where(small, 1.0 / largest, units)
    if bool((factor != 1.0).any()):
        z *= factor
    far = limits.max**0.48  # beyond, a is 1 and its derivative 0, to the last bit; z**2 is still finite
    if bool((largest * factor > far).any()):
        z.clamp_(-far, far)
    square = z.square()
    inverse = ((square * ~small) if bool(small.any()) else square).add(1.0).reciprocal_()
    a = square.mul_(inverse)
    if derive:
        z.mul_(inverse).mul_(inverse).mul_(2.0 * factor)
    if bias is not None:
        faint = a < limits.tiny
        a.masked_fill_(faint, 0.0)
        shift = (a.log() + bias).amax(dim=-1, keepdim=True)
        shift.masked_fill_(shift == -math.inf, 0.0)
        # Where the weight is 0 the exponent may be anything, so it is bounded.
        grown = (bias - shift).clamp_(max=-math.log(limits.tiny)).exp_()
        a.mul_(grown)
        if derive:
            z.mul_(grown).masked_fill_(faint, 0.0)
    return a


def _total(a: Tensor) -> Tensor:
    """The sum over keys, infinity in a row without weight."""
    total = a.sum(dim=-1, keepdim=True)
    return total.masked_fill_(total == 0.0, math.inf)


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
) -> Tensor:
    """Head outputs (B, N, L, H)."""
    (B, N, L, _), S = q.shape, k.shape[2]
    dtype = island(q.dtype)
    masks = [m for m in (mask, padding) if m is not None]
    # Contiguous once: views of (B, L, N H) are the normal case, and every tile would copy its part again.
    q_BNLH, k_BNSH, v_BNSH = (x.to(dtype).contiguous() for x in (q.to(dtype) * scale, k, v))
    heads = q.new_zeros(B, N, L, v.shape[-1])
    if S == 0:
        return heads
    dropout = _Dropout(seed, dropout_p, q.device)
    unit_q, unit_k = unit(q_BNLH, (-1,)), unit(k_BNSH, (-2, -1))
    faint = torch.finfo(dtype).tiny ** 0.63  # below it a row of squares has lost digits to underflow
    for tile in _tiles(B, N, L, S, causal):
        at, keys = (tile.batch, tile.heads, tile.rows), (tile.batch, tile.heads, tile.keys)
        z = q_BNLH[at] @ k_BNSH[keys].transpose(-1, -2)
        hide, bias = _restrictions(masks, causal, score, tile, z)
        total: Tensor | None = None
        if score == "softmax":
            a = _softmax(z, hide, bias)
        else:
            if bias is None:
                a = _plain_expressive(z, hide)
                total = _total(a)
            if total is None or bool(((total < faint) | (total == math.inf)).any()):
                units = unit_q[at], unit_k[at[:2]]
                z = (q_BNLH[at] / units[0]) @ (k_BNSH[keys] / units[1]).transpose(-1, -2)
                a = _expressive(z, units[0] * units[1], hide, bias)
                total = _total(a)
        kept = dropout.next(a)
        weighted = (a if kept is None else a * kept) @ v_BNSH[keys]
        heads[at] = (weighted if total is None else weighted / total).to(q.dtype)
    return heads


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
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.custom_op("better_attention::chunked_backward", mutates_args=())
def _backward(
    grad: Tensor,
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
    unit_q, unit_k = unit(q_BNLH, (-1,)), unit(k_BNSH, (-2, -1))
    if score == "expressive":
        q_BNLH, k_BNSH = q_BNLH / unit_q, k_BNSH / unit_k
    dropout = _Dropout(seed, dropout_p, q.device)
    for tile in _tiles(B, N, L, S, causal) if S else ():
        at, keys = (tile.batch, tile.heads, tile.rows), (tile.batch, tile.heads, tile.keys)
        z = q_BNLH[at] @ k_BNSH[keys].transpose(-1, -2)
        hide, bias = _restrictions(masks, causal, score, tile, z)
        if score == "softmax":
            weights = slope = _softmax(z, hide, bias)
        else:
            weights = _expressive(z, unit_q[at] * unit_k[at[:2]], hide, bias, derive=True)
            total = _total(weights)
            weights, slope = weights.div_(total), z.div_(total)
        kept = dropout.next(weights)
        dv[keys] += (weights if kept is None else weights * kept).transpose(-1, -2) @ g_BNLH[at]
        dw = g_BNLH[at] @ v_BNSH[keys].transpose(-1, -2)
        if kept is not None:
            dw.mul_(kept)
        # The normaliser's share. From these very weights: where one key has all of it, nothing is left of the two.
        dw.sub_((dw * weights).sum(dim=-1, keepdim=True))
        for gradient in wanted:
            if gradient is not None:
                part = _cut(gradient, tile)
                part += (dw * weights).sum_to_size(part.shape)
        dz = dw.mul_(slope)
        dq[at] = dz @ k_BNSH[keys]
        dk[keys] += dz.transpose(-1, -2) @ q_BNLH[at]
    if score == "expressive":
        dq, dk = dq / unit_q, dk / unit_k
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
    ctx.save_for_backward(q, k, v, mask, padding, seed)
    ctx.settings = (*settings, [bool(ctx.needs_input_grad[3]), bool(ctx.needs_input_grad[4])])


def _derive(ctx, grad):  # type: ignore[no-untyped-def]
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
    heads = torch.ops.better_attention.chunked(*fold_batch(info, in_dims[:5], args[:5], batch), *args[5:])
    return heads.unflatten(0, (info.batch_size, batch)), 0


def _vmap_backward(info, in_dims, *args):  # type: ignore[no-untyped-def]
    if args[6] is not None:
        return one_by_one(info, in_dims, args, torch.ops.better_attention.chunked_backward)
    tensors, settings = args[:6], args[6:]
    batch = tensors[1].shape[0 if in_dims[1] is None or in_dims[1] > 0 else 1]
    folded = fold_batch(info, in_dims[:6], tensors, batch)
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
