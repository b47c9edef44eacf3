"""Scores in plain torch, tile by tile: extra memory is one tile, never L x S, in both directions.

A tile holds every key of a few queries of a few heads, so a row is normalised at once and no running maximum
is needed. The backward pass computes the tiles again, and draws again what dropout drops: both directions visit the
tiles in one order, with a generator that starts from the call's seed. Registered as a custom operator, so that
torch.compile and torch.export keep it as one node at any length (a Python loop over tiles would be unrolled for one
length).
"""

from __future__ import annotations

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
    island,
    one_by_one,
    triangle,
)
from better_attention.call.torch_state import legacy_batched, operator_obstacles, transformed
from better_attention.scores import SCORES, Tiles

TILE = 1 << 19
"""Elements of one tile: 2 MiB of float32, a few of which fit a desktop processor's cache."""


def unsupported(call: Call) -> list[str]:
    """Why tiles cannot serve this call."""
    reasons = []
    if SCORES[call.score].tiles is None:
        reasons.append(f"the score {call.score!r} has no tiled form")
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
        here = SCORES[score].hides(cut)
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


def _tiles_of(score: str) -> type[Tiles]:
    tiles = SCORES[score].tiles
    assert tiles is not None  # noqa: S101 - unsupported() refuses the others, for the type checker
    return tiles


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
    tiles = _tiles_of(score)(q_BNLH, k_BNSH)
    for tile in _tiles(B, N, L, S, causal):
        rows, keys = (tile.batch, tile.heads, tile.rows), (tile.batch, tile.heads, tile.keys)
        hide, bias = _restrictions(masks, causal, score, tile, q_BNLH)
        a, total = tiles.weights(rows, keys, bias, hide)
        kept = dropout.next(a)
        weighted = (a if kept is None else a * kept) @ v_BNSH[keys]
        heads[rows] = (weighted if total is None else weighted / total).to(q.dtype)
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
    dropout = _Dropout(seed, dropout_p, q.device)
    tiles = _tiles_of(score)(q_BNLH, k_BNSH)
    for tile in _tiles(B, N, L, S, causal) if S else ():
        rows, keys = (tile.batch, tile.heads, tile.rows), (tile.batch, tile.heads, tile.keys)
        hide, bias = _restrictions(masks, causal, score, tile, q_BNLH)
        weights, slope = tiles.slopes(rows, keys, bias, hide)
        kept = dropout.next(weights)
        dv[keys] += (weights if kept is None else weights * kept).transpose(-1, -2) @ g_BNLH[rows]
        dw = g_BNLH[rows] @ v_BNSH[keys].transpose(-1, -2)
        if kept is not None:
            dw.mul_(kept)
        # The normaliser's share. From these very weights: where one key has all of it, nothing is left of the two.
        dw.sub_((dw * weights).sum(dim=-1, keepdim=True))
        for gradient in wanted:
            if gradient is not None:
                part = _cut(gradient, tile)
                part += (dw * weights).sum_to_size(part.shape)
        dz = dw.mul_(slope)
        dq[rows] = dz @ tiles.k[keys]
        dk[keys] += dz.transpose(-1, -2) @ tiles.q[rows]
    dq, dk = tiles.gradients(dq, dk)
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
