"""Which cells a stage consists of, given what earlier stages have shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from better_attention.lab.ladder.grid import Rung
from better_attention.lab.tasks.recurrence import RecurrenceTask

from .grid import ALL_RULES, CONTESTANTS, SCHEMES, SOFTMAX, Trial, TrialCell
from .quick import Outcome

PLUS = ("plus",)


@dataclass(frozen=True, slots=True)
class Row:
    """A finished cell, and the commit of the program that trained it."""

    cell: TrialCell
    outcome: Outcome
    commit: str

    @property
    def loss(self) -> float:
        """Lowest validation loss as a share of chance, log N: runs of several N can be averaged. Infinite: diverged."""
        losses = [loss for _, loss, _ in self.outcome.curve]
        if self.outcome.test_accuracy is None or not losses:
            return math.inf
        return min(losses) / math.log(self.cell.modulus)

    def rises(self, points: float) -> bool:
        """Whether the best validation accuracy grew by ``points`` in the last quarter of an unsolved run."""
        curve, last = self.outcome.curve, self.outcome.updates
        early = [accuracy for step, _, accuracy in curve if step <= 0.75 * last]
        late = [accuracy for step, _, accuracy in curve if step > 0.75 * last]
        if self.outcome.solved_at is not None or self.outcome.test_accuracy is None or not early or not late:
            return False
        return max(late) - max(early) >= points


def waiting(trial: Trial, rows: Sequence[Row], stages: Sequence[str]) -> Iterator[TrialCell]:
    """The cells of ``stages`` that can be run now and have not been, in their order."""
    done = {row.cell for row in rows}
    for stage in stages:
        for cell in CELLS[stage](trial, rows):
            if cell not in done:
                yield cell


def chosen(trial: Trial, rows: Iterable[Row]) -> Mapping[tuple[str, str, str], tuple[str, str]]:
    """(size, mechanism, positions) -> the scale and optimiser with the lowest loss in ``tune``.

    The loss is the mean over the tuning rungs of the lowest validation loss. A contestant has no entry before all of
    its cells are done.
    """
    losses: dict[tuple[str, str, str], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        cell = row.cell
        if cell.stage == "tune":
            of = losses.setdefault((cell.size, cell.mechanism, cell.positions), {})
            of.setdefault((cell.scaling, cell.optimiser), []).append(row.loss)
    wanted = len(trial.scalings) * len(trial.rates)
    whole = {
        key: found
        for key, found in losses.items()
        if len(found) == wanted and all(len(of) == len(_fitting(trial, key[0], trial.tuning)) for of in found.values())
    }
    return {key: min(found, key=lambda setting: fmean(found[setting])) for key, found in whole.items()}


def _fitting(trial: Trial, size: str, rungs: Sequence[Rung]) -> list[Rung]:
    return [rung for rung in rungs if trial.fits(size, rung)]


def _tune(trial: Trial, rows: Sequence[Row]) -> Iterator[TrialCell]:
    for size in dict.fromkeys(size.tuned_as for size in trial.sizes.values()):
        rungs = _fitting(trial, size, trial.tuning)
        for rung, contestant, scaling, optimiser in product(rungs, CONTESTANTS, trial.scalings, trial.rates):
            yield _cell(trial, "tune", rung, size, contestant, (scaling, optimiser), 0)


def _cell(
    trial: Trial,
    stage: str,
    rung: Rung,
    size: str,
    contestant: tuple[str, str],
    setting: tuple[str, str],
    seed: int,
    rules: tuple[str, ...] = PLUS,
) -> TrialCell:
    mechanism, positions = contestant
    where: dict[str, Any] = {"modulus": rung[0], "delay": rung[1], "rules": rules, "size": size}
    scaling, optimiser = setting
    return TrialCell(
        stage=stage,
        **where,
        positions=positions,
        scaling=scaling,
        optimiser=optimiser,
        mechanism=mechanism,
        seed=seed,
        updates=trial.updates[stage],
    )


FIRST = 3
"""Sizes whose seeds are run before those of the others."""


def _tuned(
    trial: Trial, rows: Sequence[Row], stage: str, rungs: Sequence[Rung], rules: tuple[str, ...]
) -> Iterator[TrialCell]:
    """Every contestant at its own setting, seeds outermost, the first sizes before the others."""
    settings, names = chosen(trial, rows), list(trial.sizes)
    for group in (names[:FIRST], names[FIRST:]):
        for seed, size in product(range(trial.seeds), group):
            for rung, contestant in product(_fitting(trial, size, rungs), CONTESTANTS):
                setting = settings.get((trial.sizes[size].tuned_as, *contestant))
                if setting is not None:
                    yield _cell(trial, stage, rung, size, contestant, setting, seed, rules)


def _main(trial: Trial, rows: Sequence[Row]) -> Iterator[TrialCell]:
    return _tuned(trial, rows, "main", trial.rungs, PLUS)


def _multi(trial: Trial, rows: Sequence[Row]) -> Iterator[TrialCell]:
    return _tuned(trial, rows, "multi", trial.multi, ALL_RULES)


def _group(trial: Trial, rows: Sequence[Row]) -> Iterator[TrialCell]:
    """One-hot tokens, raw q.k, SGD with momentum; rotary positions, which that code has not, are left out."""
    sizes = [name for name, size in trial.sizes.items() if size.width is None]
    contestants = [contestant for contestant in CONTESTANTS if contestant[1] != "rotary"]
    optimiser = "sgd" if "sgd" in trial.rates else next(iter(trial.rates))
    for seed, size in product(range(trial.seeds), sizes):
        for rung, contestant in product(_fitting(trial, size, trial.group), contestants):
            yield _cell(trial, "group", rung, size, contestant, ("raw", optimiser), seed)


def _long(trial: Trial, rows: Sequence[Row]) -> Iterator[TrialCell]:
    """Both contestants of a pair of ``main`` of which one still rises."""
    main = {row.cell: row for row in rows if row.cell.stage == "main"}
    where = {(c.rung, c.size, c.seed, c.mechanism, c.positions): row for c, row in main.items()}
    found: dict[TrialCell, None] = {}
    for (rung, size, seed, mechanism, positions), row in where.items():
        softmax = None if mechanism == SOFTMAX else where.get((rung, size, seed, SOFTMAX, SCHEMES[positions]))
        if softmax is not None and (row.rises(trial.rising) or softmax.rises(trial.rising)):
            for one in (softmax.cell, row.cell):
                setting = one.scaling, one.optimiser
                found[_cell(trial, "long", rung, size, (one.mechanism, one.positions), setting, seed)] = None
    # A pair's seeds lie in the order of `main`, so that the first seed is through before the second begins.
    return iter(sorted(found, key=lambda cell: cell.seed))


CELLS = {"tune": _tune, "main": _main, "group": _group, "long": _long, "multi": _multi}


def data_of(task: RecurrenceTask) -> tuple[object, ...]:
    """What the sequences of a task depend on."""
    return task.modulus, task.delay, task.rules
