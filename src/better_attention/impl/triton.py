"""Scores by our own kernels for GPUs (``gpu/``), written in Triton: forward and backward, in O(L) memory.

The same formulas and the same dropped weights as the compiled CPU kernels. On a CPU these kernels run in Triton's
interpreter alone, where ``TRITON_INTERPRET=1`` was set before Triton was imported: that is how they are tested without
a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from better_attention import operators
from better_attention.call.call import Call
from better_attention.call.torch_private import transformed
from better_attention.call.torch_state import operator_obstacles
from better_attention.dropout import parts
from better_attention.gpu import launches, toolchain
from better_attention.tensors import empty_heads

from .arguments import NO_DROPOUT, Arguments, flops

__all__ = ["compute", "unsupported"]


def unsupported(call: Call) -> list[str]:
    """Why the kernels cannot compute this call."""
    q_BNLH = call.q_BNLH
    reason = toolchain.missing(q_BNLH.device)
    reasons = [] if reason is None else [reason]
    if call.score not in launches.COMPUTED:
        reasons.append(f"its kernels compute the scores {', '.join(launches.COMPUTED)}, not {call.score!r}")
    if q_BNLH.dtype not in launches.DTYPES:
        reasons.append(f"it computes in float16, bfloat16 and float32, not {str(q_BNLH.dtype).removeprefix('torch.')}")
    widths = q_BNLH.shape[-1], call.v_BNSH.shape[-1]
    if widths[0] == 0:
        reasons.append("heads of width 0 have no scores")
    if max(widths) > launches.MAX_WIDTH:
        reasons.append(f"heads of width {max(widths)} do not fit its tiles, which take up to {launches.MAX_WIDTH}")
    if call.need_weights:
        reasons.append("it never holds all the weights, so it cannot return them")
    if call.dropout_p > 0.0 and transformed():
        reasons.append(NO_DROPOUT)
    if any(mask.requires_grad for mask in call.masks):
        reasons.append("it does not differentiate with respect to a mask")
    return reasons + operator_obstacles(call.tensors)


def compute(call: Call) -> tuple[Tensor, None]:
    """Head outputs (B, N, L, H), in the memory order (B, L, N, H)."""
    return _operator(Arguments.of(call, share=True))[0], None


def _problem(a: Arguments) -> launches.Problem:
    """The arguments as the kernels' launches take them."""
    return launches.Problem(
        a.q,
        a.k,
        a.v,
        a.mask,
        a.padding,
        # The seed lies in the memory of the host, wherever the inputs are: reading it waits for no device.
        None if a.seed is None else parts(a.seed),
        a.causal,
        a.offset,
        a.window,
        a.score,
        a.scale,
        a.dropout_p,
    )


class _Triton(operators.Definition[Arguments]):
    """Results: head outputs (B, N, L, W); statistics of each row for the backward pass (``gpu/kernels/forward.py``)."""

    name = "triton"
    arguments = Arguments
    differentiable = ("q", "k", "v")
    results = 2
    saves_results = True
    batched = True
    refuses_second = "impl='triton' has a first derivative only: pass impl='reference' for higher ones."
    refuses_batched_dropout = "impl='triton' has no dropout with is_grads_batched=True: pass impl='reference' for that."

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor]:
        return launches.forward(_problem(a))

    def fake(self, a: Arguments) -> tuple[Tensor, Tensor]:
        return empty_heads(a.q, a.values.shape[-1]), a.q.new_empty(
            launches.statistics_shape(a.q, a.score), dtype=torch.float32
        )

    def backward(
        self, grad: Tensor, a: Arguments, results: operators.Tensors, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        out, stats = results
        return launches.backward(grad, _problem(a), out, stats)

    def empty_gradient(self, argument: Tensor) -> Tensor:
        return empty_heads(argument)

    def flops(self, *shapes: Any) -> int:
        return flops(*shapes[:3])


_operator = operators.register(_Triton())
