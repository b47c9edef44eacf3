"""Table 4 of arXiv 2403.01643 on this CPU: how long the models of its experiments take for 5,000 samples.

Only speed is measured, which does not depend on training: the models keep their initial weights and read random inputs
of the task's shape. The mechanisms alternate, and a ratio is formed within each round, so that a temporary slowdown of
the machine affects both sides of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from better_attention.bench.runner import Spread, no_garbage_collection
from better_attention.export.quantise import quantise_linears
from better_attention.lab import published
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.timing import alternate

PAPER_TASKS = tuple(name for name in published.edge_inference()[0] if name not in ("mechanism", "heads"))
"""The columns of table 4."""
PRECISIONS = ("float32", "int8")
INT8_BOUND = 0.1
"""Largest error of int8 outputs, over the largest float32 output, at which a model is still timed."""
QUICK_SECONDS = 1.0
BASELINE = "standard"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is timed.

    Args:
        samples: number that the seconds are given for.
        batch_size: samples of one call.
        rounds: passes of every model.
        measured: samples of a pass, from which ``samples`` are extrapolated; None: all of them.
        quick: as many batches a pass as standard attention does in about a second, where that is less.
    """

    samples: int = 5000
    batch_size: int = 32
    rounds: int = 3
    measured: int | None = None
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """One mechanism in one model.

    Args:
        task, heads, precision, mechanism: which.
        seconds: for all samples, median and spread over rounds; None: not timed, see ``reason``.
        times_as_fast: seconds of standard attention over its own in the same rounds; above 1 is faster.
        rounds: passes.
        measured: samples of a pass; fewer than asked for: ``seconds`` are extrapolated.
        quantised: linear maps that compute in int8.
        reason: why it was not timed.
    """

    task: str
    heads: int
    precision: str
    mechanism: str
    seconds: Spread | None = None
    times_as_fast: Spread | None = None
    rounds: int = 0
    measured: int = 0
    quantised: int = 0
    reason: str = ""

    @property
    def group(self) -> tuple[str, int, str]:
        """Task, heads and precision: what is timed in alternation."""
        return self.task, self.heads, self.precision


def available_tasks() -> dict[str, Task]:
    """The tasks of table 4, at the paper's scale."""
    return {name: TASKS[name]("paper") for name in PAPER_TASKS}


def seconds_of_pass(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """How long ``model`` takes for all ``batches``, one after the other, without gradients."""
    with torch.inference_mode():
        began = perf_counter()
        for batch in batches:
            model(batch)
        return perf_counter() - began


Watch = Callable[[nn.Module, Sequence[Tensor]], float]
"""Times a pass, as :func:`seconds_of_pass` does."""


def measure(
    tasks: Sequence[Task],
    mechanisms: Sequence[str],
    heads: Sequence[int],
    precisions: Sequence[str],
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
    kept: Sequence[Timing] = (),
    watch: Watch = seconds_of_pass,
) -> Iterator[list[Timing]]:
    """Time every combination; a list of timings for each task, number of heads and precision.

    Args:
        tasks, mechanisms, heads, precisions, settings: what is timed.
        say: called with lines about the progress.
        kept: earlier timings with the same settings. A group that has all ``mechanisms`` is not timed again; one that
            lacks some is timed again together with those it has, since ratios are formed within a round.
        watch: times a pass.
    """
    groups = [(task, h, precision) for task in tasks for h in heads for precision in precisions]
    there = {
        (task.name, h, precision): [t.mechanism for t in kept if t.group == (task.name, h, precision)]
        for task, h, precision in groups
    }
    open_ = [
        (task, h, precision) for task, h, precision in groups if set(mechanisms) - {*there[task.name, h, precision]}
    ]
    if open_:
        seconds = expected(open_, len(mechanisms), settings, watch)
        say(f"about {seconds / 60:.1f} minutes in all for {len(open_) * len(mechanisms)} rows at the present load")
    for number, (task, h, precision) in enumerate(groups, start=1):
        if (task, h, precision) in open_:
            say(f"[{number}/{len(groups)}] {task.name}, h {h}, {precision}")
            names = tuple(dict.fromkeys((*there[task.name, h, precision], *mechanisms)))
            yield measure_group(task, names, h, precision, settings, say, watch)


def expected(
    groups: Sequence[tuple[Task, int, str]], mechanisms: int, settings: Settings, watch: Watch = seconds_of_pass
) -> float:
    """About how many seconds the groups take: standard attention of each task is timed for a batch, in float32."""
    total = 0.0
    for task in dict.fromkeys(task for task, _, _ in groups):
        probe = task.random_samples(settings.batch_size).inputs
        fitting = [(h, precision) for candidate, h, precision in groups if candidate is task and task.width % h == 0]
        if not fitting:
            continue
        began = perf_counter()
        model, _ = prepare(task, BASELINE, fitting[0][0], "float32", probe)
        built = perf_counter() - began
        batch_seconds = min(watch(model, [probe]) for _ in range(2))
        batches = math.ceil(how_many(settings, batch_seconds) / settings.batch_size)
        passes = batch_seconds * (batches + 1) * settings.rounds  # each pass follows an untimed batch
        total += len(fitting) * (mechanisms * (built + passes) + 2 * batch_seconds)
    return total


def measure_group(
    task: Task,
    mechanisms: Sequence[str],
    heads: int,
    precision: str,
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
    watch: Watch = seconds_of_pass,
) -> list[Timing]:
    """Time the mechanisms in one model, in alternation, with ``watch``."""
    models: dict[str, nn.Module] = {}
    timings: dict[str, Timing] = {}
    probe = task.random_samples(settings.batch_size).inputs
    for name in mechanisms:
        timing = Timing(task.name, heads, precision, name)
        try:
            model, quantised = prepare(task, name, heads, precision, probe)
        except Unusable as reason:
            timings[name] = replace(timing, reason=str(reason))
            continue
        models[name] = model
        timings[name] = replace(timing, quantised=quantised)
    if not models:
        return list(timings.values())
    measuring = models.get(BASELINE, next(iter(models.values())))
    batch_seconds = min(watch(measuring, [probe]) for _ in range(2))
    measured = how_many(settings, batch_seconds)
    duration = batch_seconds * measured / settings.batch_size * len(models) * settings.rounds
    if duration > 10:
        say(f"    about {duration / 60:.1f} minutes")
    batches = task.random_samples(measured).inputs.split(settings.batch_size)
    samples = rounds(models, batches, settings.rounds, watch)
    scale = settings.samples / measured
    for name, seconds in samples.items():
        ratios = [base / mine for mine, base in zip(seconds, samples.get(BASELINE, []), strict=False)]
        timings[name] = replace(
            timings[name],
            seconds=Spread.of([scale * second for second in seconds]),
            times_as_fast=Spread.of(ratios) if ratios else None,
            rounds=len(seconds),
            measured=measured,
        )
    return list(timings.values())


class Unusable(Exception):  # noqa: N818 - a reason to leave a model out, no error of ours
    """A model that cannot be timed; says why."""


def prepare(task: Task, mechanism: str, heads: int, precision: str, probe: Tensor) -> tuple[nn.Module, int]:
    """A model in eval mode and how many of its linear maps compute in int8.

    Raises:
        Unusable: it cannot be built, torchao is missing, or the int8 outputs are far from the float32 ones.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = task.build(Variant.of(mechanism), heads).eval()
    except ValueError as error:
        raise Unusable(str(error)) from None
    if precision == "float32":
        return model, 0
    with torch.inference_mode():
        exact = model(probe)
        try:
            quantised = quantise_linears(model)
        except (ImportError, RuntimeError) as error:
            raise Unusable(str(error)) from None
        off = float((model(probe) - exact).abs().max() / exact.abs().max())
    if not off <= INT8_BOUND:  # NaN too
        raise Unusable(f"int8 outputs are off by {off:.1e} of the largest float32 output, allowed {INT8_BOUND:.0e}")
    return model, quantised


def how_many(settings: Settings, batch_seconds: float) -> int:
    """Samples of one pass, given the time of a batch of standard attention, or of the first model without it.

    >>> how_many(Settings(), 1.0), how_many(Settings(measured=64), 1.0), how_many(Settings(quick=True), 0.25)
    (5000, 64, 128)
    """
    most = min(settings.measured or settings.samples, settings.samples)
    if not settings.quick:
        return most
    return min(most, settings.batch_size * max(1, math.ceil(QUICK_SECONDS / batch_seconds)))


def rounds(
    models: Mapping[str, nn.Module], batches: Sequence[Tensor], number: int, watch: Watch = seconds_of_pass
) -> dict[str, list[float]]:
    """Seconds of each pass over all ``batches``, as ``watch`` takes them: for each model, one number per round."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with no_garbage_collection():
        for _, name in alternate(list(models), number):
            watch(models[name], batches[:1])  # untimed: caches and threads are then as it leaves them itself
            seconds[name].append(watch(models[name], batches))
    return seconds
