"""The recurrence ladder: how far up, over N and τ, each mechanism and score predicts; our own measure, not a paper's.

A ladder is a grid that is fixed beforehand: rungs (N, τ) x settings (scaling of q.k, positions, depth) x variants x
seeds. Each cell is a run of the task ``recurrence`` in its own folder, OUT/n4-t8/sqrt-rotary-l1/standard-h2-s0,
so that a ladder that was killed continues where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.tasks.recurrence import RecurrenceTask
from better_attention.lab.tasks.variant import Variant
from better_attention.text import plural

Rung = tuple[int, int]
"""Modulus N, the number of symbols, and delay τ."""


def rung_words(rung: Rung) -> str:
    """A rung for a reader.

    >>> rung_words((8, 4))
    '8 symbols, delay 4'
    """
    return f"{plural(rung[0], 'symbol')}, delay {rung[1]}"


GIVE_UP = 2
"""A setting does not try a rung after it failed on this many others that are no harder in N and in τ."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One column of the grid: the scaling of q.k, the kind of positions, the number of layers."""

    scaling: str
    positions: str
    layers: int

    def __str__(self) -> str:
        return f"{self.scaling}-{self.positions}-l{self.layers}"

    @property
    def words(self) -> str:
        """The setting for a reader.

        >>> Setting("learned", "learned", 1).words
        'learned scale, learned positions, 1 layer'
        """
        scale = {"sqrt": "1/√d_k", "raw": "raw q·k", "learned": "learned scale"}[self.scaling]
        names = {
            "alibi-score": "ALiBi in the score",
            "alibi-weight": "ALiBi on the weight",
            "learned": "learned positions",
        }
        return f"{scale}, {names.get(self.positions, self.positions)}, {plural(self.layers, 'layer')}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    rung: Rung
    setting: Setting
    variant: Variant
    seed: int


@dataclass(frozen=True)
class Ladder:
    """The cells of a ladder and how they are trained.

    Args:
        task: the task ``recurrence`` with everything that the grid does not set.
        rungs: (N, τ), rising in difficulty; no rung comes before one that is easier in both.
        settings: each is tried on every rung, unless it has been given up.
        variants, heads, seeds: as in a comparison; ``seeds`` counts from 0.
        out: folder of the ladder.
        screen: seed 0 alone tries every setting; the other seeds run where it was best on validation, per variant.
        device, command: as in a comparison.

    Raises:
        ValueError: a rung comes after a harder one.
    """

    task: RecurrenceTask
    rungs: Sequence[Rung]
    settings: Sequence[Setting]
    variants: Sequence[Variant]
    heads: int
    seeds: int
    out: Path
    screen: bool = False
    device: str = "cpu"
    command: str = ""

    def __post_init__(self) -> None:
        for index, rung in enumerate(self.rungs):
            for later in self.rungs[index:]:
                if later != rung and below(later, rung):
                    raise ValueError(f"rungs rise in difficulty: {later} is easier than {rung}, which comes before it.")
        if len(set(self.rungs)) < len(self.rungs):
            raise ValueError(f"each rung is climbed once, received {list(self.rungs)}.")

    def task_of(self, rung: Rung, setting: Setting) -> RecurrenceTask:
        """The task of a cell."""
        return replace(
            self.task,
            modulus=rung[0],
            delay=rung[1],
            scaling=setting.scaling,
            positions=setting.positions,
            layers=setting.layers,
        )

    def job(self, cell: Cell) -> Job:
        """The run of a cell."""
        return Job(self.task_of(cell.rung, cell.setting), cell.variant, self.heads, cell.seed)

    def folder(self, cell: Cell) -> RunFolder:
        """The folder of a cell's run."""
        modulus, delay = cell.rung
        return RunFolder(self.out / f"n{modulus}-t{delay}" / str(cell.setting) / self.job(cell).folder_name)

    @property
    def cells(self) -> list[Cell]:
        """The whole grid, none given up."""
        combined = product(self.rungs, range(self.seeds), self.settings, self.variants)
        return [Cell(rung, setting, variant, seed) for rung, seed, setting, variant in combined]


def below(easier: Rung, harder: Rung) -> bool:
    """Whether a rung is at most as hard as another in N and in τ."""
    return easier[0] <= harder[0] and easier[1] <= harder[1]


def softmax_twin(variant: Variant) -> str:
    """The name of the variant that differs in the score alone: what expressive attention is compared with.

    >>> softmax_twin(Variant.of("expressive")), softmax_twin(Variant.of("efficient+expressive"))
    ('standard', 'efficient')
    """
    return replace(variant, mechanism=replace(variant.mechanism, score="softmax")).name


@dataclass(frozen=True, slots=True)
class RungResult:
    """The result of a cell. Accuracies in per cent of the symbols that can be predicted; None where a run diverged.

    Args:
        mechanism, score: name of the variant, and its score.
        modulus, delay, scaling, positions, layers, heads, seed: the cell.
        width: model width; not the task's where parameters are made equal.
        train_accuracy, validation_accuracy, test_accuracy, test_loss: of the weights with the best validation loss.
        updates: number of updates.
        updates_to_target: number of updates until the validation accuracy first reached the target; None: never.
        update_flops: of the matrix products of one update, forward and backward.
        params: learned values of the model.
        seconds: of training.
        times_as_fast: time of an update of the same model on torch's own layer, which has learned positions, over that
            of this model: above 1 is faster.
        commit: of the program that trained it.
    """

    mechanism: str
    score: str
    modulus: int
    delay: int
    scaling: str
    positions: str
    layers: int
    heads: int
    seed: int
    width: int
    train_accuracy: float | None = None
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    updates: int | None = None
    updates_to_target: int | None = None
    update_flops: int = 0
    params: int | None = None
    seconds: float | None = None
    times_as_fast: float | None = None
    commit: str | None = None

    @property
    def rung(self) -> Rung:
        """(N, τ)."""
        return self.modulus, self.delay

    @property
    def setting(self) -> Setting:
        """The column of the grid."""
        return Setting(self.scaling, self.positions, self.layers)

    @property
    def twin(self) -> str:
        """See :func:`softmax_twin`."""
        return softmax_twin(Variant.of(self.mechanism))


def best_settings(rows: Iterable[RungResult]) -> dict[tuple[str, Rung], Setting]:
    """The setting of each mechanism and rung with the highest mean validation accuracy, then the fewest updates.

    Settings are compared over the seeds that all of them have: when screening, the first alone.
    """
    groups: dict[tuple[str, Rung], dict[Setting, dict[int, RungResult]]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.rung), {}).setdefault(row.setting, {})[row.seed] = row

    def rank(of: Sequence[RungResult]) -> tuple[float, float]:
        # A run that has reached the target has solved the rung, at whatever fraction of a per cent it then stopped.
        accuracies = [100.0 if row.updates_to_target else row.validation_accuracy or 0.0 for row in of]
        return -sum(accuracies), sum(row.updates or math.inf for row in of)

    best = {}
    for key, settings in groups.items():
        shared = set.intersection(*(set(seeds) for seeds in settings.values()))
        best[key] = min(settings, key=lambda s: rank([settings[s][seed] for seed in sorted(shared)]))
    return best


FILES = ("ladder.json", "ladder.csv", "ladder.html")
"""What a ladder writes below its folder."""


def is_ladder(value: object) -> bool:
    """Whether the value in a JSON file is that of a ``ladder.json``."""
    return isinstance(value, Mapping) and "grid" in value


LEAST_STATES = 256
"""Of a space of fewer states N^τ too little is left to hold out: its rungs measure how few sequences suffice."""


def _rungs(*sizes: int) -> tuple[Rung, ...]:
    """N and τ of these sizes, powers of two, by their product, then by N."""
    pairs = ((N, delay) for N in sizes for delay in sizes if N**delay >= LEAST_STATES)
    return tuple(sorted(pairs, key=lambda rung: (rung[0] * rung[1], rung)))


SCALES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "smoke": {
            "rungs": ((16, 2), (4, 4)),
            "scalings": ("sqrt",),
            "positions": ("rotary",),
            "layers": (1,),
            "seeds": 1,
            "updates": 300,
        },
        "small": {
            "rungs": _rungs(4, 16, 64),
            "scalings": ("sqrt", "raw", "learned"),
            "positions": ("learned", "rotary", "alibi-weight", "alibi-score"),
            "layers": (1, 2),
            "seeds": 3,
            "updates": 1_000,
        },
        "paper": {
            "rungs": _rungs(2, 4, 8, 16, 32, 64),
            "scalings": ("sqrt", "raw", "learned"),
            "positions": ("learned", "rotary", "alibi-weight", "alibi-score"),
            "layers": (1, 2),
            "seeds": 5,
            "updates": 10_000,
        },
    }
)
"""What a ladder tries at each scale; "paper" is N, τ = 2 ... 64 and, like the task, in no paper."""
