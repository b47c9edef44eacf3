"""What a report says in words. Every claim is made here, by one function: split, seeds, interval, corrected p, verdict.

Claims on the trained model rest on the test split alone; figures of training stand in tables and curves and in no
sentence. Claims on the speed of learning rest on the epochs until the validation accuracy reached a threshold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from better_attention.lab import published
from better_attention.lab.analysis.estimates import number
from better_attention.lab.analysis.learning_speed import epochs_apart, runs_of, told
from better_attention.lab.analysis.paired import NOTHING, UNTESTED, p_text
from better_attention.lab.analysis.study import Record, Threshold
from better_attention.lab.analysis.summary import COLUMNS, EPOCHS_TO_THRESHOLD, MAIN, Column, Row
from better_attention.lab.runs.name import RunName
from better_attention.text import plural

PAPER = ("standard", "optimised", "efficient", "super")
"""The mechanisms that arXiv 2403.01643 defines."""

WAITING = 0.05
"""Most of a step that may be spent waiting for data, before times say more of the pipeline than of the model."""

MORE_SEEDS = 3
"""How many seeds are recommended to a reader who has one: the fewest that give an interval of use."""

_WORDS = {
    "test_bits_per_character": ("test loss in bits per character", "", ""),
    "test_perplexity": ("test perplexity", "", ""),
    "test_accuracy": ("test accuracy", " %", " points"),
    "test_loss": ("test loss", "", ""),
    "test_top5": ("test top-5 accuracy", " %", " points"),
    "test_bleu": ("test BLEU", "", " points"),
}
"""Key of a column -> its name in a sentence, the unit of its values, the unit of differences."""

_KEPT = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"


def sentences(rows: Sequence[Row]) -> list[str]:
    """The findings: for what the task is about a sentence a number of heads, and for every test metric what was shown.

    Args:
        rows: those of one task and scale.
    """
    found = []
    for column in COLUMNS:
        if column.key in MAIN:
            blocks = [[row for row in rows if row.heads == heads] for heads in sorted({row.heads for row in rows})]
            found += [sentence for block in blocks if (sentence := finding(block, column))]
        if column.key in _WORDS and (sentence := tally(rows, column)):
            found.append(sentence)
    # A number must not be parted from its sign or its unit at the end of a line.
    return [one.replace(" ± ", _KEPT).replace(" %", "\N{NO-BREAK SPACE}%") for one in found]


def finding(rows: Sequence[Row], column: Column) -> str | None:
    """Who is best in ``column``, and what the comparison with standard shows; None where there is nothing to compare.

    Args:
        rows: those of one task, scale and number of heads.
        column: one of the test split.

    Raises:
        ValueError: a column of another split; no claim rests on it.
    """
    name, unit, points = _words(column)
    best = [row for row in rows if row.ranks.get(column.key) == 1]
    if not best or len(rows) < 2:
        return None
    value, test = best[0].estimates[column.key], best[0].tests.get(column.key)
    sentence = (
        f"With {plural(best[0].heads, 'head')}, {_listed([row.mechanism for row in best])} "
        f"{'has' if len(best) == 1 else 'share'} the {'highest' if column.higher_is_better else 'lowest'} {name}, "
        f"{value.format(column.digits)}{unit} ({plural(value.n, 'seed')})"
    )
    if test is None or any(column.key not in row.tests for row in best):  # standard is among the best
        return f"{sentence}."
    who = f"{best[0].mechanism} " if len(best) > 1 else ""
    against = f"{sentence}: {who}{test.difference.format(column.digits, sign=True)}{points} against standard"
    if test.corrected_p is None:
        return f"{against}, {test.verdict} ({_why(best, column)})."
    return f"{against}, {test.verdict} ({p_text(test.corrected_p)}, {_corrected(test.family)})."


def tally(rows: Sequence[Row], column: Column) -> str | None:
    """How many comparisons with standard in ``column`` show what; None where there is none.

    Raises:
        ValueError: a column of another split.
    """
    name, _, _ = _words(column)
    verdicts = [row.tests[column.key].verdict for row in rows if column.key in row.tests]
    if not verdicts:
        return None
    words = [word for word in ("higher", "lower", NOTHING, UNTESTED) if word in verdicts]
    parts = [f"{word} in {verdicts.count(word)}" for word in words]
    start = f"{name[0].upper()}{name[1:]} against standard"
    if words == [UNTESTED]:
        return f"{start}: {UNTESTED}; {_why(rows, column)}."
    if words == [NOTHING]:
        left = len(verdicts)
        return f"{start}: {NOTHING} in {'the only comparison' if left == 1 else f'any of {left} comparisons'}."
    return f"{start}, {plural(len(verdicts), 'comparison')}: {', '.join(parts)}."


def speed(rows: Sequence[Row], threshold: Threshold) -> list[str]:
    """Who gets to ``threshold`` first, a sentence a number of heads, and what the comparisons with standard show."""
    column = EPOCHS_TO_THRESHOLD
    blocks = [[row for row in rows if row.heads == heads] for heads in sorted({row.heads for row in rows})]
    found = [sentence for block in blocks if (sentence := _first_there(block, threshold))]
    verdicts = [told(row.tests[column.key].verdict) for row in rows if column.key in row.tests]
    words = [word for word in ("fewer epochs", "more epochs", NOTHING, UNTESTED) if word in verdicts]
    # A single comparison is in the sentence above, and untested ones show nothing.
    if found and len(verdicts) > 1 and words != [UNTESTED]:
        parts = ", ".join(f"{word} in {verdicts.count(word)}" for word in words)
        found.append(f"Epochs to the threshold against standard, {plural(len(verdicts), 'comparison')}: {parts}.")
    return found


def _first_there(block: Sequence[Row], threshold: Threshold) -> str | None:
    column = EPOCHS_TO_THRESHOLD
    # Among the mechanisms of which most runs got there: the mean of the others is one over their fast runs.
    reached = [row for row in block if column.key in row.estimates]
    if len(block) < 2 or not reached:
        return None
    most = max(row.estimates[column.key].n / len(row.seeds) for row in reached)
    reached = [row for row in reached if row.estimates[column.key].n / len(row.seeds) == most]
    least = min(row.estimates[column.key].mean for row in reached)
    first = [row for row in reached if row.estimates[column.key].mean == least]
    text = (
        f"With {plural(first[0].heads, 'head')}, {_listed([row.mechanism for row in first])} "
        f"{'is' if len(first) == 1 else 'are'} the first to reach {number(threshold.accuracy, 1)} % validation "
        f"accuracy, after {number(least, column.digits)} {'epoch' if least == 1 else 'epochs'} on average "
        f"({' and '.join(dict.fromkeys(runs_of(row) for row in first))})"
    )
    test = first[0].tests.get(column.key)
    if len(first) > 1 or test is None or test.corrected_p is None:
        return f"{text}."
    unit = " epochs" if test.order is None else ""
    return (
        f"{text}: {epochs_apart(test)}{unit} against standard, {told(test.verdict)} "
        f"({p_text(test.corrected_p)}, {_corrected(test.family)})."
    )


def more_seeds(rows: Sequence[Row], command: str) -> tuple[str, str] | None:
    """A sentence and a command for rows of a single seed each; None where a mechanism has several."""
    if not rows or any(len(row.seeds) > 1 for row in rows):
        return None
    again = re.sub(r"\s--seeds(\s+|=)\S+", "", command)
    sentence = (
        "Every mechanism has a single seed, which tells nothing about chance: there are no intervals and no tests. "
        f"Run again with {MORE_SEEDS} seeds{':' if again else '.'}"
    )
    return sentence, f"{again} --seeds {MORE_SEEDS}" if again else ""


def _why(rows: Sequence[Row], column: Column) -> str:
    """Why nothing could be tested."""
    pairs = max(row.tests[column.key].difference.n for row in rows if column.key in row.tests)
    return "a single pair of seeds tells nothing about chance" if pairs == 1 else "no test is possible"


def _words(column: Column) -> tuple[str, str, str]:
    if column.key not in _WORDS:
        raise ValueError(f"claims rest on the test split, received column {column.key!r}: one of {', '.join(_WORDS)}.")
    return _WORDS[column.key]


def _corrected(family: int) -> str:
    return "the only comparison" if family == 1 else f"corrected for {family} comparisons"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def gaps(rows: Sequence[Row]) -> list[str]:
    """What a reader of the means has to know: seeds that are missing, runs without a number, a missing baseline."""
    found = []
    for block in {(row.task, row.scale, row.heads): None for row in rows}:
        compared = [row for row in rows if (row.task, row.scale, row.heads) == block]
        # No plan is known here, so that what others have is what a row may lack.
        seeds = sorted({seed for row in compared for seed in row.seeds})
        for row in compared:
            who, missing = f"{row.mechanism} with {plural(row.heads, 'head')}", sorted(set(seeds) - set(row.seeds))
            if missing:
                which = f"seed{'s' * (len(missing) > 1)} {_listed(list(map(str, missing)))}"
                found.append(
                    f"{who} lacks {which}: its means are over the other seeds, its differences over those that "
                    "standard has, too."
                )
            odd = [c.title for c in COLUMNS if c.tested and not _finite(row, c)]
            if odd:
                found.append(f"{who}: {_listed(odd)} of at least one run is no number; nothing is claimed of it.")
        if len(compared) > 1 and all(row.mechanism != "standard" for row in compared):
            found.append(f"standard was not run with {plural(block[2], 'head')}: nothing is compared with it there.")
    return found


def _finite(row: Row, column: Column) -> bool:
    return column.key not in row.estimates or math.isfinite(row.estimates[column.key].mean)


def origin(task: str, rows: Sequence[Row]) -> str:
    """Which part of a report is the paper's and which is ours, in a line.

    Args:
        task: name of the task.
        rows: what is reported.
    """
    names = list(dict.fromkeys(row.mechanism for row in rows))
    measured = {row["mechanism"] for row in published.rows(task)}
    sources = sorted({str(row["source"]) for row in published.rows(task)})
    parts = [
        f"The task is that of arXiv 2403.01643 ({_listed(sources)}), what it leaves open is our choice"
        if sources
        else "The task is not the paper's: its definition and its setting are our own"
    ]
    defined = [name for name in names if name in PAPER]
    if defined:
        parts.append(f"arXiv 2403.01643 defines {_listed(defined)}")
    unmeasured = [name for name in defined if name not in measured]
    if sources and unmeasured:
        parts.append(f"it has no results of {_listed(unmeasured)} on this task")
    if "expressive" in names:
        parts.append("expressive takes its score from arXiv 2407.18601")
    ours = [name for name in names if name not in (*PAPER, "expressive")]
    if ours:
        parts.append(f"{_listed(ours)} {'is our own variant' if len(ours) == 1 else 'are our own variants'}")
    return f"{'; '.join(parts)}. Seeds, intervals, tests, speeds and pictures are ours."


def waiting(records: Sequence[Record]) -> tuple[str, bool] | None:
    """The worst share of a step that a run spent waiting for data, in words, and whether it is too much.

    None where no run has measured it.
    """
    found = []
    for run in records:
        share = run.get("waiting_share")
        if isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share):
            found.append((float(share), str(RunName.of_record(run))))
    if not found:
        return None
    # The worst, because one run that waited makes the speeds of all comparisons doubtful.
    worst, run_name = max(found)
    text = f"at most {number(100 * worst, 1)} % of a step ({run_name})"
    if worst < WAITING:
        return text, False
    return f"{text}: {100 * WAITING:.0f} % or more, so that times include the data pipeline as well", True


@dataclass(frozen=True, slots=True)
class Standing:
    """Mean ranks of a mechanism among those compared.

    Args:
        mechanism: its name.
        places: key of a column -> mean rank over the numbers of heads.
        mean: mean of all its ranks.
        blocks: number of ranks that is the mean of.
    """

    mechanism: str
    places: dict[str, float]
    mean: float
    blocks: int


def shared_heads(rows: Sequence[Row]) -> list[int]:
    """The numbers of heads that every mechanism among ``rows`` was run at, in rising order."""
    by_mechanism: dict[str, set[int]] = {}
    for row in rows:
        by_mechanism.setdefault(row.mechanism, set()).add(row.heads)
    return sorted(set.intersection(*by_mechanism.values())) if by_mechanism else []


def standings(rows: Sequence[Row]) -> list[Standing]:
    """The rank table: mean ranks over the metrics of the test split and the numbers of heads, the best first.

    Ranks compare within a number of heads and are equal where the printed means are. Only numbers of heads that every
    mechanism was run at count: a mean over other numbers of heads is a mean over other competitors. They know nothing
    of intervals, so that a better rank is no finding.
    """
    ranks: dict[str, dict[str, list[int]]] = {}
    shared = shared_heads(rows)
    for row in rows:
        # A rank among four competitors is not the same as one among five.
        if row.heads not in shared:
            continue
        own = ranks.setdefault(row.mechanism, {})
        for column in COLUMNS:
            if column.tested and column.key in row.ranks:
                own.setdefault(column.key, []).append(row.ranks[column.key])
    found = []
    for mechanism, by_key in ranks.items():
        every = [rank for places in by_key.values() for rank in places]
        if every:
            means = {key: sum(places) / len(places) for key, places in by_key.items()}
            found.append(Standing(mechanism, means, sum(every) / len(every), len(every)))
    return sorted(found, key=lambda one: one.mean) if len(found) > 1 else []
