"""Running the trial: one cell after another, a line of ``cells.jsonl`` for each, so that any command can go on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from better_attention.lab.csv_json import finite
from better_attention.lab.files import parse_json, read_regular
from better_attention.lab.lock import RESULTS_LOCK_SECONDS, locked
from better_attention.lab.runs.provenance import commit
from better_attention.lab.tasks.recurrence import RecurrenceTask
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.processes import limited_threads
from better_attention.lab.training.randomness import derive

from .grid import Trial, TrialCell
from .quick import Outcome, train
from .stages import Row, data_of, waiting

CELLS = "cells.jsonl"
"""The file of finished cells below the trial's folder."""


def run(
    trial: Trial,
    folder: Path,
    stages: Sequence[str],
    *,
    sizes: Sequence[str] = (),
    part: tuple[int, int] = (1, 1),
    seconds: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:
    """Train what is not yet trained; yields each row once it is on the disk.

    Args:
        trial: the grid.
        folder: where :data:`CELLS` lies or will lie.
        stages: which, in this order.
        sizes: these alone; empty for all.
        part: (k, n): only the k-th of n shares, for n processes side by side.
        seconds: begin no cell after that.
        stop: asked before each cell.
    """
    kept = partial(_is_wanted, sizes, part)
    loaded: dict[tuple[object, ...], Splits] = {}
    began = time.monotonic()
    with limited_threads(trial.task.threads):
        # Read anew before each cell: what another process has finished may decide what comes next.
        while (cell := next_cell(trial, read(folder), stages, kept)) is not None:
            if stop() or time.monotonic() - began > seconds:
                return
            row = trained(trial, cell, loaded)
            append(folder, row)
            yield row


def trained(trial: Trial, cell: TrialCell, loaded: dict[tuple[object, ...], Splits]) -> Row:
    """Train one cell.

    Args:
        trial: the grid.
        cell: what is trained.
        loaded: data that cells before it have made, which need not be made again; this cell's is added.
    """
    job = trial.job(cell)
    assert isinstance(job.task, RecurrenceTask)  # noqa: S101 - for the type checker
    if (data := data_of(job.task)) not in loaded:
        loaded[data] = job.task.load()
    outcome, _ = train(job, loaded[data], cell.updates, trial.every)
    return Row(cell, outcome, commit())


def next_cell(
    trial: Trial, rows: Sequence[Row], stages: Sequence[str], wanted: Callable[[TrialCell], bool]
) -> TrialCell | None:
    """The first wanted cell that waits; None where none does."""
    return next(filter(wanted, waiting(trial, rows, stages)), None)


def _is_wanted(sizes: Sequence[str], part: tuple[int, int], cell: TrialCell) -> bool:
    own, of = part
    return (not sizes or cell.size in sizes) and derive(*map(str, asdict(cell).values())) % of == own - 1


def append(folder: Path, row: Row) -> None:
    """Add the row's line to the file of ``folder``."""
    line = json.dumps(finite(asdict(row)), allow_nan=False) + "\n"
    with locked(folder, RESULTS_LOCK_SECONDS), (folder / CELLS).open("a+b") as file:
        file.seek(0)
        content = file.read()
        # What a crash left of a line would spoil the next one.
        file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Row]:
    """The rows so far; none where the folder has no file of them.

    Raises:
        ValueError: a line that is no row of this version.
    """
    path = folder / CELLS
    if not path.is_file():
        return []
    lines = read_regular(path).decode().splitlines()
    # A last line that a crash cut short is no row, and its cell is run again.
    if lines and not lines[-1].endswith("}"):
        del lines[-1]
    return [_row(parse_json(line), path, number) for number, line in enumerate(lines, 1)]


def _row(value: Any, path: Path, number: int) -> Row:
    try:
        cell = TrialCell(**value["cell"] | {"rules": tuple(value["cell"]["rules"])})
        curve = tuple((step, loss, accuracy) for step, loss, accuracy in value["outcome"]["curve"])
        return Row(cell, Outcome(**value["outcome"] | {"curve": curve}), value["commit"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}, line {number} is no row of a trial: {type(error).__name__}: {error}.") from None
