"""How fast a mechanism learns: epochs and seconds until its validation accuracy reaches a threshold.

The threshold is part of the task, or fixed by a rule that looks at the standard mechanism alone, so that no other
mechanism has a say in where it is measured. It is the only figure of the validation split that is compared with
standard. A run that never got there is no number, but it is an outcome, and later than any number: means are over the
others, and comparisons with such runs are by ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from better_attention.errors import check_float
from better_attention.lab.analysis.estimates import Estimate, number
from better_attention.lab.analysis.paired import Comparison
from better_attention.lab.analysis.study import Curve, Record, Threshold
from better_attention.lab.analysis.summary import EPOCHS_TO_THRESHOLD, Row
from better_attention.lab.runs.name import RunName
from better_attention.lab.tasks.splits import most_frequent
from better_attention.text import plural

SHARE = 0.9
"""How much of the way from guessing to what standard achieves is asked for."""


def check_threshold(value: float) -> float:
    """``value`` as a validation accuracy in per cent.

    Raises:
        TypeError, ValueError: it is no number above 0 and up to 100.
    """
    if check_float(value, "threshold", low=0.0, high=100.0) == 0:
        raise ValueError("threshold must be above 0 %, received 0: every run begins there.")
    return float(value)


def find_threshold(
    curves: Mapping[str, Curve], guessing: float = 0.0, given: float | None = None, fixed: float | None = None
) -> Threshold | None:
    """The threshold for runs with these curves; None where standard was not run, or learned nothing.

    What is ``given`` counts, then what is ``fixed``. Without either it lies :data:`SHARE` of the way from ``guessing``
    to the mean, over all runs of the standard mechanism, of their best validation accuracies.

    Args:
        curves: name of a run -> its curve.
        guessing: validation accuracy in per cent without any learning.
        given: the threshold that the user named, in per cent.
        fixed: the threshold of the task, in per cent.

    >>> curve = [{"epoch": 1, "validation_accuracy": 50.0}, {"epoch": 2, "validation_accuracy": 90.0}]
    >>> find_threshold({"standard-h4-s0": curve}, guessing=10.0).accuracy
    82.0
    """
    if given is not None:
        return Threshold(given, "as given by --threshold")
    if fixed is not None:
        return Threshold(fixed, "which the task fixed before these runs")
    best = [max(seen) for name, curve in curves.items() if _is_standard(name) and (seen := _accuracies(curve))]
    if not best or not fmean(best) > guessing:
        return None
    accuracy = guessing + SHARE * (fmean(best) - guessing)
    rule = (
        f"{100 * SHARE:.0f} % of the way from guessing ({number(guessing, 1)} %) to the mean of the best validation "
        f"accuracies of standard ({number(fmean(best), 1)} %); no other mechanism enters it"
    )
    return Threshold(accuracy, rule)


def guessing_accuracy(targets: Tensor) -> float:
    """Accuracy in per cent of always predicting the most frequent class; 0 where a sample has many targets.

    >>> import torch
    >>> guessing_accuracy(torch.tensor([2, 2, 0, 1])), guessing_accuracy(torch.zeros(4, 3, dtype=torch.int64))
    (50.0, 0.0)
    """
    return most_frequent(targets)[1] if targets.ndim == 1 else 0.0


def timed(records: Sequence[Record], curves: Mapping[str, Curve], threshold: Threshold | None) -> list[Record]:
    """The records with ``epochs_to_threshold`` and ``seconds_to_threshold``, None of a run that never reached it.

    Unchanged where there is no threshold, and those of runs without a curve. Seconds are those of training alone.
    """
    if threshold is None:
        return list(records)
    found: list[Record] = []
    for record in records:
        curve = curves.get(str(RunName.of_record(record)))
        if curve is None or not _accuracies(curve):
            found.append(record)
            continue
        epochs, seconds = reached(curve, threshold.accuracy) or (None, None)
        found.append({**record, "epochs_to_threshold": epochs, "seconds_to_threshold": seconds})
    return found


def told(verdict: str) -> str:
    """A verdict on a number of epochs: fewer are better.

    >>> told("lower"), told("no difference shown")
    ('fewer epochs', 'no difference shown')
    """
    return {"lower": "fewer epochs", "higher": "more epochs"}.get(verdict, verdict)


def epochs_apart(test: Comparison | None) -> str:
    """The difference to standard for the reader: in epochs, or, where a run never got there, on how many seeds.

    >>> from better_attention.lab.analysis.paired import compare_ordered
    >>> epochs_apart(compare_ordered({0: 4, 1: 7}, {0: 3, 1: 5})), epochs_apart(None)
    ('+1.5 ± 6.4', '–')
    >>> epochs_apart(compare_ordered({0: 4, 1: math.inf}, {0: 3, 1: 5}))
    'later on 2 of 2 seeds'
    """
    if test is None:
        return "–"
    if test.order is None:
        return test.difference.format(EPOCHS_TO_THRESHOLD.digits, sign=True)
    seeds = plural(test.difference.n, "seed")
    parts = [
        f"{word} on {count}" for word, count in (("earlier", test.order.lower), ("later", test.order.higher)) if count
    ]
    return f"{' and '.join(parts)} of {seeds}" if parts else f"the same on {seeds}"


def runs_of(row: Row) -> str:
    """How many runs of ``row`` reached the threshold: ``3 of 3 runs``."""
    estimate = row.estimates.get(EPOCHS_TO_THRESHOLD.key)
    return f"{estimate.n if estimate else 0} of {plural(len(row.seeds), 'run')}"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table of a report.

    Args:
        row: mechanism and number of heads.
        epochs, seconds: means of the runs that reached the threshold; None where none did.
        test: comparison of the epochs with standard; None where there is none.
        reached: how many runs did, in words.
        by_seed: name of a run -> its epochs, None where it never got there; in the order of the seeds.
    """

    row: Row
    epochs: Estimate | None
    seconds: Estimate | None
    test: Comparison | None
    reached: str
    by_seed: Sequence[tuple[str, int | None]]


def lines(rows: Sequence[Row], records: Sequence[Record]) -> list[Line]:
    """A line a row; none where no run was timed."""
    key = EPOCHS_TO_THRESHOLD.key
    runs: dict[tuple[object, object], list[Record]] = {}
    for record in records:
        if key in record:
            runs.setdefault((record.get("mechanism"), record.get("heads")), []).append(record)
    found = []
    for row in rows:
        # In the order of the seeds, so that a line can be set beside that of another mechanism.
        own = sorted(runs.get((row.mechanism, row.heads), ()), key=lambda run: int(str(run["seed"])))
        if own:
            by_seed = [
                (str(RunName.of_record(run)), epochs if isinstance(epochs := run[key], int) else None) for run in own
            ]
            estimates = row.estimates
            found.append(
                Line(
                    row,
                    estimates.get(key),
                    estimates.get("seconds_to_threshold"),
                    row.tests.get(key),
                    runs_of(row),
                    by_seed,
                )
            )
    return found


def _is_standard(name: str) -> bool:
    return RunName.of(name).mechanism == "standard"


def _accuracies(curve: Curve) -> list[float]:
    values = [entry.get("validation_accuracy") for entry in curve]
    return [value for value in values if value is not None and math.isfinite(value)]


def reached(curve: Curve, accuracy: float) -> tuple[int, float] | None:
    """Number and seconds of the epochs up to the first that is at least ``accuracy``; None where there is none."""
    seconds = 0.0
    for entry in curve:
        seconds += entry.get("seconds", 0.0)
        # An epoch without a value has not reached anything.
        if entry.get("validation_accuracy", -math.inf) >= accuracy:
            return int(entry["epoch"]), seconds
    return None
