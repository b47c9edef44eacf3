"""The suite "align": the alignment kernel W_A on the values, against ``torch.matmul`` and a bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from better_attention.bench.registry import PAPER, Contender, Results, Row, Run, Suite, Work, differentiable, normal
from better_attention.layer.alignment import Alignment


@dataclass(frozen=True, slots=True)
class Inputs:
    """W_A (S, S), its bias (S), the value and the gradient of the output (B, S, D)."""

    weight: Tensor
    bias: Tensor
    value: Tensor
    grad: Tensor

    @classmethod
    def of(cls, row: Row) -> Inputs:
        """The inputs of a row, the same in every run."""
        S, size = row.shape.length, row.shape[:3]
        # The sum over S values then has variance 1 at any length.
        weight = normal(0, S, S, dtype=torch.float32) / S**0.5
        weight, bias = weight.to(row.dtype), normal(1, S, dtype=row.dtype)
        value, grad = (normal(seed, *size, dtype=row.dtype) for seed in (2, 3))
        for leaf in (weight, bias, value):
            leaf.requires_grad_(row.backward)
        return cls(weight, bias, value, grad)


def contenders(row: Row) -> list[Contender]:
    """``weight @ value + bias``, the weight's upper triangle zeroed first where it is causal; and our module."""
    inputs = cache(partial(Inputs.of, row))
    truth = cache(partial(_truth, row, inputs))
    return [
        Contender("torch.matmul", partial(_make_matmul, row, inputs), truth, work(row)),
        Contender("Alignment", partial(_make_ours, row, inputs), truth, work(row)),
    ]


def work(row: Row) -> Work:
    """2 B S² D operations forward, twice that more for the two products of backward; causal counts half."""
    forward = 2.0 * row.shape.batch * row.shape.width * row.shape.length**2
    return Work(flops=forward * (3.0 if row.backward else 1.0) * (0.5 if row.variant == "causal" else 1.0))


def _matmul(row: Row, weight: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    return (weight.tril() if row.variant == "causal" else weight) @ value + bias[:, None]


def _make_matmul(row: Row, inputs: Callable[[], Inputs]) -> Run:
    given = inputs()
    return _run(row, given, lambda: _matmul(row, given.weight, given.bias, given.value))


def _make_ours(row: Row, inputs: Callable[[], Inputs]) -> Run:
    given = inputs()
    # Meta, as its own numbers would be thrown away; the parameters are the tensors that the baseline uses too.
    module = Alignment(row.shape.length, row.shape.heads, causal=row.variant == "causal", device="meta")
    module.weight, module.bias = (nn.Parameter(x.detach(), row.backward) for x in (given.weight, given.bias))
    ours = Inputs(module.weight, module.bias, given.value, given.grad)
    return _run(row, ours, lambda: module(given.value))


def _run(row: Row, given: Inputs, output: Callable[[], Tensor]) -> Run:
    leaves = {"weight": given.weight, "bias": given.bias, "value": given.value}
    return differentiable(output, leaves, given.grad if row.backward else None)


def _truth(row: Row, inputs: Callable[[], Inputs]) -> Results:
    """The same in float64."""
    given = inputs()
    names = ("weight", "bias", "value")
    leaves = {name: getattr(given, name).detach().double().requires_grad_(row.backward) for name in names}
    output = _matmul(row, **leaves)
    grads = torch.autograd.grad(output, list(leaves.values()), given.grad.double()) if row.backward else ()
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=False))}


SUITE = Suite(
    "align",
    "W_A on the values at the papers' shapes, against torch.matmul",
    contenders,
    shapes=PAPER,
    quick=(PAPER[2],),
    variants=("plain", "causal"),
    modes=("forward", "forward+backward"),
)
