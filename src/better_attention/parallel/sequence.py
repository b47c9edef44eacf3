"""Attention over a sequence whose keys and values lie in several processes, each of which has some of the tokens.

Every process computes Σ a v and Σ a over its own keys for all queries (:mod:`.partial`); one sum over processes and a
division give the result. There is no ring: nothing is rescaled on the way and no process waits for another one's block.
docs/scale.md compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from better_attention.call.call import Call, compute_dtype
from better_attention.call.function_arguments import prepare
from better_attention.call.torch_state import autocast_dtype
from better_attention.errors import check_bool, check_choice, describe
from better_attention.tensors import floating_tensor

from . import partial
from .agreement import agreed, backend_device, check_group
from .partial import FAINT, UNIT

# The second names are those before torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

QUERIES = ("sharded", "replicated")
LAYOUTS = ("contiguous", "zigzag")
SCORES = ("expressive", "softmax")


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    queries: str = "sharded",
    layout: str = "contiguous",
    score: str = "expressive",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    check: bool | None = None,
) -> Tensor:
    r"""Attention over a sequence that several processes hold together, each the keys and values of some tokens.

    With a the un-normalised weights of the keys that process r holds,

    .. math:: \mathrm{out}_l = \frac{\sum_r \sum_{s \in r} a_{ls} v_s}{\sum_r \sum_{s \in r} a_{ls}}

    For the expressive score :math:`a = z^2 / (1 + z^2) < 1`: both sums add, without a maximum that processes would have
    to agree on. Softmax, and float masks, take one exchange of maxima (B, N, L) before the sum.

    With queries divided like the keys, forward is an all-gather of q and a reduce-scatter of both sums; backward an
    all-gather of q, of the output's gradient and of two numbers a row, and a reduce-scatter of the gradient of q. With
    the same queries in every process each direction is one all-reduce. Gradients of keys and values never travel. The
    sums are in float32 (float64 for float64).

    Args:
        query: (..., N, L_r, H), this process's tokens; with ``queries="replicated"`` (..., N, L, H), all of them and
            the same in every process.
        key: (..., N, S_r, H), this process's tokens.
        value: (..., N, S_r, W). Passing ``key`` itself saves reading it twice.
        group: the processes, in the order of their tokens; None: all. Of a ``DeviceMesh`` pass ``mesh.get_group()``.
        queries: "sharded", each process has the queries of its keys' tokens and gets their output; or "replicated".
        layout: "contiguous", process r has the tokens behind those of process r - 1, of any number; or "zigzag",
            which shares the work of a causal mask evenly: of 2P equal pieces process r has number r and number
            2P - 1 - r.
        score: "expressive" or "softmax".
        attn_mask: for all queries and this process's keys, broadcastable to (..., N, L, S_r): bool, True = attend, or
            float, added to the log weights. A padding mask is (B, 1, 1, S_r). It gets no gradient.
        is_causal: as for :func:`better_attention.attention`, counted in the whole sequence.
        offset: as for :func:`better_attention.attention`, counted in the whole sequence.
        window: as for :func:`better_attention.attention`, counted in the whole sequence.
        scale: factor on q.k; None means 1/sqrt(H).
        enable_gqa: allow query heads to be a multiple of the key and value heads.
        check: whether processes compare their arguments first, one exchange of 512 bytes, so that a difference is
            an error and no deadlock; without it all have to be right, and shares equally long. None: on the CPU only,
            because a GPU would have to wait.

    Returns:
        (..., N, L_r, W), or (..., N, L, W) with replicated queries; rows from which every key is hidden are 0.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: arguments out of range, here or in another process, or not the same in all.
        RuntimeError: processes were not set up.

    Note:
        The result differs from that of one process by rounding, about 1e-6 of the largest number in float32. The same
        call with the same number of processes and threads gives the same bits, as far as the backend's sums do (gloo's
        do). Rows whose scores are all below 3e-18 in absolute value have no weight here, where
        :func:`better_attention.attention` still tells them apart. Numbers that are not finite spoil the rows of all
        queries, hidden or not. There is no dropout, and no second derivative.

    Source: the sums are our own derivation from arXiv 2407.18601; the maxima are those of arXiv 2310.01889.
    """
    group = check_group(group)
    settings = _Settings(group, queries == "sharded", layout == "zigzag")

    def call_of(length: int) -> tuple[Call, Any]:
        """The call of ``length`` queries, whose numbers it does not have."""
        rows = query.new_empty(()).expand(*query.shape[:-2], length, query.shape[-1])
        return prepare(rows, key, value, score, attn_mask, is_causal, offset, window, 0.0, scale, enable_gqa, False)

    def checked() -> None:
        choices = (queries, "queries", QUERIES), (layout, "layout", LAYOUTS), (score, "score", SCORES)
        for choice, name, allowed in choices:
            check_choice(choice, name, allowed)
        for x, name in ((query, "query"), (key, "key"), (value, "value")):
            floating_tensor(x, name)
            if x.dim() < 3:
                raise ValueError(f"{name} must be (..., heads, length, width), received {describe(x)}.")
        # The length of all queries is known to all later; the mask says what it was made for.
        rows = attn_mask.shape[-2] if isinstance(attn_mask, Tensor) and attn_mask.dim() > 1 else 1
        call, _ = call_of(rows)
        if any(m.requires_grad for m in call.masks):
            raise ValueError("attn_mask requires a gradient, which this function does not give: pass mask.detach().")
        if queries == "sharded" and query.shape[-2] != key.shape[-2]:
            raise ValueError(
                f"with queries='sharded' every process has the queries of its keys' tokens, received "
                f"{query.shape[-2]} queries and {key.shape[-2]} keys. Pass all queries with queries='replicated'."
            )
        if layout == "zigzag" and key.shape[-2] % 2:
            raise ValueError(
                f"layout='zigzag' has two pieces of one length in each process, received {key.shape[-2]} keys."
            )

    def said() -> str:
        shapes = [tuple(x.shape[:-2]) + tuple(x.shape[-1:]) for x in (query, key, value)]
        rows = query.shape[-2] if queries == "replicated" or layout == "zigzag" else "any"
        mask = None if attn_mask is None else f"{attn_mask.dtype} for {tuple(attn_mask.shape[:-1])}"
        return (
            f"query {shapes[0]}, key {shapes[1]}, value {shapes[2]} (without length), {query.dtype}, {rows} rows, "
            f"mask {mask}, {score}, {queries}, {layout}, causal {is_causal}, offset {offset}, window {window}, "
            f"scale {scale}, one tensor as key and value {value is key}, grad {_trains(query, key, value)}"
        )

    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    if device.type == "cpu" if check is None else check_bool(check, "check"):
        where = backend_device(group, device)
        agreed(checked, said, group, where, "arguments")
        lengths = _lengths(key.shape[-2], group, where)
    else:
        checked()
        lengths = [key.shape[-2]] * settings.world
    pieces = _pieces(lengths, zigzag=layout == "zigzag")
    call, lead = call_of(sum(lengths) if queries == "sharded" else query.shape[-2])
    q_BNLH = lead.fold(query).to(call.k_BNSH.dtype)
    shared = call.v_BNSH is call.k_BNSH
    # Inputs are in autocast's dtype already, and it would turn the sums back into 16 bits.
    with nullcontext() if autocast_dtype(device.type) is None else torch.autocast(device.type, enabled=False):
        out_BNLW = _Attention.apply(q_BNLH, call.k_BNSH, None if shared else call.v_BNSH, call, settings, pieces)
    return out_BNLW.reshape(*query.shape[:-1], value.shape[-1])  # type: ignore[no-any-return]


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# --- who has which tokens ---------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Tokens ``first`` ... ``first + length - 1`` of the whole sequence."""

    first: int
    length: int


@dataclass(frozen=True, slots=True)
class _Settings:
    """Who takes part, and how tokens and queries are divided."""

    group: Any
    sharded: bool
    zigzag: bool

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


def _lengths(mine: int, group: Any, device: torch.device) -> list[int]:
    """How many tokens each process has."""
    own = torch.tensor([mine], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return [int(x) for x in gathered]


def _pieces(lengths: Sequence[int], *, zigzag: bool) -> list[list[_Piece]]:
    """Of each process, the pieces of the sequence that it has, in the order in which they lie in its tensors."""
    if zigzag:
        half, last = lengths[0] // 2, 2 * len(lengths) - 1
        return [[_Piece(r * half, half), _Piece((last - r) * half, half)] for r in range(len(lengths))]
    firsts = [sum(lengths[:r]) for r in range(len(lengths))]
    return [[_Piece(first, length)] for first, length in zip(firsts, lengths, strict=True)]


# --- sums over processes ----------------------------------------------------------------------------------------------


def _gather(tensors: Sequence[Tensor], settings: _Settings, pieces: list[list[_Piece]]) -> list[Tensor]:
    """Tensors (B, N, L_r, ...) of all processes as (B, N, L, ...), tokens in order; one exchange for each dtype."""
    if not settings.sharded:
        return list(tensors)
    results: dict[int, Tensor] = {}
    # In the order of the tensors: that of a set differs from process to process.
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        chosen = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        packed = torch.cat([tensors[i] for i in chosen], dim=-1)
        widths = [tensors[i].shape[-1] for i in chosen]
        for i, part in zip(chosen, _gather_one(packed, settings, pieces).split(widths, dim=-1), strict=True):
            results[i] = part
    return [results[i] for i in range(len(tensors))]


def _longest(pieces: list[list[_Piece]]) -> int:
    return max(sum(piece.length for piece in own) for own in pieces)


def _gather_one(x: Tensor, settings: _Settings, pieces: list[list[_Piece]]) -> Tensor:
    (B, N, L, C), longest = x.shape, _longest(pieces)
    padded = torch.nn.functional.pad(x, (0, 0, 0, longest - L)).contiguous()
    gathered = x.new_empty(settings.world * B, N, longest, C)
    _all_gather(gathered, padded, group=settings.group)
    found = []
    for own, part in zip(pieces, gathered.unflatten(0, (settings.world, B)), strict=True):
        lengths = [piece.length for piece in own]
        found += list(zip(own, part[:, :, : sum(lengths)].split(lengths, dim=2), strict=True))
    return torch.cat([part for _, part in sorted(found, key=lambda pair: pair[0].first)], dim=2)


def _sum(x: Tensor, settings: _Settings, pieces: list[list[_Piece]]) -> Tensor:
    """(B, N, L, C) of all processes added up: the rows of this process where queries are divided, else all."""
    if not settings.sharded:
        x = x.contiguous()
        dist.all_reduce(x, group=settings.group)
        return x
    B, N, _, C = x.shape
    longest = _longest(pieces)
    parts = []
    for own in pieces:
        part = torch.cat([x[:, :, p.first : p.first + p.length] for p in own], dim=2)
        parts.append(torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[2])))
    result = x.new_empty(B, N, longest, C)
    _reduce_scatter(result, torch.stack(parts).flatten(0, 1), group=settings.group)
    return result[:, :, : sum(p.length for p in pieces[settings.rank])]


def _own(x: Tensor, settings: _Settings, pieces: list[list[_Piece]]) -> Tensor:
    """The rows of this process of something (B, N, L, ...) that all have."""
    if not settings.sharded:
        return x
    return torch.cat([x[:, :, p.first : p.first + p.length] for p in pieces[settings.rank]], dim=2)


# --- one process's part -----------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """The call of one piece of keys, for the queries that see any of them, and where these lie among all."""

    call: Call
    rows: slice
    keys: slice


def _calls(call: Call, q_BNLH: Tensor, own: Sequence[_Piece]) -> list[_Seen]:
    """The calls that a process computes: one for each piece of its keys."""
    seen, at, shared = [], 0, call.v_BNSH is call.k_BNSH
    L = q_BNLH.shape[2]
    for piece in own:
        keys = slice(at, at + piece.length)
        at = keys.stop
        # Under the triangle, queries before the piece see nothing of it; with a window neither do those far behind it.
        first = min(L, max(0, piece.first - call.offset)) if call.causal else 0
        last = L
        if call.causal and call.window is not None:
            last = max(first, min(L, piece.first + piece.length - 1 + call.window - call.offset))
        if piece.length == 0 or first == last:
            continue
        k_BNSH = call.k_BNSH[:, :, keys]
        mask = call.mask_BNLS
        if mask is not None:
            mask = mask if mask.shape[2] == 1 else mask[:, :, first:last]
            mask = mask if mask.shape[3] == 1 else mask[..., keys]
        part = replace(
            call,
            q_BNLH=q_BNLH[:, :, first:last],
            k_BNSH=k_BNSH,
            v_BNSH=k_BNSH if shared else call.v_BNSH[:, :, keys],
            mask_BNLS=mask,
            offset=first + call.offset - piece.first if call.causal else 0,
        )
        seen.append(_Seen(part, slice(first, last), keys))
    return seen


class _Attention(Function):
    """The sums over processes, and their derivative."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor | None, call: Call, settings: _Settings, pieces: list[list[_Piece]]
    ) -> Tensor:
        dtype = compute_dtype(q.dtype)
        whole = _with(call, k.detach(), None if v is None else v.detach(), dtype)
        (q_all,) = _gather([q], settings, pieces)
        L, W = q_all.shape[2], whole.v_BNSH.shape[-1]
        B, N = q.shape[:2]
        parts = [(p, partial.sums(p.call)) for p in _calls(whole, q_all.to(dtype), pieces[settings.rank])]
        shift = None
        if partial.has_exponent(whole):
            shift = q.new_full((B, N, L), -torch.inf, dtype=dtype)
            for p, s in parts:
                assert s.shift_BNL is not None  # noqa: S101 - for the type checker
                shift[:, :, p.rows] = torch.maximum(shift[:, :, p.rows], s.shift_BNL)
            dist.all_reduce(shift, op=dist.ReduceOp.MAX, group=settings.group)
            shift.masked_fill_(shift == -torch.inf, 0.0)
        together = q.new_zeros((B, N, L, W + 1), dtype=dtype)
        for p, s in parts:
            row = torch.cat([s.weighted_BNLW, s.total_BNL[..., None]], dim=-1)
            if shift is not None and s.shift_BNL is not None:
                row = row * (s.shift_BNL - shift[:, :, p.rows]).exp()[..., None]
            together[:, :, p.rows] += row
        summed = _sum(together, settings, pieces)
        total = summed[..., -1] if shift is not None else summed[..., -1] * UNIT
        # Infinite, so that whatever is divided by it is zero.
        nothing = total <= 0.0 if shift is not None else total < FAINT
        out = (summed[..., :-1] / summed[..., -1:].masked_fill(nothing[..., None], torch.inf)).to(q.dtype)
        total = total.masked_fill(nothing, torch.inf)
        ctx.save_for_backward(q, k, v, out, total, None if shift is None else _own(shift, settings, pieces))
        # Without the tensors that are saved above.
        none = k.new_empty(0)
        ctx.rest = replace(call, q_BNLH=none, k_BNSH=none, v_BNSH=none), settings, pieces
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, shift = ctx.saved_tensors
        call, settings, pieces = ctx.rest
        dtype = compute_dtype(q.dtype)
        delta = (grad.to(dtype) * out.to(dtype)).sum(dim=-1)
        rows = torch.stack([total, delta] if shift is None else [total, delta, shift], dim=-1)
        q_all, grad_all, rows_all = _gather([q, grad, rows], settings, pieces)
        total, delta, *shifts = rows_all.unbind(-1)
        whole = _with(call, k, v, dtype)
        dq = torch.zeros_like(q_all, dtype=dtype)
        dk = torch.zeros_like(whole.k_BNSH)
        dv = None if v is None else torch.zeros_like(whole.v_BNSH)
        for p in _calls(whole, q_all.to(dtype), pieces[settings.rank]):
            seen = grad_all[:, :, p.rows].to(dtype)
            high = shifts[0][:, :, p.rows] if shifts else None
            gq, gk, gv = partial.gradients(seen, p.call, total[:, :, p.rows], high, delta[:, :, p.rows])
            dq[:, :, p.rows] += gq
            dk[:, :, p.keys] = gk
            if dv is not None and gv is not None:
                dv[:, :, p.keys] = gv
        dq = _sum(dq, settings, pieces)
        return dq.to(q.dtype), dk.to(k.dtype), None if dv is None else dv.to(q.dtype), None, None, None


def _with(call: Call, k: Tensor, v: Tensor | None, dtype: torch.dtype) -> Call:
    """The call with these keys and values, in the dtype that weights are computed in."""
    k = k.to(dtype)
    return replace(call, k_BNSH=k, v_BNSH=k if v is None else v.to(dtype))
