"""Contenders of the suite "decode" that read caches in another way: plainly, grouped, in a window, rotated, in int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import better_attention as ba
from better_attention.bench.registry import Contender, Results, Row, Run, Work, here
from better_attention.cache.int8 import dequantised, quantised, row_bytes
from better_attention.call.call import Call
from better_attention.impl import native
from better_attention.positions import rotary_angles, rotate

WINDOW = 1024
GROUP = 4
"""Query heads that share one of keys and values, in the contenders called grouped."""


class Drawn(Protocol):
    """A query (B, N, 1, H) and a pool of caches (B, N, S, H)."""

    @property
    def query(self) -> Tensor:
        """The query."""

    @property
    def pool(self) -> tuple[Tensor, ...]:
        """Keys and values."""


class Kind(NamedTuple):
    """A way to keep and read a cache.

    Args:
        prepare: what is kept, from key and value.
        compute: the output, from the query and what is kept.
        exact: the same in float64, in whatever way.
        bytes: what a call reads, as a share of one tensor in the row's dtype, times two where key and value are apart.
        group: query heads that share one of keys and values.
    """

    prepare: Callable[[Tensor, Tensor], tuple[Any, ...]]
    compute: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    bytes: Callable[[Row], float]
    group: int = 1


def contenders(row: Row, inputs: Callable[[], Drawn]) -> list[Contender]:
    """One for each kind, with key and value apart and as one tensor where both make sense."""
    found = []
    for name, (kind, shares) in _kinds().items():
        for shared in shares:
            kept = partial(_kept, inputs, kind, shared)
            B, S, D, _ = row.shape
            tensor = float(B * S * D * row.dtype.itemsize)
            work = Work(flops=4.0 * B * S * D, bytes=tensor * (1 if shared else 2) * kind.bytes(row))
            make = partial(_make, inputs, kind, kept)
            truth = cache(partial(_truth, inputs, kind, kept))
            why_not = partial(_no, row, kind)
            found.append(Contender(name + ", k is v" * shared, make, truth, work, why_not))
    return found


def rotating(function: Callable[..., Tensor], query: Tensor, caches: Sequence[tuple[Any, ...]], note: str = "") -> Run:
    """Calls of a function, each with the next one of some caches."""
    turn = count()

    def call() -> Tensor:
        return function(query, *caches[next(turn) % len(caches)])

    tensors = {x.data_ptr(): x.nbytes for kept in caches for x in kept if isinstance(x, Tensor)}
    pool = f"rotating over {len(caches)} caches, {sum(tensors.values()) / 2**20:.0f} MiB in all"
    results = lambda: {"output": function(query, *caches[0])}  # noqa: E731
    return here(call, results, grad=False, note=f"{note}, {pool}" if note else pool)


def pairs(inputs: Drawn, shared: bool) -> list[tuple[Tensor, Tensor]]:
    """Key and value of each cache; one tensor that is both where they are ``shared``."""
    pool = inputs.pool
    return [(x, x) for x in pool] if shared else list(zip(pool[::2], pool[1::2], strict=True))


def _make(inputs: Callable[[], Drawn], kind: Kind, kept: Callable[[], list[tuple[Any, ...]]]) -> Run:
    return rotating(kind.compute, inputs().query, kept())


def _truth(inputs: Callable[[], Drawn], kind: Kind, kept: Callable[[], list[tuple[Any, ...]]]) -> Results:
    return {"output": kind.exact(inputs().query, *kept()[0])}


def _kept(inputs: Callable[[], Drawn], kind: Kind, shared: bool) -> list[tuple[Any, ...]]:
    return [kind.prepare(key, value) for key, value in pairs(inputs(), shared)]


def _no(row: Row, kind: Kind) -> str | None:
    """Why a kind cannot be measured here."""
    if kind.exact is _rotated_exactly and row.shape.width // row.shape.heads % 2:
        return "rotary positions turn pairs of features, and the head width is odd"
    if row.shape.heads % kind.group:
        return f"{row.shape.heads} heads are no multiple of {kind.group}"
    reason = native.missing()
    return None if reason is None else f"the compiled kernels are missing: {reason}"


def _kinds() -> dict[str, tuple[Kind, tuple[bool, ...]]]:
    """By name: the kind, and whether key and value are one tensor, for each contender of that name."""
    both = (False, True)
    as_given = lambda key, value: (key, value)  # noqa: E731
    scores = ("softmax", "expressive")
    return {
        "plain read": (Kind(as_given, _read, _read_exactly, lambda row: 1.0), both),
        "SDPA grouped": (
            Kind(_fewer, _grouped_sdpa, _grouped_exactly("softmax"), lambda row: 1 / GROUP, GROUP),
            (False,),
        ),
        **{
            f"{score} grouped": (
                Kind(_fewer, partial(_grouped, score), _grouped_exactly(score), lambda row: 1 / GROUP, GROUP),
                (False,),
            )
            for score in scores
        },
        f"softmax window {WINDOW}": (
            Kind(as_given, _windowed, _windowed_exactly, lambda row: min(1.0, WINDOW / row.shape.length)),
            both,
        ),
        "softmax rotated outside": (Kind(_with_tables, _rotated_outside, _rotated_exactly, lambda row: 1.0), (True,)),
        "softmax rotated": (Kind(_with_tables, _rotated, _rotated_exactly, lambda row: 1.0), (True,)),
        **{
            f"{score} int8": (
                Kind(_in_int8, partial(_int8, score), partial(_int8_exactly, score), _int8_bytes),
                both,
            )
            for score in scores
        },
    }


def exactly(query: Tensor, key: Tensor, value: Tensor, score: str = "softmax", **options: Any) -> Tensor:
    """In float64 by the reference, one sequence at a time."""
    parts = [
        ba.attention(q.double(), k.double(), v.double(), score=score, impl="reference", **options)
        for q, k, v in zip(query, key, value, strict=True)
    ]
    return torch.stack(parts)


# --- what can be read at best -----------------------------------------------------------------------------------------


def _lines(x: Tensor) -> Tensor:
    """The numbers of each sequence in the order in which they lie."""
    return (x if x.is_contiguous() else x.transpose(1, 2)).flatten(1)


def _read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every number read once, by the simplest operation of torch: a product of both, or the square of one."""
    # A product for each sequence: one float32 that adds up a hundred million squares is off by 4e-4 of their sum.
    first = _lines(key)
    second = first if key is value else _lines(value)
    return torch.stack([torch.dot(a, b) for a, b in zip(first, second, strict=True)]) / first.shape[1]


def _read_exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _read(query, key.double(), value.double())


# --- fewer heads of keys and values than of queries -------------------------------------------------------------------


def _fewer(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The first heads alone, in memory of their own, in the layout of what was given."""

    def first(x: Tensor) -> Tensor:
        heads = x[:, : x.shape[1] // GROUP]
        return heads.contiguous() if x.is_contiguous() else heads.transpose(1, 2).contiguous().transpose(1, 2)

    return first(key), first(value)


def _grouped_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def _grouped(score: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ba.attention(query, key, value, score=score, enable_gqa=True)


def _grouped_exactly(score: str) -> Callable[..., Tensor]:
    return partial(exactly, score=score, enable_gqa=True)


# --- windows ----------------------------------------------------------------------------------------------------------


def _windowed(query: Tensor, key: Tensor, value: Tensor, impl: str = "native") -> Tensor:
    last = key.shape[2] - 1
    return ba.attention(query, key, value, is_causal=True, offset=last, window=WINDOW, impl=impl)


def _windowed_exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return exactly(query, key, value, is_causal=True, offset=key.shape[2] - 1, window=WINDOW)


# --- keys that are turned by their place ------------------------------------------------------------------------------


def _with_tables(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return key, *rotary_angles(torch.arange(key.shape[2]), key.shape[3])


def _rotated(query: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    output = native.decode(Call(query, x, x, scale=x.shape[3] ** -0.5), angles=(cos, sin))
    if output is None:
        raise RuntimeError("the kernels do not serve this call.")
    return output


def _rotated_outside(query: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ba.attention(query, rotate(x, cos, sin), x, impl="native")


def _rotated_exactly(query: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return exactly(query, rotate(x.double(), cos.double(), sin.double()), x)


# --- int8 -------------------------------------------------------------------------------------------------------------


def _in_int8(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Codes (B, N, S, H) in the layout of what was given, and scales (B, S, N)."""

    def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantised(x.transpose(1, 2).flatten(2), x.shape[1])
        heads = codes.unflatten(2, (x.shape[1], -1)).transpose(1, 2)
        return heads.contiguous() if x.is_contiguous() else heads, scale

    keys = narrow(key)
    return *keys, *(keys if value is key else narrow(value))


def _int8(score: str, query: Tensor, key: Tensor, k_scale: Tensor, value: Tensor, v_scale: Tensor) -> Tensor:
    call = Call(query, key, value, score=score, scale=key.shape[3] ** -0.5)
    output = native.decode(call, scales=(k_scale, v_scale))
    if output is None:
        raise RuntimeError("the kernels do not serve this call.")
    return output


def _int8_exactly(score: str, query: Tensor, key: Tensor, k_scale: Tensor, value: Tensor, v_scale: Tensor) -> Tensor:
    def wide(codes: Tensor, scale: Tensor) -> Tensor:
        rows = dequantised(codes.transpose(1, 2).flatten(2), scale, torch.float32)
        heads: Tensor = rows.unflatten(2, (codes.shape[1], -1)).transpose(1, 2)
        return heads

    return exactly(query, wide(key, k_scale), wide(value, v_scale), score)


def _int8_bytes(row: Row) -> float:
    return row_bytes(row.shape.width, row.shape.heads) / (row.shape.width * row.dtype.itemsize)
