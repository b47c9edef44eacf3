"""Dropout whose masks follow the samples of a batch, however many processes share that batch.

What is dropped is a function of a seed, of the sample's place in the whole batch, and of the place in the sample
(``native/cpp/dropout.hpp`` has the rule). The seed is drawn from the CPU's default generator, once for each call. Two
processes that draw the same seeds and say which samples are theirs (:func:`batch_share`) therefore drop together what
one process drops alone, and a model trains alike on one and on many.

>>> x, mine = torch.ones(6, 4), [1, 3, 5]
>>> with batch_share(0, 1):  # one process, all samples
...     _ = torch.manual_seed(0)
...     whole = dropout(x, 0.5)
>>> with batch_share(1, 2):  # the second of two
...     _ = torch.manual_seed(0)
...     torch.equal(dropout(x[mine], 0.5), whole[mine])
True
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from better_attention import operators
from better_attention.call.torch_state import address, operator_obstacles
from better_attention.errors import check_int
from better_attention.native import structs
from better_attention.native.library import call as call_library
from better_attention.native.library import current_instruction_set, missing

SEEDS = 2**63 - 1


class Share(NamedTuple):
    """The samples of a batch that this process has: ``first``, ``first + step``, ... of the whole batch."""

    first: int
    step: int


# Not a global variable, so that another thread keeps its own.
_share: ContextVar[Share | None] = ContextVar("the samples of a batch that this process has", default=None)


@contextmanager
def batch_share(first: int, step: int) -> Iterator[None]:
    """Let dropout follow the samples while the context lasts, in eager mode: attention weights, and :func:`dropout`.

    Every process of a training has to draw the same seeds, so it is seeded alike on all of them.

    Args:
        first: place in the whole batch of this process's first sample, its rank for example.
        step: distance between two of them, the number of processes for example.

    Raises:
        ValueError, TypeError: ``first`` below 0, or ``step`` below 1.
    """
    token = _share.set(Share(check_int(first, "first", at_least=0), check_int(step, "step")))
    try:
        yield
    finally:
        _share.reset(token)


def follows_samples() -> bool:
    """Whether dropout follows the samples of a batch here and now."""
    # A compiled program would keep the answer of the call in which it was traced.
    return not torch.compiler.is_compiling() and _share.get() is not None


def drawn_seed() -> Tensor:
    """The next seed of the CPU's default generator, which ``torch.manual_seed`` and checkpointing control.

    Returns:
        int64: (), or (3,) within :func:`batch_share`: the seed, ``first`` and ``step``.
    """
    # A tensor: a number drawn in Python would become a constant of a compiled program, one mask for ever.
    seed = torch.randint(SEEDS, (), device="cpu")
    if torch.compiler.is_compiling() or (share := _share.get()) is None:
        return seed
    return torch.tensor([seed.item(), *share])


def parts(seed: Tensor) -> tuple[int, int, int]:
    """Seed, first and step of :func:`drawn_seed`."""
    return (int(seed), 0, 1) if seed.ndim == 0 else tuple(seed.tolist())


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """``F.dropout``; within :func:`batch_share` its mask follows the samples.

    Args:
        x: (B, ...), any floating dtype.
        p: probability, 0 to 1, that a number is dropped.
        training: whether anything is.

    Raises:
        ValueError: ``p`` is no probability.
    """
    if not follows_samples():
        return F.dropout(x, p, training)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be a number from 0 to 1, received {p!r}.")
    if p == 0.0 or not training:
        return x
    # Drawn even where this process has no sample in a short last batch: the seeds that follow are those of all.
    seed = drawn_seed()
    if x.numel() == 0:
        return x
    if x.dtype == torch.float32 and x.device.type == "cpu" and missing() is None and not operator_obstacles({"x": x}):
        dropped: Tensor = _operator(Arguments(x, seed, p))
        return dropped
    kept = keep(seed, p, (x.shape[0], 1, *_rows(x)), x.device)
    return torch.where(kept.view(x.shape), x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def uniform(rows: int, columns: int, device: torch.device) -> Tensor:
    """Numbers in 0 ... 1, float32 (rows, columns), for one sample in each row.

    Within :func:`batch_share` they follow the samples; else they are those of the device's default generator.
    """
    if not follows_samples():
        return torch.rand(rows, columns, device=device)
    seed, first, step = parts(drawn_seed())
    places = torch.arange(rows, device=device)[:, None] * step + first
    numbers = _row_numbers(seed, places * columns + torch.arange(columns, device=device))
    # 24 bits, as many as float32 holds: more could round up to 1.
    return _shifted(numbers, 40).float() * 2.0**-24


def keep(seed: Tensor, p: float, shape: Sequence[int], device: torch.device) -> Tensor:
    """What is kept of the numbers (B, N, L, S), bool, in plain torch: the rule of the compiled kernels.

    Args:
        seed: from :func:`drawn_seed`.
        p: probability that a number is dropped.
        shape: B, N, L, S.
        device: of the result.
    """
    (B, N, L, S), (number, first, step) = shape, parts(seed)
    places = torch.arange(B, device=device)[:, None] * step + first
    rows = _row_numbers(number, places * (N * L) + torch.arange(N * L, device=device))[..., None]
    salt = int(_splitmix64(torch.tensor(number))) & _WORD
    keys = _meet((torch.arange(S, device=device) * 0x9E3779B9 + salt) & _WORD, 0)
    dropped = _meet((rows & _WORD) ^ keys, _shifted(rows, 32)) < math.floor(p * 2**32)
    return ~(dropped if p < 1.0 else torch.ones_like(dropped)).view(B, N, L, S)


# --- the rule in torch, whose int64 stands for uint64 -----------------------------------------------------------------

_WORD = 2**32 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(number: int) -> int:
    """The int64 with the bits of a number below 2^64."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` as of unsigned numbers: torch's own fills up with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _row_numbers(seed: int, rows: Tensor) -> Tensor:
    return _splitmix64(seed + (2 * rows + 1) * _signed(_GOLDEN))


def _meet(x: Tensor, extra: Tensor | int) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D + extra) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


# --- the compiled kernel ----------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """What the operator is called with.

    Args:
        x: (B, ...), float32.
        seed: from :func:`drawn_seed`.
        p: probability that a number is dropped.
    """

    x: Tensor
    seed: Tensor
    p: float


def _rows(x: Tensor) -> tuple[int, int]:
    """Rows in a sample, and the numbers in a row."""
    width = x.shape[-1] if x.ndim > 1 else 1
    return (math.prod(x.shape[1:-1]), width)


def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    c = structs.Drop()
    c.isa, c.threads, c.dropout = current_instruction_set(), torch.get_num_threads(), p
    c.seed, c.batch_first, c.batch_step = parts(seed)
    c.B, c.N, (c.L, c.S) = x.shape[0], 1, _rows(x)
    c.x, c.out = address(x), out.data_ptr()
    call_library("ba_drop_numbers", c)
    return out


class _Drop(operators.Definition[Arguments]):
    """Result: x with some numbers dropped, contiguous."""

    name = "dropout"
    arguments = Arguments
    differentiable = ("x",)
    device_type = "cpu"
    refuses_second = "dropout that follows the samples has a first derivative only."

    def forward(self, a: Arguments) -> tuple[Tensor]:
        return (_dropped(a.x, a.seed, a.p),)

    def fake(self, a: Arguments) -> tuple[Tensor]:
        return (torch.empty_like(a.x, memory_format=torch.contiguous_format),)

    def backward(
        self, grad: Tensor, a: Arguments, results: operators.Tensors, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return (_dropped(grad, a.seed, a.p),)

    def empty_gradient(self, argument: Tensor) -> Tensor:
        return torch.empty_like(argument, memory_format=torch.contiguous_format)

    def flops(self, *shapes: Any) -> int:
        """One multiplication for each number."""
        return math.prod(shapes[0])

    def backward_flops(self, wanted: Sequence[bool], *shapes: Any) -> int:
        return self.flops(*shapes)


_operator = operators.register(_Drop())
