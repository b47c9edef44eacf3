"""Scores by the compiled CPU kernels (``native/``), forward and backward, in O(L) memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from better_attention import dropout, operators
from better_attention.call.call import Call
from better_attention.call.torch_private import transformed
from better_attention.call.torch_state import address, operator_obstacles, ordinary
from better_attention.native import structs
from better_attention.native.library import (
    call as call_library,
)
from better_attention.native.library import (
    current_instruction_set,
    instruction_set,
    instruction_sets,
    missing,
)
from better_attention.tensors import contiguous_rows, empty_heads

from .arguments import NO_DROPOUT, Arguments, flops

__all__ = [
    "Distances",
    "compute",
    "decode",
    "decodes",
    "instruction_set",
    "instruction_sets",
    "missing",
    "partial",
    "partial_backward",
    "unsupported",
]


def unsupported(call: Call) -> list[str]:
    """Why the compiled kernels cannot compute this call."""
    q_BNLH = call.q_BNLH
    reason = missing()
    reasons = [] if reason is None else [f"the compiled kernels are missing: {reason}"]
    if call.score not in structs.SCORES:
        reasons.append(f"its kernels compute the scores {', '.join(structs.SCORES)}, not {call.score!r}")
    if q_BNLH.device.type != "cpu":
        reasons.append(f"its kernels are for the CPU, not {q_BNLH.device.type!r}")
    if q_BNLH.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"it computes in float32 and bfloat16, not {str(q_BNLH.dtype).removeprefix('torch.')}")
    if q_BNLH.shape[-1] == 0:
        reasons.append("heads of width 0 have no scores")
    if call.need_weights:
        reasons.append("it never holds all the weights, so it cannot return them")
    if call.dropout_p > 0.0 and transformed():
        reasons.append(NO_DROPOUT)
    for mask in call.masks:
        if mask.requires_grad:
            reasons.append("it does not differentiate with respect to a mask")
        if mask.dtype not in structs.ELEMENT_TYPES:
            reasons.append(f"it takes masks of bool, float32 and bfloat16, not {mask.dtype}")
    return reasons + operator_obstacles(call.tensors)


def compute(call: Call) -> tuple[Tensor, None]:
    """Head outputs (B, N, L, H), in the memory order (B, L, N, H)."""
    return _operator(Arguments.of(call, share=True))[0], None


# --- caches that hold something else than keys ------------------------------------------------------------------------


Pair = tuple[Tensor, Tensor]


class Distances(NamedTuple):
    """ALiBi: what the distance of query l and key s adds, with the slope m of the head and l counted from ``first``.

    Inside the score, -m (l - s) in the place of z; else -m |l - s| on the log weight.
    """

    slopes_N: Tensor
    """float32, one for each query head."""
    inside: bool
    first: int
    """Place of the first query among the keys of the call."""


def decode(
    call: Call, *, angles: Pair | None = None, scales: Pair | None = None, distances: Distances | None = None
) -> Tensor | None:
    """A few queries over a cache as it is stored: keys turned, int8 multiplied, distances counted while they are read.

    Args:
        call: a few queries, already turned, over keys that are not. Where key and value are one tensor, the values are
            what it holds. With scales, int8 keys and values.
        angles: cosine and sine of each pair's angle at the place of each key of the call, (S, H/2), float32, as from
            :func:`better_attention.positions.rotary_angles` for places that follow one another.
        scales: (B, S, G) of keys and of values, G heads of each, float32, not negative: numbers are codes times scales.
        distances: ALiBi.

    Returns:
        Head outputs (B, N, L, W) in the dtype of the queries, NaN also where a hidden key or value is not finite; None
        where the kernels do not serve: then make of the cache what attention takes, and attend as usual.

    Source: arXiv 2104.09864, eq. 34, features p and p + H/2 being a pair; arXiv 2108.12409, section 3.
    """
    if not _fits(call, angles, scales, distances):
        return None
    turned = None if angles is None else _alike(angles)
    slopes = None if distances is None else distances.slopes_N.contiguous()
    others = [*(turned or ()), *(scales or ()), *([] if slopes is None else [slopes])]
    if not ordinary(call.q_BNLH, call.k_BNSH, call.v_BNSH, *call.masks, *others) or not decodes(call):
        return None
    a = _with_contiguous_rows(Arguments.of(call, share=True))
    out = empty_heads(a.q, a.values.shape[-1])
    c = _describe(a, out, None)
    if turned is not None:
        c.rotary_cos, c.rotary_sin, c.rotary_s = address(turned[0]), address(turned[1]), turned[0].stride(0)
    if scales is not None:
        c.k_scale, (c.k_scale_b, c.k_scale_s, c.k_scale_g) = address(scales[0]), scales[0].stride()
        c.v_scale, (c.v_scale_b, c.v_scale_s, c.v_scale_g) = address(scales[1]), scales[1].stride()
    if distances is not None and slopes is not None:
        c.slopes, c.slopes_inside, c.slopes_from = address(slopes), distances.inside, distances.first
    call_library("ba_forward", c)
    return out


def _fits(call: Call, angles: Pair | None, scales: Pair | None, distances: Distances | None) -> bool:
    """Whether the tables have the sizes and dtypes of the call."""
    B, _, S, H = call.k_BNSH.shape
    tables: list[tuple[tuple[int, ...], Tensor]] = [] if angles is None else [((S, H // 2), x) for x in angles]
    heads = call.k_BNSH.shape[1], call.v_BNSH.shape[1]
    tables += [] if scales is None else [((B, S, G), x) for G, x in zip(heads, scales, strict=True)]
    tables += [] if distances is None else [((call.q_BNLH.shape[1],), distances.slopes_N)]
    stored = call.q_BNLH.dtype if scales is None else torch.int8
    return (
        call.k_BNSH.dtype == call.v_BNSH.dtype == stored
        and (angles is None or H % 2 == 0)
        and all(x.dtype == torch.float32 and tuple(x.shape) == size for size, x in tables)
    )


def _alike(pair: Pair) -> Pair:
    """Two tensors with contiguous rows and equal strides: the structure has room for those of one."""
    first, second = (contiguous_rows(x) for x in pair)
    return (first, second) if first.stride() == second.stride() else (first.contiguous(), second.contiguous())


def decodes(call: Call) -> bool:
    """Whether the kernels that read special caches serve calls like this one: few queries, in inference."""
    tensors = (call.q_BNLH, call.k_BNSH, call.v_BNSH, *call.masks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    _, N, L, _ = call.q_BNLH.shape
    _, G, S, W = call.v_BNSH.shape
    return 0 < L <= structs.FEW and 0 < G <= N and S > 0 and W > 0 and call.dropout_p == 0.0 and not unsupported(call)


# --- some of the keys -------------------------------------------------------------------------------------------------


def partial(call: Call) -> tuple[Tensor, Tensor]:
    """Head outputs over the keys of a call, and what they were divided by, where there are more keys elsewhere.

    Args:
        call: one that :func:`unsupported` has no objection to, in float32 and without dropout.

    Returns:
        (B, N, L, W) and (B, N, L, 2): the normaliser of each row and the shift of its exponent. A row without weight
        has an infinite normaliser, one of the expressive score whose weights are too small for float32 has 0.
    """
    return _forward(Arguments.of(call, share=True), stats=True)


def partial_backward(grad: Tensor, call: Call, stats: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients that come through the keys of a call, where there are more keys elsewhere.

    Args:
        grad: of the outputs over all keys, (B, N, L, W).
        call: as for :func:`partial`.
        stats: normaliser and shift over all keys, (B, N, L, 2), float32.
        delta: (B, N, L), float32, the product of the outputs over all keys and their gradients.

    Returns:
        Those of q, k and v; None for v where k serves as v, whose gradient is then that of both.
    """
    a = Arguments.of(call, share=True)
    return _backward(grad, a, grad, stats.contiguous(), delta.contiguous())


# --- across the C interface -------------------------------------------------------------------------------------------


def _forward(a: Arguments, *, stats: bool) -> tuple[Tensor, Tensor]:
    """The results; the second one is empty unless ``stats`` are wanted, which the derivative needs."""
    a = _with_contiguous_rows(a)
    out = empty_heads(a.q, a.values.shape[-1])
    numbers = a.q.new_empty((*a.q.shape[:3], 2) if stats else (0,), dtype=torch.float32)
    # api.h wants at least one key and one feature. The normaliser of a row without weight is infinite.
    if a.k.shape[2] == 0 or out.shape[3] == 0:
        return out.zero_(), numbers.fill_(torch.inf)
    # The structure holds addresses only: the copies in `a` must not be released before this returns.
    call_library("ba_forward", _describe(a, out, numbers if stats else None))
    return out, numbers


def _backward(
    grad: Tensor, a: Arguments, out: Tensor, stats: Tensor, delta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v; where k serves as v, of both in the second one. With ``delta`` ``out`` is not read."""
    # autograd hands out expanded gradients, that of a sum for example, whose rows have stride 0.
    a, grad = _with_contiguous_rows(a), contiguous_rows(grad)
    dq, dv = empty_heads(a.q, a.q.shape[-1]), None if a.v is None else empty_heads(a.v, a.v.shape[-1])
    dk = empty_heads(a.k, a.k.shape[-1])
    group = a.values.shape[1] // max(1, a.k.shape[1])
    # Heads of values that share one of keys bring a part of its gradient each.
    parts = dk if group == 1 else empty_heads(a.values, a.k.shape[-1])
    if a.k.shape[2] == 0 or a.values.shape[3] == 0 or a.q.shape[1] == 0 or a.q.numel() == 0:
        return dq.zero_(), dk.zero_(), None if dv is None else dv.zero_()
    c = _describe(a, out, stats)
    c.grad, (c.grad_b, c.grad_n, c.grad_l, _) = address(grad), grad.stride()
    if delta is not None:
        c.delta = address(delta)
    # data_ptr() is enough here: tensors that were just allocated have memory. address() is for those from outside.
    c.dq, (c.dq_b, c.dq_n, c.dq_l, _) = dq.data_ptr(), dq.stride()
    c.dk, (c.dk_b, c.dk_g, c.dk_s, _) = parts.data_ptr(), parts.stride()
    # A null dv says that k serves as v: the kernel then writes the sum of both gradients to dk.
    if dv is not None:
        c.dv, (c.dv_b, c.dv_g, c.dv_s, _) = dv.data_ptr(), dv.stride()
    call_library("ba_backward", c)
    if parts is not dk:
        torch.sum(parts.unflatten(1, (-1, group)), dim=2, out=dk)
    return dq, dk, dv


def _describe(a: Arguments, out: Tensor, stats: Tensor | None) -> structs.Call:
    """The part of ``ba_call`` that both directions need."""
    q, k, v = a.q, a.k, a.values
    c = structs.Call()
    # Asked at each call, because programs change the number of threads between calls.
    c.isa, c.threads = current_instruction_set(), torch.get_num_threads()
    c.dtype, c.score, c.causal = structs.ELEMENT_TYPES[q.dtype], structs.SCORES[a.score], a.causal
    c.offset, c.window = a.offset, a.window or 0
    c.scale, c.dropout = a.scale, a.dropout_p
    if a.seed is not None:
        c.seed, c.batch_first, c.batch_step = dropout.parts(a.seed)
    c.B, c.N, c.L, c.H = q.shape
    _, c.G, c.S, c.W = v.shape
    c.key_group = c.G // max(1, k.shape[1])
    c.q, (c.q_b, c.q_n, c.q_l, _) = address(q), q.stride()
    c.k, (c.k_b, c.k_g, c.k_s, _) = address(k), k.stride()
    c.v, (c.v_b, c.v_g, c.v_s, _) = address(v), v.stride()
    c.mask_type = c.padding_type = structs.NO_MASK
    if a.mask is not None:
        c.mask, c.mask_type = address(a.mask), structs.ELEMENT_TYPES[a.mask.dtype]
        c.mask_b, c.mask_n, c.mask_l, c.mask_s = _steps(a.mask)
    if a.padding is not None:
        c.padding, c.padding_type = address(a.padding), structs.ELEMENT_TYPES[a.padding.dtype]
        c.padding_b, _, _, c.padding_s = _steps(a.padding)
    c.out, (c.out_b, c.out_n, c.out_l, _) = out.data_ptr(), out.stride()
    if stats is not None:
        c.stats = stats.data_ptr()
    return c


def _steps(mask: Tensor) -> list[int]:
    """Strides of a mask, 0 where it broadcasts."""
    # torch leaves the stride of a dimension of size 1 arbitrary, and a broadcasting kernel would step by it.
    return [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]


def _with_contiguous_rows(a: Arguments) -> Arguments:
    """The same arguments with the last dimension of q, k and v contiguous; copies only where it is not."""
    q, k, v = contiguous_rows(a.q), contiguous_rows(a.k), None if a.v is None else contiguous_rows(a.v)
    return a if q is a.q and k is a.k and v is a.v else a._replace(q=q, k=k, v=v)


# --- the operator -----------------------------------------------------------------------------------------------------


class _Native(operators.Definition[Arguments]):
    """Results: head outputs (B, N, L, W); per row the normaliser and the shift of its exponent, (B, N, L, 2)."""

    name = "native"
    arguments = Arguments
    differentiable = ("q", "k", "v")
    results = 2
    saves_results = True
    device_type = "cpu"
    batched = True
    refuses_second = "impl='native' has a first derivative only: pass impl='reference' for higher ones."

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor]:
        return _forward(a, stats=True)

    def inference(self, a: Arguments) -> tuple[Tensor, Tensor]:
        # Called past the dispatcher only, so fake(), which promises full statistics, is not contradicted.
        return _forward(a, stats=False)

    def fake(self, a: Arguments) -> tuple[Tensor, Tensor]:
        return empty_heads(a.q, a.values.shape[-1]), a.q.new_empty((*a.q.shape[:3], 2), dtype=torch.float32)

    def backward(
        self, grad: Tensor, a: Arguments, results: operators.Tensors, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        out, stats = results
        return _backward(grad, a, out, stats)

    def empty_gradient(self, argument: Tensor) -> Tensor:
        return empty_heads(argument, argument.shape[-1])

    def flops(self, *shapes: Any) -> int:
        return flops(*shapes[:3])


_operator = operators.register(_Native())
