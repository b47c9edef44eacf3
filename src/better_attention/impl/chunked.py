"""Scores in plain torch, tile by tile: extra memory is one tile, never L x S, in both directions.

A tile holds every key of a few queries of a few heads, so a row is normalised at once and no running maximum
is needed. The backward pass computes the tiles again, and draws again what dropout drops: both directions visit the
tiles in one order, with a generator that starts from the call's seed. It is an operator, because torch.compile and
torch.export would unroll a Python loop over tiles for one length. What a score does with a tile is in ``scores/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from better_attention import operators
from better_attention.call.call import Call, additive, band, compute_dtype
from better_attention.call.torch_private import transformed
from better_attention.call.torch_state import operator_obstacles
from better_attention.dropout import follows_samples
from better_attention.scores import SCORES, Tiles

from .arguments import NO_DROPOUT, NOT_BY_SAMPLE, Arguments, flops

TILE = 1 << 19
"""Elements of one tile: 2 MiB of float32, a few of which fit a desktop processor's cache."""


def unsupported(call: Call) -> list[str]:
    """Why tiles cannot compute this call."""
    reasons = []
    if SCORES[call.score].tiles is None:
        reasons.append(f"the score {call.score!r} has no tiled form")
    if call.need_weights:
        reasons.append("it never holds all the weights, so it cannot return them")
    if call.dropout_p > 0.0 and transformed():
        reasons.append(NO_DROPOUT)
    if call.dropout_p > 0.0 and follows_samples():
        reasons.append(NOT_BY_SAMPLE)
    return reasons + operator_obstacles(call.tensors)


def compute(call: Call) -> tuple[Tensor, None]:
    """Head outputs (B, N, L, H)."""
    # Repeated outside the operator, so that autograd adds up the gradients of the heads of a group.
    return _operator(Arguments.of(call.with_repeated_heads())), None


# --- tiles ---------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A part of (B, N, L, S): queries of some heads of some samples, and the keys that they may see."""

    batch: slice
    heads: slice
    rows: slice
    columns: slice

    @property
    def queries(self) -> tuple[slice, ...]:
        """Where it lies in (B, N, L, ...)."""
        return self.batch, self.heads, self.rows

    @property
    def keys(self) -> tuple[slice, ...]:
        """Where it lies in (B, N, S, ...)."""
        return self.batch, self.heads, self.columns


def _cover(a: Arguments) -> Iterator[_Tile]:
    """Cover (B, N, L) in tiles of about ``TILE`` weights; under the triangle a tile has only the keys it may see.

    A tile that may see none is left out: its results are zero.
    """
    (B, N, L, _), S = a.q.shape, a.k.shape[2]
    # Rows come first, 128 at least even where that exceeds TILE; then as many heads, then samples, as fit. With a
    # window no more rows than it is wide, because a tile's keys are those of all its rows.
    rows = max(1, min(L, max(128, TILE // max(1, N * S)), L if a.window is None else max(128, a.window)))
    span = S if a.window is None else min(S, rows + a.window)
    heads = max(1, min(N, TILE // max(1, rows * span)))
    batch = max(1, min(B, TILE // max(1, rows * span * N))) if heads == N else 1
    for l0 in range(0, L, rows):
        l1 = min(L, l0 + rows)
        # No query of these rows sees a key from l1 on, which saves about half of the work.
        last = min(S, l1 + a.offset) if a.causal else S
        first = 0 if a.window is None else min(last, max(0, l0 + a.offset - a.window + 1))
        if first == last:
            continue
        columns = slice(first, last)
        for b0 in range(0, B, batch):
            for n0 in range(0, N, heads):
                yield _Tile(slice(b0, min(B, b0 + batch)), slice(n0, min(N, n0 + heads)), slice(l0, l1), columns)


def _cut(mask: Tensor, tile: _Tile) -> Tensor:
    """The part of a broadcastable mask that a tile needs, still broadcastable."""
    return mask[tuple(part if size > 1 else slice(None) for part, size in zip(tile, mask.shape, strict=True))]


def _restrictions(a: Arguments, tile: _Tile, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What hides keys in this tile, and what is added to their log weights, in the dtype of ``like``."""
    hide: Tensor | None = None
    bias: Tensor | None = None
    for mask in (a.mask, a.padding):
        if mask is None:
            continue
        cut = _cut(mask, tile)
        here = SCORES[a.score].hides(cut)
        hide = here if hide is None else hide | here
        if cut.dtype != torch.bool:
            finite = additive(cut.masked_fill(here, 0.0), like.dtype)
            bias = finite if bias is None else bias + finite
    if a.causal:
        places = torch.arange(tile.rows.start, tile.rows.stop, device=like.device) + a.offset
        keys = torch.arange(tile.columns.start, tile.columns.stop, device=like.device)
        outside = ~band(places, keys, a.window)
        hide = outside if hide is None else hide | outside
    return hide, bias


class _Dropout:
    """Draws the factors 0 and 1/(1-p) of a call's weights, tile after tile, the same in both directions."""

    def __init__(self, seed: Tensor | None, p: float, device: torch.device) -> None:
        self.keep = 1.0 - p
        # bernoulli_ demands a generator on the device of its tensor, so the seed is what crosses devices.
        self.generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))

    def next(self, like: Tensor) -> Tensor | None:
        """The factors of the next tile; None without dropout. With p = 1 all are 0, not NaN."""
        if self.generator is None:
            return None
        # The draws depend on the order and the shapes of the tiles, so both directions have to follow _cover().
        kept = torch.empty_like(like).bernoulli_(self.keep, generator=self.generator)
        return kept.div_(self.keep) if self.keep > 0.0 else kept


def _tiles_of(score: str) -> type[Tiles]:
    tiles = SCORES[score].tiles
    assert tiles is not None  # noqa: S101 - unsupported() refuses the others, for the type checker
    return tiles


# --- both directions -------------------------------------------------------------------------------------------------


def _forward(a: Arguments) -> Tensor:
    """Head outputs (B, N, L, W)."""
    (B, N, L, _), S, v = a.q.shape, a.k.shape[2], a.values
    dtype = compute_dtype(a.q.dtype)
    # Contiguous once: views of (B, L, N H) are the normal case, and every tile would copy its part again.
    q_BNLH, k_BNSH, v_BNSH = (x.to(dtype).contiguous() for x in (a.q.to(dtype) * a.scale, a.k, v))
    # Zeros, because without keys they are the answer, as for a query from which every key is hidden.
    heads = a.q.new_zeros(B, N, L, v.shape[-1])
    if S == 0:
        return heads
    dropout = _Dropout(a.seed, a.dropout_p, a.q.device)
    tiles = _tiles_of(a.score)(q_BNLH, k_BNSH)
    for tile in _cover(a):
        hide, bias = _restrictions(a, tile, q_BNLH)
        weights, total = tiles.weights(tile.queries, tile.keys, bias, hide)
        kept = dropout.next(weights)
        # The division by the total comes after this product: it then concerns W numbers per row instead of S.
        weighted = (weights if kept is None else weights * kept) @ v_BNSH[tile.keys]
        heads[tile.queries] = (weighted if total is None else weighted / total).to(a.q.dtype)
    return heads


def _backward(grad: Tensor, a: Arguments, mask_wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """Gradients of q, k, v and of the two masks; where k serves as v, of both in the second one."""
    S, v = a.k.shape[2], a.values
    dtype = compute_dtype(a.q.dtype)
    mask_grads = [
        torch.zeros_like(m, dtype=dtype) if m is not None and wish else None
        for m, wish in zip((a.mask, a.padding), mask_wanted, strict=True)
    ]
    q_BNLH, k_BNSH, v_BNSH, g_BNLH = (x.to(dtype).contiguous() for x in (a.q.to(dtype) * a.scale, a.k, v, grad))
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (a.q, a.k, v))
    dropout = _Dropout(a.seed, a.dropout_p, a.q.device)
    tiles = _tiles_of(a.score)(q_BNLH, k_BNSH)
    for tile in _cover(a) if S else ():
        hide, bias = _restrictions(a, tile, q_BNLH)
        weights, slope = tiles.slopes(tile.queries, tile.keys, bias, hide)
        kept = dropout.next(weights)
        dv[tile.keys] += (weights if kept is None else weights * kept).transpose(-1, -2) @ g_BNLH[tile.queries]
        dw = g_BNLH[tile.queries] @ v_BNSH[tile.keys].transpose(-1, -2)
        if kept is not None:
            dw.mul_(kept)
        # The derivative of the normaliser. It has to use the same rounded weights as dv, so that the two terms cancel
        # exactly where one key has all the weight.
        dw.sub_((dw * weights).sum(dim=-1, keepdim=True))
        for gradient in mask_grads:
            if gradient is not None:
                # A view, so that the addition below reaches the whole gradient.
                part = _cut(gradient, tile)
                # A mask is added to log weights, whose gradient is w * dw. The slope comes next, for scores alone.
                part += (dw * weights).sum_to_size(part.shape)
        dz = dw.mul_(slope)
        # Assigned, because a tile holds every key of its queries. Keys and values collect from many tiles.
        dq[tile.queries] = dz @ tiles.k[tile.keys]
        dk[tile.keys] += dz.transpose(-1, -2) @ tiles.q[tile.queries]
    dq, dk = tiles.gradients(dq, dk)
    if a.v is None:
        # The key was the value too, so it gets both gradients.
        dk = dk + dv
    gradients = [dq.mul_(a.scale), dk, dv, *mask_grads]
    inputs = (a.q, a.k, v, a.mask, a.padding)
    return [g if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]


# --- the operator -----------------------------------------------------------------------------------------------------


class _Chunked(operators.Definition[Arguments]):
    """Result: head outputs (B, N, L, W)."""

    name = "chunked"
    arguments = Arguments
    differentiable = ("q", "k", "v", "mask", "padding")
    batched = True
    refuses_second = "impl='chunked' has a first derivative only: pass impl='reference' for higher ones."
    refuses_batched_dropout = (
        "impl='chunked' has no dropout with is_grads_batched=True: pass impl='reference' for that."
    )

    def forward(self, a: Arguments) -> tuple[Tensor]:
        return (_forward(a),)

    def fake(self, a: Arguments) -> tuple[Tensor]:
        return (a.q.new_empty(*a.q.shape[:3], a.values.shape[-1]),)

    def backward(
        self, grad: Tensor, a: Arguments, results: operators.Tensors, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return _backward(grad, a, wanted[3:])

    def flops(self, *shapes: Any) -> int:
        return flops(*shapes[:3])


_operator = operators.register(_Chunked())
