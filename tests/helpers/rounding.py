"""How far rounding may move a result: a bound from the arithmetic alone, the same on every machine.

A formula is evaluated in float64, and each of its operations is followed by an error drawn at random, whose size is
that of the rounding which the operation has in a narrower format (Monte Carlo arithmetic). How these errors reach the
result, through cancellation, exponentials and divisions, is then the condition of the problem itself. With u the unit
roundoff of the format:

* A rounded number is off by up to half a unit in the last place, uniformly. Relative to the number, whose mantissa is
  distributed logarithmically, the root mean square is u / sqrt(8 log 2) = 0.42 u.
* A sum of n terms t rounds n partial sums. Over all orders of the terms, the squares of the partial sums come to
  (n + 1) (sum t² / 6 + (sum t)² / 3) on average. Where the terms are products, each is rounded too: sum t² more.
* No sum runs over more than ``RUN`` terms; a longer one consists of parts, which are then added up.

Each draw is one way of rounding. A right result is another one, so that its error is about as large as those of the
draws; a result that lost more digits than its formula loses is beyond them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

RUN = 512
"""Terms that are added up one after the other, at most."""

NUMBERS = 10_000
"""Numbers of a result that are drawn to estimate the size of its error: those of 4 to 12 evaluations."""

UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""Unit roundoff of each format."""

DEVIATIONS = 5
"""How many standard deviations an error may be: not one of a million normal numbers is expected to be larger."""

TYPICAL = 1 / math.sqrt(8 * math.log(2))
"""Root mean square of a rounding error, relative to what is rounded, in units of the unit roundoff."""


@cache
def normal_numbers() -> Tensor:
    """A million standard normal numbers, always the same."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 20))


class Rounding:
    """Draws the rounding errors of one evaluation.

    Args:
        rng: where they are drawn from.
        stored: the format of results and of what passes from one step to the next, as between projection and scores.
        inner: the format in which weights and their gradients are multiplied; sums are kept in float32 at least.
    """

    def __init__(
        self, rng: np.random.Generator, stored: torch.dtype = torch.float32, inner: torch.dtype = torch.float32
    ) -> None:
        self.rng, self.stored, self.inner = rng, stored, inner

    def normal(self, x: Tensor) -> Tensor:
        """Standard normal numbers in the shape of ``x``, from a random place on in numbers that are drawn once."""
        pool, count = normal_numbers(), x.numel()
        if count > len(pool) // 4:
            return torch.from_numpy(self.rng.standard_normal(tuple(x.shape)))
        start = int(self.rng.integers(len(pool) - count))
        return pool[start : start + count].view(x.shape)

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``x``, rounded; below the smallest normal number a unit is no smaller than there."""
        size = x if dtype == torch.float32 else x.abs().clamp_min(torch.finfo(dtype).tiny).masked_fill(x == 0, 0)
        return torch.addcmul(x, size, self.normal(x), value=TYPICAL * UNIT[dtype])

    def store(self, x: Tensor) -> Tensor:
        return x if self.stored == torch.float32 else self(x, self.stored)

    def multiplied(self, x: Tensor) -> Tensor:
        return x if self.inner == torch.float32 else self(x, self.inner)

    def summed(self, total: Tensor, squares: Tensor, n: int, *, products: bool = True) -> Tensor:
        """A sum of n terms, given exactly, with its rounding errors; ``squares`` is the sum of the terms' squares."""
        parts = -(-n // RUN)
        variance = (min(n, RUN) + 1) * (squares / 6 + total.square() / (3 * parts)) + (squares if products else 0)
        if parts > 1:
            variance = variance + (parts + 1) * (squares / 6 + total.square() / 3)
        return torch.addcmul(total, variance.sqrt_(), self.normal(total), value=TYPICAL * UNIT[torch.float32])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product a b."""
        return self.summed(a @ b, a.square() @ b.square(), a.shape[-1])


class Rounded(torch.autograd.Function):
    """A number as it is, rounded, and so its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return rounding.store(rounding(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rounding.store(ctx.rounding(grad)), None


class Linear(torch.autograd.Function):
    """x Wᵀ + b with rounding, forward and backward. Every step's result is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rounding, ctx.biased = rounding, bias is not None
        y = rounding.product(x, weight.transpose(-1, -2))
        return rounding.store(y if bias is None else rounding(y + bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), rounding = ctx.saved_tensors, ctx.rounding
        rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
        bias = rounding.summed(rows.sum(0), rows.square().sum(0), len(rows), products=False) if ctx.biased else None
        return (
            rounding.store(rounding.product(grad, weight)),
            rounding.store(rounding.product(rows.transpose(0, 1), columns)),
            None if bias is None else rounding.store(bias),
            None,
        )


class Align(torch.autograd.Function):
    """W_A V + a 1ᵀ with rounding: W_A (1 or N, S, S), V (B, N, S, H), a (S), (1, S) or (N, S)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, v: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(weight, v)
        ctx.rounding, ctx.shape = rounding, None if bias is None else bias.shape
        mixed = rounding.product(weight, v)
        return rounding.store(mixed if bias is None else rounding(mixed + bias[..., None]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, v), rounding = ctx.saved_tensors, ctx.rounding

        def columns(x: Tensor) -> Tensor:  # of all that one W_A serves: (1 or N, S, ...)
            return (
                x.transpose(0, 1).transpose(1, 2).flatten(2)
                if weight.shape[0] > 1
                else x.movedim(2, 0).flatten(1)[None]
            )

        g = columns(grad)
        bias = None
        if ctx.shape is not None:
            bias = rounding.store(rounding.summed(g.sum(-1), g.square().sum(-1), g.shape[-1], products=False))
        return (
            rounding.store(rounding.product(g, columns(v).transpose(-1, -2))),
            rounding.store(rounding.product(weight.transpose(-1, -2), grad)),
            None if bias is None else bias.reshape(ctx.shape),
            None,
        )


class Attention(torch.autograd.Function):
    """softmax or expressive attention with rounding; rows that see nothing are zero.

    q (B, N, L, H), k (B, N, S, H), v (B, N, S, W), keep and bias (B, N, L, S). The weights are computed again for the
    backward pass, and its normaliser's share is upstream·output, as in every implementation that keeps no weights.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None, score: str, scale: float,
        rounding: Rounding,
    ) -> Tensor:  # fmt: skip
        r = rounding
        z = r.product(r(q * scale), k.transpose(-1, -2))
        x = z if score == "softmax" else torch.zeros_like(z)
        x = x if bias is None else r(x + bias)
        x = x.masked_fill(~keep, -torch.inf)
        exponent = x - x.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        # Rounded are the difference from the maximum, its product with log2 e, and the exponential.
        e = r(r(r(exponent.nan_to_num(neginf=0.0))).exp()).masked_fill(~keep, 0.0)
        if score == "expressive":
            square = r(z.square())
            e = r(e * r(square / r(1 + square)))
        total = r.summed(e.sum(-1, keepdim=True), e.square().sum(-1, keepdim=True), e.shape[-1], products=False)
        inverse = r(torch.where(total == 0, 0, 1 / total))
        output = r.store(r(r.product(r.multiplied(e), v) * inverse))
        ctx.save_for_backward(q, k, v, z, e, inverse, output)
        ctx.options = score, scale, r
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, z, e, inverse, output = ctx.saved_tensors
        score, scale, r = ctx.options
        weights = r(e * inverse)
        share = (grad * output).sum(-1, keepdim=True)
        share = r.summed(share, (grad * output).square().sum(-1, keepdim=True), grad.shape[-1])
        dz = r(r(r.product(grad, v.transpose(-1, -2)) - share) * scale)
        slope = weights
        if score == "expressive":  # of log z²/(1 + z²): 2 / (z (1 + z²))
            alive = (z != 0) & (weights != 0)
            slope = torch.where(alive, r(weights * r(2 / r(z * r(1 + z.square())))), 0)
        dz = r.multiplied(r(slope * dz))
        return (
            r.store(r.product(dz, k)),
            r.store(r.product(dz.transpose(-1, -2), q)),
            r.store(r.product(r.multiplied(weights).transpose(-1, -2), grad)),
            *[None] * 5,
        )


@dataclass(frozen=True)
class Error:
    """How large the error of one result may be: at its largest element, and on average over the elements."""

    largest: float
    mean: float

    def __mul__(self, factor: float) -> Error:
        return Error(self.largest * factor, self.mean * factor)


def expected_errors(draw: Callable[[], list[Tensor]], exact: list[np.ndarray]) -> list[Error]:
    """The errors that rounding may lead to in each result of a formula, from several evaluations of it.

    Each element's error has a root mean square over the draws: the largest error is allowed to be ``DEVIATIONS`` times
    the largest of them. The mean error may be 1.5 times that of the draws on average, and 3 standard deviations of
    what it varies by from draw to draw more. A root mean square of few numbers is uncertain itself: both bounds grow by
    :func:`uncertainty`.
    """
    draws = min(12, max(4, NUMBERS // max(1, *(x.size for x in exact))))
    errors = []
    for _ in range(draws):
        results = draw()
        assert all(x.dtype == torch.float64 for x in results), "this machine's narrower arithmetic is no yardstick"
        errors.append([np.abs(x.detach().numpy() - e) for x, e in zip(results, exact, strict=True)])
    result = []
    for each in zip(*errors, strict=True):
        means = [float(np.mean(x)) if x.size else 0.0 for x in each]
        sizes = np.sqrt(np.mean(np.square(each), axis=0))
        largest = float(sizes.max(initial=0.0))
        wider = uncertainty(draws * int(np.count_nonzero(sizes >= largest / 10)))
        spread = float(np.std(means, ddof=1))
        result.append(Error(wider * DEVIATIONS * largest, wider * 1.5 * (float(np.mean(means)) + 3 * spread)))
    return result


@cache
def uncertainty(count: int) -> float:
    """How much wider than with a known deviation a bound has to be whose deviation comes from ``count`` numbers.

    The quantile of Student's distribution over that of the normal one, at equal probability.

    >>> round(uncertainty(4), 1), round(uncertainty(12), 1), round(uncertainty(1000), 2)
    (11.4, 1.9, 1.01)
    """
    if count == 0:  # no element at all
        return 1.0
    return float(stats.t.isf(stats.norm.sf(DEVIATIONS), count)) / DEVIATIONS
