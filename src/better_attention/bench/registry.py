"""What a benchmark is made of: suites of rows, contenders in each row, and the shapes of the papers.

A :class:`Row` says what is computed; a :class:`Contender` computes it. The first contender of a row is the baseline of
every ratio in it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from better_attention.bench import machine

Results = Mapping[str, Tensor]
"""What a call computes, by name: "output", and the gradient of each input and parameter."""


class Unavailable(Exception):  # noqa: N818 - not an error: a contender that is not here
    """A contender cannot run on this machine or in this row; the message says why."""


class Shape(NamedTuple):
    """Sizes of one row, in the order of the papers' tables.

    Args:
        batch: number of sequences.
        length: tokens ℓ of each; in the suites "decode" and "generation" those in the cache.
        width: model width d.
        heads: number of heads h; divides d.
    """

    batch: int
    length: int
    width: int
    heads: int

    @property
    def head_width(self) -> int:
        """Columns of one head."""
        return self.width // self.heads

    def __str__(self) -> str:
        return "x".join(map(str, self))


PAPER = (
    Shape(64, 32, 32, 4),
    Shape(64, 64, 64, 4),
    Shape(64, 64, 128, 4),
    Shape(32, 257, 256, 8),
    Shape(16, 196, 768, 12),
    Shape(8, 64, 1024, 4),
    Shape(2, 2048, 512, 8),
)
"""Layers of the experiments in arXiv 2403.01643, and one long sequence."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is computed.

    Args:
        suite, variant, mode: names within the registry, such as "kernel", "causal", "forward".
        shape: sizes.
        dtype: of every tensor.
    """

    suite: str
    shape: Shape
    variant: str
    mode: str
    dtype: torch.dtype

    @property
    def backward(self) -> bool:
        """Whether gradients are part of it."""
        return self.mode in ("forward+backward", "training")

    @property
    def name(self) -> str:
        """The row in one line."""
        b, n, d, h = self.shape
        length = {"decode": "keys", "generation": "tokens before"}.get(self.suite, "ℓ")
        return f"{self.suite}: batch {b}, {length} {n:,}, d {d}, h {h} (width {d // h}), {self.variant}, {self.mode}"


@dataclass(frozen=True, slots=True)
class Work:
    """What one call must do in any implementation; 0 and None where that is not counted.

    Args:
        flops: floating-point operations, a multiply-add as two.
        bytes: bytes that have to be read from memory.
        flop_ratio: the baseline's operations over this contender's.
    """

    flops: float = 0.0
    bytes: float = 0.0
    flop_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A contender set up for a row.

    Args:
        sample: seconds that the given number of consecutive calls take.
        results: computes once and returns what came out, for the gate.
        memory: bytes by which one call raises the high-water mark of resident memory; None: cannot be measured.
        note: shown beside the results.
        close: releases what garbage collection would not.
    """

    sample: Callable[[int], float]
    results: Callable[[], Results]
    memory: Callable[[], int | None]
    note: str = ""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Contender:
    """An implementation that computes a row, bound to its inputs.

    Args:
        name: unique within the row.
        make: sets it up; may raise :class:`Unavailable`.
        truth: the same results by the float64 reference.
        work: what one call must do.
        why_not: the reason why it cannot be set up, or None.
        switch: the option without which it is left out, because it takes long.
    """

    name: str
    make: Callable[[], Run]
    truth: Callable[[], Results]
    work: Work = Work()
    why_not: Callable[[], str | None] = lambda: None
    switch: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """Rows of one kind: the product of shapes, variants and modes.

    Args:
        name: what ``--suite`` calls it.
        summary: one line.
        contenders: those of a row, the baseline first. Inputs are made when the first contender needs them.
        shapes, quick: the rows' shapes, and those of ``--quick``.
        variants, modes: the other two axes.
        rates: what tables show beside times: ``"product"``, FLOP/s; ``"whole"``, FLOP/s and how the speed compares with
            the number of operations; ``"read"``, GB/s.
        skipped: rows of the default shapes that would tell little for their time.
        fits: whether there can be such a row; of those that cannot, none is made for any shape.
    """

    name: str
    summary: str
    contenders: Callable[[Row], list[Contender]]
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    variants: tuple[str, ...]
    modes: tuple[str, ...]
    rates: str = "product"
    skipped: Callable[[Row], bool] = lambda row: False
    fits: Callable[[Row], bool] = lambda row: True

    def rows(self, dtype: torch.dtype, shapes: tuple[Shape, ...] | None = None) -> list[Row]:
        """All rows, for the default shapes or others."""
        axes = product(shapes or self.shapes, self.variants, self.modes)
        every = (Row(self.name, shape, variant, mode, dtype) for shape, variant, mode in axes)
        possible = [row for row in every if self.fits(row)]
        # Shapes that somebody asked for are measured, however long that takes.
        return possible if shapes else [row for row in possible if not self.skipped(row)]


def here(call: Callable[[], object], results: Callable[[], Results], *, grad: bool, note: str = "") -> Run:
    """The run of a contender that computes in this process.

    Args:
        call: what is timed.
        results: the same, for the gate.
        grad: whether autograd records.
    """

    def sample(calls: int) -> float:
        with torch.set_grad_enabled(grad):
            start = perf_counter()
            for _ in range(calls):
                call()
            return perf_counter() - start

    def memory() -> int | None:
        with torch.set_grad_enabled(grad):
            # Reference cycles of earlier calls could otherwise be freed during this one and hide a part of what it
            # takes.
            gc.collect()
            return machine.extra_memory(call)

    def checked() -> Results:
        with torch.set_grad_enabled(grad):
            return {name: x.detach().clone() for name, x in results().items()}

    return Run(sample, checked, memory, note)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers that depend on the seed and the shape alone."""
    # Drawn in float32 for every dtype, so that lower precision gets the same numbers, rounded.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def differentiable(output: Callable[[], Tensor], leaves: Mapping[str, Tensor], grad: Tensor | None) -> Run:
    """The run of a function of ``leaves``: forward alone (``grad`` None), or with the gradients of sum(output grad)."""

    def results() -> Results:
        out = output()
        if grad is None:
            return {"output": out}
        grads = torch.autograd.grad(out, list(leaves.values()), grad)
        return {"output": out, **dict(zip(leaves, grads, strict=True))}

    return here(results if grad is not None else output, results, grad=grad is not None)
