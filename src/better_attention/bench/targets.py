"""Speed targets of the compiled kernels, and whether the rows of a run meet them; misses are reported as such."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from better_attention.bench.machine import Limits
from better_attention.bench.registry import PAPER, Shape
from better_attention.bench.runner import Result
from better_attention.bench.suites import decode, generation, kernel, layer

LONG_SEQUENCE = 1024
"""Sequences of this many tokens and more count as long."""
LONG_CACHE = 16_384
"""Keys, or tokens before, from which on a step of a decoder is to be bound by reading them."""
FIRST_FIVE = (PAPER[2], PAPER[3], PAPER[4], *kernel.SUITE.shapes[-2:])
"""The shapes at which a first attempt at such kernels was measured."""
TIE = 0.02
"""Two medians of the same code differ by this much, so that "not slower" cannot be shown more precisely."""
LINEAR = 0.87
"""Growth of ℓ over growth of memory that still counts as linear: the system counts whole pages."""


@dataclass(frozen=True, slots=True)
class Target:
    """A promise about some rows.

    Args:
        name: in words.
        suite, mode, contender: of the rows.
        least: what is promised.
        shapes: where.
        variant: of the rows; None: every one that was measured.
        measure: "ratio", the speed over the baseline's; or "bandwidth", the share of the measured read bandwidth.
        mean: the promise is about the geometric mean over the rows, not about each.
        ties: a row that misses by no more than :data:`TIE` counts as met.
    """

    name: str
    suite: str
    mode: str
    contender: str
    least: float
    shapes: tuple[Shape, ...]
    variant: str | None = "plain"
    measure: str = "ratio"
    mean: bool = False
    ties: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a target.

    Args:
        name, least: the target's.
        found: the mean, or the worst row; None where nothing was measured.
        met: None where rows are missing that could still miss it.
        detail: which rows miss it, or are missing.
    """

    name: str
    least: float
    found: float | None
    met: bool | None
    detail: str


def _shorter(shapes: Sequence[Shape], limit: int) -> tuple[Shape, ...]:
    return tuple(shape for shape in shapes if shape.length < limit)


def _longer(shapes: Sequence[Shape], limit: int) -> tuple[Shape, ...]:
    return tuple(shape for shape in shapes if shape.length >= limit)


def _kernel(
    name: str, mode: str, contender: str, least: float, shapes: tuple[Shape, ...], *, mean: bool = False
) -> Target:
    return Target(f"{name}, {mode}", "kernel", mode, contender, least, shapes, mean=mean)


def _layer(
    name: str,
    mode: str,
    contender: str,
    least: float,
    shapes: tuple[Shape, ...],
    *,
    mean: bool = False,
    ties: bool = False,
) -> Target:
    return Target(f"{contender} layer, {mode}{name}", "layer", mode, contender, least, shapes, mean=mean, ties=ties)


_ALL, _LAYERS, _CACHES = kernel.SUITE.shapes, layer.SUITE.shapes, decode.SUITE.shapes
_BOTH = ("forward", "forward+backward")

TARGETS: tuple[Target, ...] = (
    _kernel("expressive, ℓ < 1024, each", "forward", "expressive auto", 1.4, _shorter(_ALL, LONG_SEQUENCE)),
    _kernel("expressive, ℓ ≥ 1024, each", "forward", "expressive auto", 1.25, _longer(_ALL, LONG_SEQUENCE)),
    _kernel("expressive, all shapes, each", "forward+backward", "expressive auto", 1.25, _ALL),
    *(
        _kernel(f"expressive, {which}, mean", mode, "expressive auto", least, shapes, mean=True)
        for mode, least in zip(_BOTH, (1.6, 1.4), strict=True)
        for which, shapes in (("the first five shapes", FIRST_FIVE), ("all shapes", _ALL))
    ),
    *(
        Target(f"softmax, never slower, {mode}", "kernel", mode, "softmax auto", 1.0, _ALL, variant=None, ties=True)
        for mode in _BOTH
    ),
    _kernel("softmax, all shapes, mean", "forward", "softmax auto", 1.25, _ALL, mean=True),
    *(
        Target(
            f"decode, {name}, {LONG_CACHE:,} keys: share of read bandwidth, each",
            "decode",
            "forward",
            name,
            least,
            _longer(_CACHES, LONG_CACHE),
            None,
            "bandwidth",
        )
        for which, least in (("", 0.85), (", k is v", 0.8))
        for name in (f"softmax auto{which}", f"expressive auto{which}")
    ),
    *(
        Target(
            f"generation, {contender}, {which} {LONG_CACHE:,} tokens before, against standard through SDPA, each",
            "generation",
            "inference",
            contender,
            least,
            shapes(generation.SUITE.shapes, LONG_CACHE),
            None,
        )
        for contender in ("efficient", "efficient, int8 cache", "efficient, int8 cache, compiled")
        for which, shapes, least in (("fewer than", _shorter, 2.0), ("at least", _longer, 3.0))
    ),
    Target("decode, k is v, against SDPA, each", "decode", "forward", "softmax auto, k is v", 3.0, _CACHES, None),
    _layer(", each", "inference", "efficient", 1.3, _LAYERS),
    _layer(", ℓ < 2048, each", "training", "efficient", 1.5, _shorter(_LAYERS, 2048)),
    _layer(", ℓ ≥ 2048, each", "training", "efficient", 1.2, _longer(_LAYERS, 2048)),
    *(
        _layer(", mean", mode, mechanism, least, _LAYERS, mean=True)
        for mechanism, least in (("efficient", 1.8), ("optimised", 1.2), ("super", 1.3))
        for mode in layer.SUITE.modes
    ),
    *(
        # super at ℓ = 2048 does more work than standard, by W_A
        _layer(", never slower", mode, name, 1.0, _shorter(_LAYERS, 2048) if name == "super" else _LAYERS, ties=True)
        for name in layer.OURS
        for mode in layer.SUITE.modes
    ),
    _kernel(
        "expressive without a compiler, ℓ ≥ 1024, each",
        "forward",
        "expressive chunked",
        1 / 1.6,
        _longer(_ALL, LONG_SEQUENCE),
    ),
)


def verdicts(results: Sequence[Result], limits: Limits) -> list[Verdict]:
    """The verdict on every target about a suite that was run."""
    all_verdicts = [*(verdict(target, results, limits) for target in TARGETS), _memory(results)]
    return [verdict for verdict in all_verdicts if verdict is not None]


def verdict(target: Target, results: Sequence[Result], limits: Limits) -> Verdict | None:
    """The verdict on a target; None if none of its rows was run."""
    rows = [result for result in results if _matches(target, result)]
    if not rows:
        return None
    values = {_where(r): value for r in rows if (value := _value(target, r, limits)) is not None}
    untimed = [f"{_where(r)}: {r.reason or 'no baseline'}" for r in rows if _where(r) not in values]
    absent = len(set(target.shapes) - {r.row.shape for r in rows})
    mean = statistics.geometric_mean(values.values()) if values else None
    measured = mean if target.mean else min(values.values(), default=None)
    least = target.least - TIE * target.ties
    misses = [f"{where}: {value:.2f}" for where, value in values.items() if value < least and not target.mean]
    missed = measured is None or measured < least
    # A mean over some of the shapes decides nothing; a contender that could not be timed has missed.
    verdict = False if untimed else None if absent and (target.mean or not missed) else not missed
    details = [*misses, *untimed, *([f"{absent} of {len(target.shapes)} shapes not run"] if absent else [])]
    return Verdict(target.name, target.least, measured, verdict, "; ".join(details))


def _matches(target: Target, result: Result) -> bool:
    row = result.row
    return (
        (row.suite, row.mode, result.contender) == (target.suite, target.mode, target.contender)
        and row.shape in target.shapes
        and target.variant in (None, row.variant)
    )


def _where(result: Result) -> str:
    variant = result.row.variant
    return str(result.row.shape) if variant == "plain" else f"{result.row.shape} {variant}"


def _value(target: Target, result: Result, limits: Limits) -> float | None:
    if target.measure == "ratio":
        return None if result.ratio is None else result.ratio.median
    if result.seconds is None:
        return None
    return result.work.bytes / result.seconds.median / 1e9 / max(limits.read.values())


def _memory(results: Sequence[Result]) -> Verdict | None:
    """Without a compiler: extra memory that grows with ℓ, not with ℓ × s, from ℓ = 1,024 to 4,096."""
    short, long = kernel.SUITE.shapes[-2:]
    memory = {
        r.row.shape: r.memory
        for r in results
        if (r.row.suite, r.row.variant, r.row.mode) == ("kernel", "plain", "forward")
        and r.contender == "expressive chunked"
        and r.memory
    }
    if short not in memory or long not in memory:
        return None
    growth, longer = memory[long] / memory[short], long.length / short.length
    name = "expressive without a compiler, forward: growth of ℓ over that of extra memory"
    detail = f"{memory[short] / 2**20:.1f} MiB at {short}, {memory[long] / 2**20:.1f} MiB at {long}"
    return Verdict(name, LINEAR, longer / growth, longer / growth >= LINEAR, detail)
