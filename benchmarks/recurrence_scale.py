"""``python -m benchmarks.recurrence_scale``: softmax at 1/√d_k at width 64, where the trial gives it other scales.

The trial (results/recurrence-positions) tunes scale and optimiser at width 32 and keeps them at 64. There softmax gets
raw q·k with learned positions and with ALiBi, and a learned scale with rotary positions. Whether what it then loses
against expressive attention is due to that is asked here: the same cells at 1/√d_k. Writes ``cells.jsonl``, as the
trial does, and ``table.md``; the same command continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

from better_attention.lab.files import write_atomic
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.processes import limited_threads
from better_attention.lab.trial.grid import EXPRESSIVE, SCHEMES, SOFTMAX, Trial, TrialCell
from better_attention.lab.trial.run import append, read, trained
from better_attention.lab.trial.stages import CELLS, Row

from .markdown import table

SIZE, SCALE = "d64", "sqrt"


def cells(trial: Trial, rows: Sequence[Row]) -> Iterator[TrialCell]:
    """Softmax's cells of ``main``, with the scale that they have not."""
    for cell in CELLS["main"](trial, rows):
        if cell.size == SIZE and cell.mechanism == SOFTMAX and cell.scaling != SCALE:
            yield replace(cell, scaling=SCALE)


def accuracies(rows: Sequence[Row]) -> dict[tuple[str, str, tuple[int, int]], dict[str, list[float]]]:
    """(mechanism, positions, rung) -> scale -> test accuracies in %, of the cells of ``main``."""
    found: dict[tuple[str, str, tuple[int, int]], dict[str, list[float]]] = {}
    for row in rows:
        c, accuracy = row.cell, row.outcome.test_accuracy
        if c.size == SIZE and c.stage == "main" and accuracy is not None:
            found.setdefault((c.mechanism, c.positions, c.rung), {}).setdefault(c.scaling, []).append(accuracy)
    return found


def compared(trial: Trial, rows: Sequence[Row]) -> Iterator[list[str]]:
    """A row for each kind of positions and rung: softmax at both scales, and expressive attention at its own."""
    found = accuracies(rows)
    for (positions, partner), rung in product(SCHEMES.items(), trial.rungs):
        softmax, expressive = found.get((SOFTMAX, partner, rung), {}), found.get((EXPRESSIVE, positions, rung), {})
        own = next((scaling for scaling in softmax if scaling != SCALE), None)
        if own and SCALE in softmax and expressive:
            (other,) = expressive.values()
            numbers = (f"{fmean(x):.1f} ({len(x)})" for x in (softmax[own], softmax[SCALE], other))
            yield [positions, f"({rung[0]}, {rung[1]})", own, *numbers]


def main(argv: Sequence[str] | None = None) -> None:
    """What the command does, with ``argv`` or the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", type=Path, default=Path("results/recurrence-positions"), help="folder of the trial")
    parser.add_argument("--out", type=Path, default=Path("results/recurrence-positions/softmax-scale"))
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N shares")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args(argv)
    trial, rows = Trial(), read(arguments.trial)
    part, parts = map(int, arguments.part.split("/"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [] if arguments.report else list(cells(trial, rows))[part - 1 :: parts]
    loaded: dict[tuple[object, ...], Splits] = {}
    with limited_threads(trial.task.threads):
        for cell in wanted:
            if all(row.cell != cell for row in read(arguments.out)):
                row = trained(trial, cell, loaded)
                append(arguments.out, row)
                print(cell, row.outcome.test_accuracy, flush=True)
    head = ["positions", "(N, τ)", "tuned", "softmax, tuned", "softmax, 1/√d_k", "expressive, tuned"]
    text = table(head, compared(trial, [*rows, *read(arguments.out)]), numbers=True)
    write_atomic(arguments.out / "table.md", f"Test accuracy in %, mean over seeds (their number), width 64.\n\n{text}")


if __name__ == "__main__":
    main()
