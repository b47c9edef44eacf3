"""One row at a time: which contenders can run, whose numbers are right, and only then how fast they are.

All contenders of a row are timed in alternation, baseline, a, b, c, baseline, ..., every second round backwards. A
ratio is formed within each round, so that a temporary slowdown of the machine affects both sides of it.
"""

from __future__ import annotations

import gc
import math
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType, MappingProxyType

import torch

from better_attention.bench.registry import Contender, Results, Row, Run, Unavailable, Work
from better_attention.lab.timing import alternate

BOUNDS: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-4, torch.bfloat16: 3e-2})
"""Largest error that passes the gate: |x - float64 reference| over the largest number of that tensor."""
BATCHED_BELOW = 1e-3
"""Seconds: shorter calls are timed several at a time."""
SAMPLE = 5e-3
"""Seconds that such a sample of several calls takes, about."""
LONG_CALL = 0.1
"""Seconds: a longer call does not profit from warm caches, and is not preceded by an untimed one."""
FEWEST_ROUNDS = 3
SLOW = 8.0
"""Contenders that need this many times the baseline's time take part only in the first :data:`FEWEST_ROUNDS`."""
NOISE = 1.1
"""Rounds that differ by a smaller factor are never called noisy."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to measure.

    Args:
        repeats: most rounds.
        seconds: no new round of a row begins after this long, once there are three; and a contender takes part in as
            many rounds as fit into this long, at least one.
        limit: seconds that a contender may take to be set up, checked and warmed up.
        switches: contenders that take long and were asked for, such as "flex".
    """

    repeats: int = 15
    seconds: float = 10.0
    limit: float = 120.0
    switches: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 10th and 90th percentile over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value.

        >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        Spread(median=3.5, low=1.5, high=5.5)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        # Inclusive: the percentiles then lie between the least and the greatest value, however few values there are.
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])

    @property
    def noisy(self) -> bool:
        """Of a ratio: whether the rounds differ by more than :data:`NOISE`, and by more than the two contenders do.

        >>> Spread(1.2, 0.8, 1.6).noisy, Spread(2.5, 2.0, 3.0).noisy, Spread(1.0, 0.99, 1.01).noisy
        (True, False, False)
        """
        reach = self.high / self.low if self.low > 0 else math.inf
        return reach > max(self.median, 1 / self.median if self.median > 0 else math.inf, NOISE)


def noise_line(noisy: int, compared: int) -> str:
    """The warning for a run with ``noisy`` noisy comparisons among ``compared``."""
    return (
        f"Noise: in {noisy} of {compared} comparisons the rounds differ more than the contenders do: those show no "
        "difference. Measure again on an idle machine, with more rounds."
    )


@dataclass(frozen=True, slots=True)
class Result:
    """A contender in a row.

    Args:
        status: "ok"; "unavailable": it cannot run here; "wrong": the gate stopped it; "failed": it raised an error.
        reason: why it is not "ok".
        error, bound: largest relative error against the float64 reference, and what is allowed.
        seconds: of one call.
        ratio: the baseline's time over its own in the same rounds; above 1 is faster.
        rounds, calls: how many samples, and calls in each.
        memory: bytes by which one call raises the high-water mark of resident memory.
    """

    row: Row
    contender: str
    work: Work
    status: str = "ok"
    reason: str = ""
    note: str = ""
    error: float | None = None
    bound: float | None = None
    seconds: Spread | None = None
    ratio: Spread | None = None
    rounds: int = 0
    calls: int = 0
    memory: int | None = None


def measure(row: Row, contenders: Sequence[Contender], settings: Settings) -> list[Result]:
    """Gate, memory, then time. The first contender is the baseline."""
    runs: dict[str, Run] = {}
    results: dict[str, Result] = {}
    try:
        for contender in contenders:
            results[contender.name], run = admit(row, contender, settings)
            if run is not None:
                runs[contender.name] = run
        for name, run in runs.items():
            results[name] = replace(results[name], memory=run.memory())
        samples, calls = time(runs, contenders[0].name, settings)
    finally:
        # Also after Ctrl-C: a run may hold a process of its own.
        for run in runs.values():
            run.close()
    baseline = samples.get(contenders[0].name, [])
    for name, mine in samples.items():
        ratios = [b / m for b, m in zip(baseline, mine, strict=False)]  # a slow one has fewer rounds, the first ones
        results[name] = replace(
            results[name],
            seconds=Spread.of(mine),
            ratio=Spread.of(ratios) if ratios else None,
            rounds=len(mine),
            calls=calls[name],
        )
    return list(results.values())


def admit(row: Row, contender: Contender, settings: Settings) -> tuple[Result, Run | None]:
    """Set a contender up and compare its numbers with the truth; no run where it may not be timed."""
    result = Result(row, contender.name, contender.work)
    if contender.switch and contender.switch not in settings.switches:
        why = f"left out, it takes long: ask for it with --{contender.switch}"
        return replace(result, status="unavailable", reason=why), None
    run: Run | None = None
    try:
        if (reason := contender.why_not()) is not None:
            return replace(result, status="unavailable", reason=reason), None
        truth = contender.truth()  # may take long by itself: no part of the limit
        with limited(settings.limit):
            run = contender.make()
            worst, where = error(run.results(), truth)
    except Unavailable as reason:
        result = replace(result, status="unavailable", reason=str(reason))
    except Exception as problem:  # whatever goes wrong in one contender, the others are still worth measuring
        result = replace(result, status="failed", reason=f"{type(problem).__name__}: {problem}")
    else:
        bound = BOUNDS[row.dtype]
        result = replace(result, error=worst, bound=bound, note=run.note)
        if worst <= bound:
            return result, run
        result = replace(result, status="wrong", reason=f"{where} is off by {worst:.1e}, allowed {bound:.0e}")
    if run is not None:
        run.close()
    return result, None


def error(results: Results, truth: Results) -> tuple[float, str]:
    """The largest error over the tensors, and the name of that tensor.

    |x - truth| is taken over the largest |truth| of the tensor. A gradient that is zero in exact arithmetic (of
    softmax's key bias) has no scale of its own; it gets the largest of the tensors of its shape.

    Raises:
        ValueError: other tensors came than expected, or in other shapes.
    """
    shapes, expected = ({name: tuple(x.shape) for name, x in some.items()} for some in (results, truth))
    if shapes != expected:
        raise ValueError(f"computed {shapes}, expected {expected}.")
    largest = {name: x.abs().max().item() for name, x in truth.items()}
    worst, where = 0.0, "output"
    for name, x in truth.items():
        of_shape = max(largest[other] for other, shape in expected.items() if shape == expected[name])
        scale = largest[name] if largest[name] > 1e-9 * of_shape else of_shape
        off = (results[name].double() - x).abs().max().item() / scale
        if not off <= worst:  # NaN too
            worst, where = (math.inf if math.isnan(off) else off), name
    return worst, where


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`Unavailable` in the block once ``seconds`` have passed.

    The clock is looked at between two Python instructions. Where there is no alarm (Windows, other threads) there is
    no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Unavailable(f"not ready within {seconds:g} s (--limit)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # Off before the handler goes, since the default action of a late alarm ends the process.
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def time(runs: Mapping[str, Run], baseline: str, settings: Settings) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of one call, one number for each round that a contender takes part in; and the calls per sample.

    A contender whose single call takes longer than ``settings.seconds`` is not called again: that call is its sample.
    """
    estimates = {name: estimate(run) for name, run in runs.items()}
    # A single short call would be lost in the cost and the resolution of the clock.
    calls = {name: math.ceil(SAMPLE / seconds) if seconds < BATCHED_BELOW else 1 for name, seconds in estimates.items()}
    fewest = {name: 1 if seconds > LONG_CALL else FEWEST_ROUNDS for name, seconds in estimates.items()}
    most = {
        name: min(settings.repeats, max(fewest[name], int(settings.seconds / seconds)))
        for name, seconds in estimates.items()
    }
    for name, seconds in estimates.items():
        # Where the baseline cannot run, nothing is slow against it.
        if seconds > SLOW * estimates.get(baseline, math.inf):
            most[name] = min(most[name], FEWEST_ROUNDS)
    samples = {
        name: [seconds] if seconds > max(settings.seconds, LONG_CALL) else [] for name, seconds in estimates.items()
    }
    with no_garbage_collection():
        for turn, name in alternate(list(runs), settings.repeats, least=FEWEST_ROUNDS, seconds=settings.seconds):
            # A call of the estimate that took long is its own sample, for which round 0 is left out.
            if len(samples[name]) <= turn < most[name]:
                if estimates[name] < LONG_CALL:
                    runs[name].sample(1)  # untimed: caches and threads are then as it leaves them itself
                samples[name].append(runs[name].sample(calls[name]) / calls[name])
    return samples, calls


def estimate(run: Run) -> float:
    """About how many seconds a call takes."""
    first = run.sample(1)
    # The least of three: whatever else the machine does only adds to a time.
    return first if first > LONG_CALL else min(run.sample(1) for _ in range(3))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collector off in the block: it would interrupt an arbitrary contender."""
    # What is garbage by now would otherwise stay in memory until the block ends.
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Blocks may be nested, and the inner one must not switch it on again.
        if was_on:
            gc.enable()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use ``number`` threads in the block; None: its current number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
