"""The trial's grid, fixed beforehand: what is compared, on what, at which sizes, and in which stages.

A contestant is a score with a kind of positions. Scale and optimiser are chosen for each contestant and size on two
rungs (stage ``tune``) and then kept on every rung and seed (``main``). Where a pair still rises, both of it are trained
longer (``long``); ``group`` is the setting of public code from the group behind arXiv 2407.18601; ``multi`` has four
rules at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from better_attention.lab.ladder.grid import Rung
from better_attention.lab.runs.job import Job
from better_attention.lab.tasks.catalogue.recurrence import recurrence
from better_attention.lab.tasks.recurrence import RULES, RecurrenceTask
from better_attention.lab.tasks.variant import Variant

STAGES = ("tune", "main", "group", "long", "multi")
SOFTMAX, EXPRESSIVE = "standard", "expressive"
CONTESTANTS = (
    (SOFTMAX, "learned"),
    (SOFTMAX, "rotary"),
    (SOFTMAX, "alibi-weight"),
    (EXPRESSIVE, "learned"),
    (EXPRESSIVE, "rotary"),
    (EXPRESSIVE, "alibi-weight"),
    (EXPRESSIVE, "alibi-score"),
)
"""Mechanism and positions. For softmax both places of ALiBi are one function, which is trained once."""
SCHEMES: Mapping[str, str] = MappingProxyType(
    {"learned": "learned", "rotary": "rotary", "alibi-weight": "alibi-weight", "alibi-score": "alibi-weight"}
)
"""Positions of the expressive contestant -> those of the softmax one that it is paired with."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model: width and so on.

    Args:
        width: None for one-hot tokens, whose width is their number.
        heads, layers: of the decoder.
        tuned_as: name of the size whose scale and optimiser are taken.
    """

    width: int | None
    heads: int
    layers: int
    tuned_as: str

    def settings(self, tokens: int) -> dict[str, Any]:
        """Fields of the task; one-hot models have the ReLU of the code that they follow."""
        if self.width is None:
            return {"layers": self.layers, "width": tokens, "embedding": "one-hot", "activation": "relu"}
        return {"layers": self.layers, "width": self.width}


@dataclass(frozen=True, slots=True)
class TrialCell:
    """One run.

    Args:
        stage: one of :data:`STAGES`.
        modulus, delay, rules: the recurrence.
        size: key of :attr:`Trial.sizes`.
        positions, scaling, optimiser: the setting.
        mechanism: ``"standard"`` or ``"expressive"``.
        seed: of initial weights and the order of samples.
        updates: most updates; fewer where the task is solved before.
    """

    stage: str
    modulus: int
    delay: int
    rules: tuple[str, ...]
    size: str
    positions: str
    scaling: str
    optimiser: str
    mechanism: str
    seed: int
    updates: int

    @property
    def rung(self) -> Rung:
        """(N, τ)."""
        return self.modulus, self.delay


def small_task() -> RecurrenceTask:
    """What every cell has in common; the learning rate follows from the optimiser."""
    return replace(recurrence("small"), batch_size=64, train_samples=12_800, test_samples=512)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The whole grid.

    Args:
        task: what all cells share.
        rungs: (N, τ) of ``main``, by rising number of states.
        tuning, group, multi: rungs of the other stages.
        sizes: name -> model, in the order in which they are run.
        rates: optimiser -> learning rate.
        scalings: what ``tune`` tries.
        seeds: number of seeds of ``main``, ``group`` and ``multi``.
        updates: stage -> most updates.
        every: updates between two measurements on the validation sequences.
        rising: points that the validation accuracy must have gained in the last quarter of a run for ``long``.
    """

    task: RecurrenceTask = field(default_factory=small_task)
    rungs: tuple[Rung, ...] = ((4, 4), (2, 8), (8, 4), (2, 16), (4, 8), (8, 8), (8, 16))
    tuning: tuple[Rung, ...] = ((4, 8), (8, 8))
    group: tuple[Rung, ...] = ((4, 4), (8, 4), (4, 8), (8, 8))
    multi: tuple[Rung, ...] = ((4, 4), (8, 4), (4, 8))
    sizes: Mapping[str, Size] = field(
        default_factory=lambda: {
            "one-hot": Size(None, 2, 1, "one-hot"),
            "d16": Size(16, 2, 1, "d16"),
            "d32": Size(32, 2, 1, "d32"),
            "one-hot h1": Size(None, 1, 1, "one-hot"),
            "one-hot l2": Size(None, 2, 2, "one-hot"),
            "d16 l2": Size(16, 2, 2, "d16"),
            "d64": Size(64, 2, 1, "d32"),
        }
    )
    rates: Mapping[str, float] = field(default_factory=lambda: {"adamw": 3e-3, "sgd": 0.01})
    scalings: tuple[str, ...] = ("sqrt", "raw", "learned")
    seeds: int = 3
    updates: Mapping[str, int] = field(
        default_factory=lambda: {"tune": 1_000, "main": 4_000, "group": 20_000, "long": 20_000, "multi": 4_000}
    )
    every: int = 250
    rising: float = 2.0

    def fits(self, size: str, rung: Rung) -> bool:
        """One-hot tokens of two symbols have width 2, of which a layer norm leaves nothing but a sign."""
        return self.sizes[size].width is not None or rung[0] > 2

    def job(self, cell: TrialCell) -> Job:
        """The run of a cell."""
        size = self.sizes[cell.size]
        tokens = cell.modulus + (len(cell.rules) if len(cell.rules) > 1 else 0)
        task = replace(
            self.task,
            modulus=cell.modulus,
            delay=cell.delay,
            rules=cell.rules,
            positions=cell.positions,
            scaling=cell.scaling,
            optimiser=cell.optimiser,
            lr=self.rates[cell.optimiser],
            **size.settings(tokens),
        )
        return Job(task, Variant.of(cell.mechanism), size.heads, cell.seed)


ALL_RULES = tuple(RULES)
"""The multi-task case: four rules, told by the first token."""
SMALLEST: Mapping[str, Any] = MappingProxyType(
    {
        "rungs": ((4, 4),),
        "tuning": ((4, 4),),
        "group": ((4, 4),),
        "multi": ((4, 4),),
        "sizes": {"one-hot": Size(None, 2, 1, "one-hot")},
        "rates": {"adamw": 3e-3},
        "scalings": ("sqrt",),
        "seeds": 1,
        "updates": {"tune": 20, "main": 40, "group": 40, "long": 60, "multi": 40},
        "every": 20,
    }
)
"""A trial of seconds."""
SCALES: Mapping[str, Mapping[str, Any]] = MappingProxyType({"smoke": SMALLEST, "small": MappingProxyType({})})
