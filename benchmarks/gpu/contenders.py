"""Who computes what: ours, PyTorch's backends one by one, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import better_attention as ba

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
MATH_MAX_LENGTH = 2048
"""The backend that holds all weights is left out beyond."""


class Contender(NamedTuple):
    """One way to compute a row.

    Args:
        name: in tables.
        score: what it computes, and is checked against.
        call: from q, k and v to the output, causal unless there is one query.
        shared: whether it gets one tensor as key and value.
    """

    name: str
    score: str
    call: Call
    shared: bool = False


def contenders(length: int, *, decode: bool, flex: bool = True) -> list[Contender]:
    """Everybody for rows of this many keys, ours first."""
    causal = not decode
    rows = [Contender("ours, expressive", "expressive", _ours("expressive", "triton", causal))]
    rows.append(Contender("ours, softmax, K = V", "softmax", _ours("softmax", "triton", causal), shared=True))
    if decode:
        rows.append(
            Contender("ours, expressive, K = V", "expressive", _ours("expressive", "triton", causal), shared=True)
        )
        rows.append(Contender("ours, softmax", "softmax", _ours("softmax", "triton", causal)))
    if flex:
        rows.append(Contender("FlexAttention, expressive", "expressive", _ours("expressive", "flex", causal)))
        rows.append(Contender("FlexAttention, softmax", "softmax", _ours("softmax", "flex", causal)))
    for name, backend in BACKENDS.items():
        if backend != SDPBackend.MATH or length <= MATH_MAX_LENGTH:
            rows.append(Contender(name, "softmax", _sdpa(backend, causal)))
    return rows


def _ours(score: str, impl: str, causal: bool) -> Call:
    return lambda q, k, v: ba.attention(q, k, v, score=score, is_causal=causal, impl=impl)


def _sdpa(backend: SDPBackend, causal: bool) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def inputs(
    length: int, width: int, *, decode: bool, shared: bool, tokens: int, features: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one row: ``tokens`` in all samples together, ``features`` in all heads together."""
    generator = torch.Generator(device).manual_seed(length + width)
    B, N = max(1, tokens // length), features // width

    def draw(rows: int) -> Tensor:
        return torch.randn(B, rows, N, width, generator=generator, device=device, dtype=dtype).transpose(1, 2)

    q, k = draw(1 if decode else length), draw(length)
    return q, k, k if shared else draw(length)


@contextmanager
def highest_precision() -> Iterator[None]:
    """Products of float32 without TF32, for the results that count as right."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact(q: Tensor, k: Tensor, v: Tensor, score: str, causal: bool, upstream: Tensor | None) -> list[Tensor]:
    """Output, and gradients where ``upstream`` is given, by the reference in float32."""
    leaves = [x.detach().float().requires_grad_(upstream is not None) for x in ([q, k] if v is k else [q, k, v])]
    with highest_precision():
        output = ba.attention(leaves[0], leaves[1], leaves[-1], score=score, is_causal=causal, impl="reference")
        if upstream is None:
            return [output]
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream.float())]


def computed(c: Contender, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor | None) -> list[Tensor]:
    """The same by a contender."""
    leaves = [x.detach().requires_grad_(upstream is not None) for x in ([q, k] if v is k else [q, k, v])]
    output = c.call(leaves[0], leaves[1], leaves[-1])
    return [output.detach(), *(torch.autograd.grad(output, leaves, upstream) if upstream is not None else ())]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of any result, relative to the largest number of that result."""
    errors = [
        ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6)).item()
        for a, b in zip(found, expected, strict=True)
    ]
    return max(errors)


def timed(c: Contender, qkv: tuple[Tensor, Tensor, Tensor], backward: bool) -> Callable[[], Any]:
    """One call to be timed: with its backward pass, or without gradients."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return c.call(*qkv)

        return forward
    q, k, v = qkv
    leaves = [x.detach().requires_grad_() for x in ([q, k] if v is k else [q, k, v])]
    upstream = torch.randn_like(c.call(leaves[0], leaves[1], leaves[-1]).detach())

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(c.call(leaves[0], leaves[1], leaves[-1]), leaves, upstream)

    return both
