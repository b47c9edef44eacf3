"""W_A on the values by the compiled CPU kernels: one product for the whole batch, its bias folded in.

A lower triangular W_A takes half the work, forward and backward. Source: arXiv 2403.01643, definition 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from better_attention import operators
from better_attention.call.torch_state import address, operator_obstacles
from better_attention.tensors import contiguous_rows

from . import structs
from .library import call as call_library
from .library import current_instruction_set, missing


class Arguments(NamedTuple):
    """What :func:`align` is called with.

    Args:
        weight: (G, S, S), G = number of heads, or 1 for one kernel that all heads share.
        bias: (G, S), added to every feature of a position; None: zero.
        value: (B, S, D).
        causal: whether only the lower triangle of ``weight`` is used.
    """

    weight: Tensor
    bias: Tensor | None
    value: Tensor
    causal: bool


def supported(weight: Tensor, bias: Tensor | None, value_BSD: Tensor) -> bool:
    """Whether the compiled kernels take these: float32 or bfloat16 on the CPU, all of one dtype, nothing in the way."""
    tensors = [weight, value_BSD] + ([] if bias is None else [bias])
    return (
        missing() is None
        and value_BSD.dtype in (torch.float32, torch.bfloat16)
        and all(x.device.type == "cpu" and x.dtype == value_BSD.dtype for x in tensors)
        and not operator_obstacles({"value": value_BSD, "align.weight": weight, "align.bias": bias})
    )


def align(weight: Tensor, bias: Tensor | None, value_BSD: Tensor, causal: bool) -> Tensor:
    """Mix positions, head after head; see :class:`Arguments`.

    Returns:
        (B, S, D), contiguous.
    """
    return _operator(Arguments(weight, bias, value_BSD, causal))  # type: ignore[no-any-return]


def _forward(a: Arguments) -> Tensor:
    weight, value, bias = (
        contiguous_rows(a.weight),
        contiguous_rows(a.value),
        None if a.bias is None else contiguous_rows(a.bias),
    )
    c = _describe(weight, value, a.causal)
    if bias is not None:
        c.bias, c.bias_g = address(bias), bias.stride(0)
    out = value.new_empty(value.shape)
    c.out = out.data_ptr()
    call_library("ba_align_forward", c)
    return out


def _backward(grad: Tensor, a: Arguments, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """Gradients of weight, bias and value; None where they are not wanted."""
    dweight, dvalue = _products(grad, a, weight_wanted=wanted[0], value_wanted=wanted[2])
    dbias = None
    if wanted[1]:
        (B, S, D), G = grad.shape, a.weight.shape[0]
        # The bias is one number per position and kernel, so its gradient sums over the batch and over features.
        dbias = grad.reshape(B, S, G, D // G).sum(dim=(0, 3)).transpose(0, 1)
    return dweight, dbias, dvalue


def _products(
    grad: Tensor, a: Arguments, *, weight_wanted: bool, value_wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that are matrix products: of weight and of value."""
    grad, weight, value = contiguous_rows(grad), contiguous_rows(a.weight), contiguous_rows(a.value)
    dweight = weight.new_empty(weight.shape) if weight_wanted else None
    dvalue = value.new_empty(value.shape) if value_wanted else None
    if 0 in value.shape:
        return None if dweight is None else dweight.zero_(), dvalue
    c = _describe(weight, value, a.causal)
    c.grad, (c.grad_b, c.grad_s, _), c.grad_g = address(grad), grad.stride(), c.W
    # api.h takes a null pointer to mean that this gradient is not wanted, which saves its product.
    c.dvalue = None if dvalue is None else dvalue.data_ptr()
    c.dweight = None if dweight is None else dweight.data_ptr()
    call_library("ba_align_backward", c)
    return dweight, dvalue


def _describe(weight: Tensor, value: Tensor, causal: bool) -> structs.Align:
    """The part of ``ba_align`` that both directions need."""
    (B, S, D), G = value.shape, weight.shape[0]
    c = structs.Align()
    c.isa, c.threads = current_instruction_set(), torch.get_num_threads()
    c.dtype, c.causal = structs.ELEMENT_TYPES[value.dtype], causal
    c.B, c.G, c.S, c.W = B, G, S, D // G
    c.weight, (c.weight_g, c.weight_i, _) = address(weight), weight.stride()
    # Heads lie side by side in the last dimension: head g starts at column g D / G.
    c.value, (c.value_b, c.value_s, _), c.value_g = address(value), value.stride(), D // G
    return c


class _Align(operators.Definition[Arguments]):
    """Result: W_A V + a, (B, S, D)."""

    name = "align"
    arguments = Arguments
    differentiable = ("weight", "bias", "value")
    device_type = "cpu"
    refuses_second = "the compiled W_A has a first derivative only: pass impl='reference' for higher ones."

    def forward(self, a: Arguments) -> tuple[Tensor]:
        return (_forward(a),)

    def fake(self, a: Arguments) -> tuple[Tensor]:
        return (a.value.new_empty(a.value.shape),)

    def backward(
        self, grad: Tensor, a: Arguments, results: operators.Tensors, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return _backward(grad, a, wanted)

    def flops(self, *shapes: Any) -> int:
        """Those of a full W_A, as :func:`better_attention.cost` counts them; a triangle takes half the work."""
        B, S, D = shapes[2]
        return int(2 * B * S * S * D)

    def backward_flops(self, wanted: Sequence[bool], *shapes: Any) -> int:
        return (wanted[0] + wanted[2]) * self.flops(*shapes)


_operator = operators.register(_Align())
