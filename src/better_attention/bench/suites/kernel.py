"""The suite "kernel": the attention function alone, at the papers' shapes, against PyTorch's fused softmax attention.

Inputs are views of (B, L, D) tensors, heads side by side, as every layer has them after its projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import better_attention as ba
from better_attention.bench import machine
from better_attention.bench.contenders import flex_attention
from better_attention.bench.registry import (
    PAPER,
    Contender,
    Results,
    Row,
    Run,
    Shape,
    Suite,
    Work,
    differentiable,
    normal,
)
from better_attention.impl import IMPLEMENTATIONS

IMPL_NAMES = ("auto", *IMPLEMENTATIONS)
"""What ``impl`` may be; an implementation that cannot compute a row is listed with its reason."""
SLICED = 1 << 25
"""Weights (B N L S) from which on the gate looks at the first and last sequence and head only."""
DROPOUT = 0.1
"""Probability in the rows of that name. What is dropped is random, so the gate looks at the same code without it."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one row; q, k, v and grad are (B, L, D), the mask broadcasts to (B, N, L, S)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, row: Row) -> Inputs:
        """The inputs of a row, the same in every run."""
        size = row.shape[:3]
        q, k, v, grad = (normal(seed, *size, dtype=row.dtype) for seed in range(4))
        for leaf in (q, k, v):
            leaf.requires_grad_(row.backward)
        return cls(q, k, v, grad, _mask(row))


def _mask(row: Row) -> Tensor | None:
    """bool, True = attend: lengths of 5/8 to 8/8 for "padded", a quarter hidden at random for "mask"."""
    B, S = row.shape.batch, row.shape.length
    if row.variant == "padded":
        lengths = S - torch.arange(1, B + 1) % 4 * S // 8
        return (torch.arange(S) < lengths[:, None])[:, None, None]
    if row.variant == "mask":
        visible = torch.rand(S, S, generator=torch.Generator().manual_seed(4)) < 0.75
        # Each query sees at least itself: without any key there is nothing to normalise.
        return (visible | torch.eye(S, dtype=torch.bool))[None, None]
    return None


def flops(row: Row) -> float:
    """4 B N L S H forward: two products, q kᵀ and weights v, a multiply-add as two operations.

    Backward is 2.5 times that more: five products in a kernel that computes the weights again. Causal counts half;
    padding and masks count in full, for a kernel may not skip what lies between visible keys.
    """
    forward = 4.0 * row.shape.batch * row.shape.width * row.shape.length**2
    return forward * (3.5 if row.backward else 1.0) * (0.5 if row.variant == "causal" else 1.0)


def contenders(row: Row) -> list[Contender]:
    """SDPA, FlexAttention, and ours: both scores, every implementation, and one tensor as key and value."""
    inputs = cache(partial(Inputs.of, row))
    truth = cache(partial(_truth, row, inputs))
    work = Work(flops=flops(row))
    row_contenders = [
        Contender("SDPA", lambda: _run(row, inputs(), _sdpa(row, inputs())), partial(truth, "softmax", False), work),
        Contender(
            "FlexAttention softmax",
            lambda: replace(
                _run(row, inputs(), _flex(row, inputs())), note="torch.compile'd; compiling is not counted"
            ),
            partial(truth, "softmax", False),
            work,
            lambda: _no_flex(row),
            switch="flex",
        ),
    ]
    for score in ("expressive", "softmax"):
        for impl, shared in (*((impl, False) for impl in IMPL_NAMES), ("native", True)):
            name = f"{score} {impl}" + ", k is v" * shared
            make = partial(_make_ours, row, inputs, score, impl, shared)
            why_not = partial(_no_ours, row, inputs, score, impl, shared)
            row_contenders.append(Contender(name, make, partial(truth, score, shared), work, why_not))
    return row_contenders


def heads(x_BLD: Tensor, row: Row) -> Tensor:
    """(B, N, L, H), a view."""
    return x_BLD.view(*x_BLD.shape[:2], row.shape.heads, -1).transpose(1, 2)


def _run(row: Row, inputs: Inputs, output: Callable[[float], Tensor], *, shared: bool = False) -> Run:
    """The run of a function of the probability of dropout."""
    leaves = {"query": inputs.q, "key": inputs.k} | ({} if shared else {"value": inputs.v})
    grad = heads(inputs.grad, row) if row.backward else None
    run = differentiable(partial(output, _dropout(row)), leaves, grad)
    sure = differentiable(partial(output, 0.0), leaves, grad)
    return replace(run, results=lambda: _checked(row, sure.results()))


def _checked(row: Row, results: Results) -> Results:
    """What the gate looks at, as (B, L, N, H): everything, or the outermost sequences and heads of a large row."""
    parts = {}
    for name, x in results.items():
        x_BLNH = x.transpose(1, 2) if name == "output" else x.view(*x.shape[:2], row.shape.heads, -1)
        parts[name] = _part(row, x_BLNH)
    return parts


def _part(row: Row, x_BLNH: Tensor) -> Tensor:
    batches, kept_heads = _kept(row)
    return x_BLNH[batches][:, :, kept_heads]


def _kept(row: Row) -> tuple[list[int], list[int]]:
    """The sequences and heads that the gate looks at."""
    B, N = row.shape.batch, row.shape.heads
    if B * N * row.shape.length**2 < SLICED:
        return list(range(B)), list(range(N))
    return sorted({0, B - 1}), sorted({0, N - 1})


def _truth(row: Row, inputs: Callable[[], Inputs], score: str, shared: bool) -> Results:
    """The same in float64 by the reference, one sequence at a time."""
    given = inputs()
    batches, kept_heads = _kept(row)
    parts: list[dict[str, Tensor]] = []
    for b in batches:
        q, k, v, grad = (
            x[b].detach().double().view(len(x[b]), row.shape.heads, -1)[:, kept_heads].transpose(0, 1)
            for x in (given.q, given.k, given.v, given.grad)
        )
        leaves = {"query": q, "key": k} | ({} if shared else {"value": v})
        for leaf in leaves.values():
            leaf.requires_grad_(row.backward)
        # A mask for all sequences has a single entry.
        mask = None if given.mask is None else given.mask[b % len(given.mask)]
        tensors, options = (q, k, k if shared else v), _options(row, mask, score, "reference")
        out: Tensor = ba.attention(*tensors, **options)
        grads = torch.autograd.grad(out, list(leaves.values()), grad) if row.backward else ()
        parts.append({"output": out.detach(), **dict(zip(leaves, grads, strict=False))})
    return {name: torch.stack([part[name] for part in parts]).transpose(1, 2) for name in parts[0]}


def _sdpa(row: Row, inputs: Inputs) -> Callable[[float], Tensor]:
    def output(dropout_p: float) -> Tensor:
        q, k, v = _tensors(row, inputs, shared=False)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=inputs.mask, dropout_p=dropout_p, is_causal=row.variant == "causal"
        )

    return output


def _flex(row: Row, inputs: Inputs) -> Callable[[float], Tensor]:
    flex = flex_attention(row.shape.length if row.variant == "causal" else None)
    with torch.no_grad():
        flex(*_tensors(row, inputs, shared=False))  # compiles
    return lambda _: flex(*_tensors(row, inputs, shared=False))


def _no_flex(row: Row) -> str | None:
    if row.backward:
        return "FlexAttention has no backward on the CPU"
    if row.variant not in ("plain", "causal"):
        return "set up here for plain and causal rows only"
    return None


def _options(row: Row, mask: Tensor | None, score: str, impl: str) -> dict[str, Any]:
    return {"score": score, "attn_mask": mask, "is_causal": row.variant == "causal", "impl": impl}


def _dropout(row: Row) -> float:
    return DROPOUT if row.variant == "dropout" else 0.0


def _tensors(row: Row, inputs: Inputs, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    k_BNSH = heads(inputs.k, row)
    return heads(inputs.q, row), k_BNSH, k_BNSH if shared else heads(inputs.v, row)


def _make_ours(row: Row, inputs: Callable[[], Inputs], score: str, impl: str, shared: bool) -> Run:
    given = inputs()
    options = _options(row, given.mask, score, impl)

    def output(dropout_p: float) -> Tensor:
        asked = options if dropout_p == _dropout(row) else options | {"impl": chosen}  # the gate looks at who is timed
        out: Tensor = ba.attention(*_tensors(row, given, shared), **asked, dropout_p=dropout_p)
        return out

    chosen = ba.explain(*_tensors(row, given, shared), **options, dropout_p=_dropout(row)).chosen
    return replace(_run(row, given, output, shared=shared), note=f"took {chosen}" if impl == "auto" else "")


def _no_ours(row: Row, inputs: Callable[[], Inputs], score: str, impl: str, shared: bool) -> str | None:
    if impl == "reference" and (reason := too_large(row.shape, row.dtype, backward=row.backward)):
        return reason
    given = inputs()
    options = _options(row, given.mask, score, impl)
    explanation = ba.explain(*_tensors(row, given, shared), **options, dropout_p=_dropout(row))
    return None if explanation.chosen else "; ".join(explanation.reasons[impl])


def too_large(shape: Shape, dtype: torch.dtype, *, backward: bool) -> str | None:
    """Why the reference should not be run, or None: it keeps about four tensors of ℓ × s weights at once, or ten."""
    weights = shape.batch * shape.heads * shape.length**2 * max(4, dtype.itemsize)
    needed, free = weights * (10 if backward else 4), machine.available_memory()
    if free is None or needed < free // 2:
        return None
    return f"its ℓ × s weights need about {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} that are free"


SUITE = Suite(
    "kernel",
    "the attention function at the papers' shapes, against F.scaled_dot_product_attention",
    contenders,
    shapes=(*PAPER, Shape(1, 1024, 512, 8), Shape(1, 4096, 512, 8)),
    quick=(Shape(64, 64, 128, 4),),
    variants=("plain", "causal", "padded", "mask", "dropout"),
    modes=("forward", "forward+backward"),
    skipped=lambda row: row.variant not in ("plain", "causal") and row.shape not in (PAPER[2], PAPER[3], PAPER[6]),
)
