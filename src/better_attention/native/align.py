"""W_A on the values by the compiled CPU kernels: one product for the whole batch, its bias folded in.

A lower triangular W_A takes half the work, forward and backward. Source: arXiv 2403.01643, definition 4.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from better_attention.call.torch_state import address, operator_obstacles, ordinary
from better_attention.native.library import call as call_library
from better_attention.native.library import current_instruction_set, missing, rows

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ALIGN = struct.Struct("=4q4q1q2q1q1q1q3q1q1q3q1q1q")  # ba_align in native/api.h


def supported(weight: Tensor, bias: Tensor | None, value_BSD: Tensor) -> bool:
    """Whether the compiled kernels take these: float32 or bfloat16 on the CPU, all of one dtype, nothing in the way."""
    tensors = [weight, value_BSD] + ([] if bias is None else [bias])
    return (
        missing() is None
        and value_BSD.dtype in _DTYPES
        and all(x.device.type == "cpu" and x.dtype == value_BSD.dtype for x in tensors)
        and not operator_obstacles({"value": value_BSD, "align.weight": weight, "align.bias": bias})
    )


def align(weight: Tensor, bias: Tensor | None, value_BSD: Tensor, causal: bool) -> Tensor:
    """Mix positions, head after head.

    Args:
        weight: (N, S, S), or (1, S, S) for one kernel shared by all heads; contiguous rows.
        bias: (N, S) or (1, S), added to every feature of a position.
        value_BSD: (B, S, D).
        causal: use only the lower triangle of ``weight``.

    Returns:
        (B, S, D), contiguous.
    """
    if torch.compiler.is_compiling():
        return torch.ops.better_attention.align(weight, bias, value_BSD, causal)  # type: ignore[no-any-return]
    tensors = (weight, value_BSD) if bias is None else (weight, bias, value_BSD)
    if ordinary(*tensors) and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _run_forward(weight, bias, value_BSD, causal)
    return _Align.apply(weight, bias, value_BSD, causal)  # type: ignore[no-any-return]


# --- across the C interface ------------------------------------------------------------------------------------


def _describe(weight: Tensor, bias: Tensor | None, value: Tensor, causal: bool, out: Tensor | None) -> list[int]:
    """The fields of ``ba_align`` up to out."""
    (B, S, D), G = value.shape, weight.shape[0]
    return [
        current_instruction_set(),
        torch.get_num_threads(),
        _DTYPES[value.dtype],
        causal,
        *(B, G, S, D // G),
        address(weight),
        *weight.stride()[:2],
        0 if bias is None else address(bias),
        0 if bias is None else bias.stride(0),
        address(value),
        *value.stride()[:2],
        D // G,
        0 if out is None else out.data_ptr(),
    ]


def _run_forward(weight: Tensor, bias: Tensor | None, value: Tensor, causal: bool) -> Tensor:
    weight, value = rows(weight), rows(value)
    bias = None if bias is None else rows(bias)
    out = value.new_empty(value.shape)
    call_library("ba_align_forward", _ALIGN.pack(*_describe(weight, bias, value, causal, out), *(0,) * 6))
    return out


def _run_backward(
    grad: Tensor, weight: Tensor, value: Tensor, causal: bool, need_weight: bool, need_value: bool
) -> tuple[Tensor, Tensor]:
    grad, weight, value = rows(grad), rows(weight), rows(value)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    dvalue = value.new_empty(value.shape if need_value else 0)
    width = value.shape[2] // weight.shape[0]
    if 0 in value.shape:
        return dweight.zero_(), dvalue
    addresses = (dvalue.data_ptr() if need_value else 0, dweight.data_ptr() if need_weight else 0)
    arguments = (*_describe(weight, None, value, causal, None), address(grad), *grad.stride()[:2], width, *addresses)
    call_library("ba_align_backward", _ALIGN.pack(*arguments))
    return dweight, dvalue


# --- the operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("better_attention::align", mutates_args=(), device_types="cpu")
def _forward(weight: Tensor, bias: Tensor | None, value: Tensor, causal: bool) -> Tensor:
    """W_A V + a: weight (G, S, S), bias (G, S), value (B, S, D) -> (B, S, D)."""
    return _run_forward(weight, bias, value, causal)


@_forward.register_fake
def _(weight: Tensor, bias: Tensor | None, value: Tensor, causal: bool) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op("better_attention::align_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, weight: Tensor, value: Tensor, causal: bool, need_weight: bool, need_value: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and value, empty where they are not needed."""
    return _run_backward(grad, weight, value, causal, need_weight, need_value)


@_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, value: Tensor, causal: bool, need_weight: bool, need_value: bool
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape if need_weight else 0), value.new_empty(value.shape if need_value else 0)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    weight, bias, value, causal = inputs
    ctx.save_for_backward(weight, value)
    ctx.settings = (causal, None if bias is None else bias.shape[0])


def _derive(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    causal, groups = ctx.settings
    weight, value = ctx.saved_tensors
    wished = bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[2])
    run: Any = _AlignBackward.apply
    if torch.compiler.is_compiling():
        run = torch.ops.better_attention.align_backward
    elif not torch.is_grad_enabled() and ordinary(grad, weight, value):
        run = _run_backward
    dweight, dvalue = run(grad, weight, value, causal, *wished)
    dbias = None
    if groups is not None and ctx.needs_input_grad[1]:
        B, S, D = grad.shape
        dbias = grad.reshape(B, S, groups, D // groups).sum(dim=(0, 3)).transpose(0, 1)
    return dweight if wished[0] else None, dbias, dvalue if wished[1] else None, None


_forward.register_autograd(_derive, setup_context=_save)


@register_flop_formula(torch.ops.better_attention.align)
def _forward_flops(weight: Any, bias: Any, value: Any, causal: bool, **_: Any) -> int:
    """Those of a full W_A, as :func:`better_attention.cost` counts them; a triangle takes half the work."""
    B, S, D = value
    return int(2 * B * S * S * D)


@register_flop_formula(torch.ops.better_attention.align_backward)
def _backward_flops(
    grad: Any, weight: Any, value: Any, causal: bool, need_weight: bool, need_value: bool, **_: Any
) -> int:
    return (need_weight + need_value) * _forward_flops(weight, None, value, causal, out_val=None)


class _Align(torch.autograd.Function):
    """The same operator and derivative for eager mode."""

    @staticmethod
    def forward(weight: Tensor, bias: Tensor | None, value: Tensor, causal: bool) -> Tensor:
        if ordinary(weight, bias, value):
            return _run_forward(weight, bias, value, causal)
        return torch.ops.better_attention.align(weight, bias, value, causal)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save)
    backward = staticmethod(_derive)


class _AlignBackward(torch.autograd.Function):
    """The backward operator, with an answer to those who want to differentiate it again."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run_backward(*args) if ordinary(*args[:3]) else torch.ops.better_attention.align_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ValueError("the compiled W_A has a first derivative only: pass impl='reference' for higher ones.")
