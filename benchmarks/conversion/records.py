"""What was measured: one JSON file for each conversion, and all of them together, with tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from better_attention.bench.machine import cpu_name
from better_attention.lab.csv_json import write_csv, write_json
from better_attention.lab.runs.provenance import environment

STAGES = ("before", "weights", "calibrated", "distilled")
"""The model as it was; converted by its weights alone; fitted to calibration inputs; and then distilled."""


@dataclass(frozen=True)
class Stage:
    """A model at one stage.

    Args:
        stage: one of :data:`STAGES`.
        test: what it reaches on the test part.
        development: on the part that curves are drawn on: validation or dev.
        seconds: what this stage took, evaluation not included; the machine was shared, so a rough figure.
    """

    stage: str
    test: float
    development: float
    seconds: float


@dataclass
class Record:
    """One conversion.

    Args:
        task, metric: what is judged, and by what.
        mechanism, heads, seed: the conversion; the seed of the trained model, or of the samples where there is but one.
        exact: whether the conversion keeps the function.
        parameters: of the model before and after; ``attention`` those of its attention layers.
        difference: largest difference of the outputs to the original's, behind the conversion by weights alone, as a
            share of the largest output.
        stages: in the order of :data:`STAGES`; exact conversions end with the second.
        errors: of each layer on the calibration inputs: projected, fitted; relative to the norm of the output.
        curve: (updates, metric on the development part) during distillation.
        settings: sizes of the calibration and the distillation.
        environment: command, commit, versions.
    """

    task: str
    metric: str
    mechanism: str
    heads: int
    seed: int
    exact: bool
    parameters: dict[str, int]
    attention: dict[str, int]
    difference: float
    settings: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    errors: list[tuple[float | None, float | None]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.task}-{self.mechanism}-h{self.heads}-s{self.seed}"

    def stage(self, name: str) -> Stage | None:
        """The model at one stage, if it went so far."""
        return next((stage for stage in self.stages if stage.stage == name), None)

    def save(self, folder: Path) -> None:
        """Write it, with the command and the commit that it comes from."""
        self.environment = environment(command()) | {"cpu": cpu_name()}
        write_json(folder / f"{self.name}.json", asdict(self))


def command(module: str = "benchmarks.conversion") -> str:
    """The command line of this process, from the root of the checkout, without folders of this machine."""
    return " ".join(["python -m", module, *("DATA" if Path(word).is_absolute() else word for word in sys.argv[1:])])


def read(folder: Path) -> list[Record]:
    """All records of a folder, in the order of task, heads, mechanism and seed."""
    records = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text("utf-8"))
        values["stages"] = [Stage(**stage) for stage in values["stages"]]
        records.append(Record(**values))
    order = ("optimised", "efficient", "super", "expressive")
    return sorted(records, key=lambda r: (r.task, -r.heads, order.index(r.mechanism), r.seed))


def write(records: list[Record], out: Path) -> None:
    """Write conversion.json and conversion.csv."""
    write_json(out / "conversion.json", [asdict(record) for record in records])
    write_csv(out / "conversion.csv", HEADER, _lines(records))


HEADER = (
    "task", "heads", "mechanism", "seed", "stage", "metric", "test", "development", "seconds", "exact",
    "parameters", "attention_parameters", "commit",
)  # fmt: skip


def _lines(records: list[Record]) -> Iterator[tuple[object, ...]]:
    for r in records:
        for s in r.stages:
            when = "before" if s.stage == "before" else "after"
            yield (
                *(r.task, r.heads, r.mechanism, r.seed, s.stage, r.metric, s.test, s.development, s.seconds, r.exact),
                *(r.parameters[when], r.attention[when], r.environment["commit"]),
            )


def parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in model.parameters())


def kept(path: Path, make: Callable[[], Stage]) -> Stage:
    """The stage that ``path`` holds, made and written where there is none."""
    if not path.exists():
        write_json(path, asdict(make()))
    return Stage(**json.loads(path.read_text("utf-8")))
