"""The suite "decode": one query over a long key/value cache, where reading memory is the whole cost.

A decoder's caches are cold: between two uses of one lie the rest of the model and the other layers. So the calls
rotate over a pool of caches larger than the processor's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from torch import Tensor
from torch.nn import functional as F

import better_attention as ba
from better_attention.bench import decode_caches, machine
from better_attention.bench.registry import Contender, Results, Row, Run, Shape, Suite, Work, normal

SMALLEST_POOL = 256 << 20
"""Bytes of all caches together, at least; more where the last-level cache is larger, if that fits into memory."""
MOST_PAIRS = 256
"""Of key and value, however small they are."""
APART, JOINED = "cache (B, N, S, H)", "cache (B, S, N H)"


@dataclass(frozen=True, slots=True)
class Inputs:
    """A query (B, N, 1, H) and a pool of keys and values (B, N, S, H); number 2 i + 1 is the value of key 2 i."""

    query: Tensor
    pool: tuple[Tensor, ...]

    @classmethod
    def of(cls, row: Row) -> Inputs:
        """The inputs of a row, the same in every run on this machine."""
        B, S, D, N = row.shape
        query = normal(0, B, 1, D, dtype=row.dtype)
        pairs = range(_pairs(row))
        pool = [normal(1 + i, *_sizes(row), dtype=row.dtype) for pair in pairs for i in (2 * pair, 2 * pair + 1)]
        if row.variant == JOINED:
            pool = [x.view(B, S, N, D // N).transpose(1, 2) for x in pool]
        return cls(query.view(B, 1, N, D // N).transpose(1, 2), tuple(pool))


def _sizes(row: Row) -> tuple[int, ...]:
    B, S, D, N = row.shape
    return (B, S, D) if row.variant == JOINED else (B, N, S, D // N)


def _pairs(row: Row) -> int:
    """How many pairs of key and value make the pool."""
    wanted = max(SMALLEST_POOL, machine.last_level_cache() or 0)
    affordable = (machine.available_memory() or 8 * SMALLEST_POOL) // 4
    pair = 2 * _tensor_bytes(row)
    return max(1, min(-(-wanted // pair), affordable // pair, MOST_PAIRS))


def _tensor_bytes(row: Row) -> int:
    return row.shape.batch * row.shape.length * row.shape.width * row.dtype.itemsize


def contenders(row: Row) -> list[Contender]:
    """SDPA and ours, with key and value apart and with one tensor that serves as both; then caches of other kinds."""
    inputs = cache(partial(Inputs.of, row))
    truth = cache(partial(_truth, inputs))
    row_contenders = []
    for shared in (False, True):
        sdpa = partial(_make, row, inputs, lambda q, k, v: F.scaled_dot_product_attention(q, k, v), shared)
        name = "SDPA" + ", k is v" * shared
        row_contenders.append(Contender(name, sdpa, partial(truth, "softmax", shared), work(row, shared)))
    for score in ("softmax", "expressive"):
        for impl in ("auto", "native"):
            for shared in (False, True):
                make = partial(_make_ours, row, inputs, score, impl, shared)
                why_not = partial(_no_ours, inputs, score, impl, shared)
                name = f"{score} {impl}" + ", k is v" * shared
                row_contenders.append(Contender(name, make, partial(truth, score, shared), work(row, shared), why_not))
    return row_contenders + decode_caches.contenders(row, inputs)


def work(row: Row, shared: bool) -> Work:
    """4 B N S H operations; all of key and value must be read, or of the one tensor that is both."""
    B, S, D, _ = row.shape
    return Work(flops=4.0 * B * S * D, bytes=float((1 if shared else 2) * _tensor_bytes(row)))


def _make(
    row: Row,
    inputs: Callable[[], Inputs],
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    shared: bool,
    *,
    note: str = "",
) -> Run:
    given = inputs()
    return decode_caches.rotating(function, given.query, decode_caches.pairs(given, shared), note)


def _make_ours(row: Row, inputs: Callable[[], Inputs], score: str, impl: str, shared: bool) -> Run:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ba.attention(q, k, v, score=score, impl=impl)

    chosen = ba.explain(inputs().query, *decode_caches.pairs(inputs(), shared)[0], score=score, impl=impl).chosen
    return _make(row, inputs, function, shared, note=f"took {chosen}" if impl == "auto" else "")


def _no_ours(inputs: Callable[[], Inputs], score: str, impl: str, shared: bool) -> str | None:
    explanation = ba.explain(inputs().query, *decode_caches.pairs(inputs(), shared)[0], score=score, impl=impl)
    return None if explanation.chosen else "; ".join(explanation.reasons[impl])


def _truth(inputs: Callable[[], Inputs], score: str, shared: bool) -> Results:
    """The first cache's output in float64 by the reference, one sequence at a time."""
    return {"output": decode_caches.exactly(inputs().query, *decode_caches.pairs(inputs(), shared)[0], score)}


SUITE = Suite(
    "decode",
    "one query over a long cache, against F.scaled_dot_product_attention",
    contenders,
    shapes=tuple(Shape(batch, keys, 768, 12) for batch in (1, 8) for keys in (4096, 16384)),
    quick=(Shape(1, 4096, 768, 12),),
    variants=(APART, JOINED),
    modes=("forward",),
    rates="read",
)
