"""Both scores by the compiled CPU kernels (``native/``), forward and backward, in O(L) memory.

Registered as custom operators, so that torch.compile and torch.export keep a call as one node. In eager mode plain
tensors go to the kernels directly: at small sizes the dispatcher would take longer than the arithmetic.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from better_attention.call.call import NO_DROPOUT, Call, dropout_seed, flops, fold_batch, one_by_one
from better_attention.call.torch_state import address, operator_obstacles, ordinary, transformed
from better_attention.native.library import (
    DTYPES,
    NO_MASK,
    current_instruction_set,
    instruction_set,
    instruction_sets,
    missing,
    rows,
)
from better_attention.native.library import call as call_library

__all__ = ["compute", "instruction_set", "instruction_sets", "missing", "unsupported"]

_FORWARD = struct.Struct("=5q2d8q3q9q2q4q2q2q1q3q1q")  # ba_call in native/api.h, up to stats
_BACKWARD = struct.Struct("=1q3q3q9q")  # and the rest
_NOTHING_MORE = bytes(_BACKWARD.size)
_SCORES = {"softmax": 0, "expressive": 1}


def unsupported(call: Call) -> list[str]:
    """Why the compiled kernels cannot serve this call."""
    q_BNLH = call.q_BNLH
    reason = missing()
    reasons = [] if reason is None else [f"the compiled kernels are missing: {reason}"]
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
        if mask.dtype not in DTYPES:
            reasons.append(f"it takes masks of bool, float32 and bfloat16, not {mask.dtype}")
    return reasons + operator_obstacles(call.tensors)


def compute(call: Call) -> tuple[Tensor, None]:
    """Head outputs (B, N, L, H), in the memory order (B, L, N, H)."""
    q, k = call.q_BNLH, call.k_BNSH
    v = None if call.v_BNSH is k else call.v_BNSH
    tensors = (q, k, v, call.mask_BNLS, call.padding_B11S, dropout_seed(call))
    arguments = (*tensors, call.causal, call.score, call.scale, call.dropout_p)
    if torch.compiler.is_compiling():
        return torch.ops.better_attention.native(*arguments)[0], None
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, call.v_BNSH))
    if not trains and ordinary(*tensors):
        return _run_forward(*arguments, stats=False)[0], None
    return _Native.apply(*arguments)[0], None


# --- across the C interface ------------------------------------------------------------------------------------


def _describe(
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
    out: Tensor,
    stats: Tensor | None,
) -> bytes:
    """The fields of ``ba_call`` that both directions need."""
    (B, N, L, H), (_, G, S, W) = q.shape, v.shape
    restrictions: list[int] = []
    for given, shape in ((mask, (B, N, L, S)), (padding, (B, S))):
        if given is None:
            restrictions += [0, NO_MASK, *(0 for _ in shape)]
        else:
            sizes = given.shape if len(shape) == 4 else (given.shape[0], given.shape[3])
            strides = given.stride() if len(shape) == 4 else (given.stride(0), given.stride(3))
            steps = (0 if size == 1 else step for size, step in zip(sizes, strides, strict=True))
            restrictions += [address(given), DTYPES[given.dtype], *steps]
    return _FORWARD.pack(
        current_instruction_set(),
        torch.get_num_threads(),
        DTYPES[q.dtype],
        _SCORES[score],
        causal,
        scale,
        dropout_p,
        0 if seed is None else int(seed),
        *(B, N, G, L, S, H, W),
        address(q),
        address(k),
        address(v),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *restrictions,
        out.data_ptr(),
        *out.stride()[:3],
        0 if stats is None else stats.data_ptr(),
    )


def _empty(like: Tensor, width: int) -> Tensor:
    """A new (B, N, L, width) whose heads lie side by side, as the layer's next step wants them."""
    B, N, L, _ = like.shape
    return like.new_empty(B, L, N, width).transpose(1, 2)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
    stats: bool = True,
) -> tuple[Tensor, Tensor]:
    shared = v is None
    q, k = rows(q), rows(k)
    v = k if v is None or shared else rows(v)
    out = _empty(q, v.shape[-1])
    numbers = q.new_empty((*q.shape[:3], 2) if stats else (0,), dtype=torch.float32)
    if k.shape[2] == 0 or v.shape[3] == 0:
        return out.zero_(), numbers.fill_(torch.inf)
    arguments = _describe(
        q, k, v, mask, padding, seed, causal, score, scale, dropout_p, out, numbers if stats else None
    )
    call_library("ba_forward", arguments + _NOTHING_MORE)
    return out, numbers


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    out: Tensor,
    stats: Tensor,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shared = v is None
    grad, q, k = rows(grad), rows(q), rows(k)
    v = k if v is None or shared else rows(v)
    dq, dk = _empty(q, q.shape[-1]), _empty(k, k.shape[-1])
    dv = q.new_empty(0) if shared else _empty(v, v.shape[-1])
    if k.shape[2] == 0 or v.shape[3] == 0 or q.shape[1] == 0 or q.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    rest = _BACKWARD.pack(
        address(grad),
        *grad.stride()[:3],
        dq.data_ptr(),
        dk.data_ptr(),
        0 if shared else dv.data_ptr(),
        *dq.stride()[:3],
        *dk.stride()[:3],
        *((0, 0, 0) if shared else dv.stride()[:3]),
    )
    arguments = _describe(q, k, v, mask, padding, seed, causal, score, scale, dropout_p, out, stats)
    call_library("ba_backward", arguments + rest)
    return dq, dk, dv


# --- the operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("better_attention::native", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Head outputs (B, N, L, W), and per row the normaliser and the shift of its exponent; v None: k serves as v."""
    return _run_forward(q, k, v, mask, padding, seed, causal, score, scale, dropout_p)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    width = k.shape[-1] if v is None else v.shape[-1]
    return _empty(q, width), q.new_empty((*q.shape[:3], 2), dtype=torch.float32)


@torch.library.custom_op("better_attention::native_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    out: Tensor,
    stats: Tensor,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; of k and v together, and an empty one, where v is None."""
    return _run_backward(grad, q, k, v, mask, padding, out, stats, seed, causal, score, scale, dropout_p)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    out: Tensor,
    stats: Tensor,
    seed: Tensor | None,
    causal: bool,
    score: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dv = q.new_empty(0) if v is None else _empty(v, v.shape[-1])
    return _empty(q, q.shape[-1]), _empty(k, k.shape[-1]), dv


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, padding, seed, *settings = inputs
    ctx.save_for_backward(q, k, v, mask, padding, *output, seed)
    ctx.settings = tuple(settings)
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[1])


def _derive(ctx: Any, grad: Tensor, *_stats: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    run: Any = _NativeBackward.apply
    if torch.compiler.is_compiling():
        run = torch.ops.better_attention.native_backward
    elif not torch.is_grad_enabled() and ordinary(grad, *saved):
        run = _run_backward
    dq, dk, dv = run(grad, *saved, *ctx.settings)
    return dq, dk, None if saved[2] is None else dv, *(None,) * 7


_forward.register_autograd(_derive, setup_context=_save)


class _Native(torch.autograd.Function):
    """The same operator and derivative for eager mode, where torch.func transforms go through it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run_forward(*args) if ordinary(*args[:6]) else torch.ops.better_attention.native(*args)

    setup_context = staticmethod(_save)
    backward = staticmethod(_derive)


class _NativeBackward(torch.autograd.Function):
    """The backward operator for torch.func, with an answer to those who want to differentiate it again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run_backward(*args) if ordinary(*args[:9]) else torch.ops.better_attention.native_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ValueError("impl='native' has a first derivative only: pass impl='reference' for higher ones.")


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> Any:
    if args[5] is not None:
        return one_by_one(info, in_dims, args, torch.ops.better_attention.native)
    batch = args[0].shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]
    outputs = torch.ops.better_attention.native(*fold_batch(info, in_dims[:5], args[:5], batch), *args[5:])
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in outputs), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    if args[8] is not None:
        return one_by_one(info, in_dims, args, torch.ops.better_attention.native_backward)
    batch = args[1].shape[0 if in_dims[1] is None or in_dims[1] > 0 else 1]
    outputs = torch.ops.better_attention.native_backward(*fold_batch(info, in_dims[:8], args[:8], batch), *args[8:])
    return tuple(
        x.unflatten(0, (info.batch_size, batch)) if x.dim() == 4 else x.expand(info.batch_size, 0) for x in outputs
    ), (0, 0, 0)


_forward.register_vmap(_vmap_forward)
_backward.register_vmap(_vmap_backward)


@register_flop_formula(torch.ops.better_attention.native)
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return flops(q, k, k if v is None else v)


@register_flop_formula(torch.ops.better_attention.native_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * flops(q, k, k if v is None else v)
