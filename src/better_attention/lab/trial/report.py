"""The trial in files: ``cells.csv``, ``summary.json`` and ``tables.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from better_attention.lab.analysis.estimates import estimate, number
from better_attention.lab.analysis.paired import p_text
from better_attention.lab.csv_json import write_csv, write_json
from better_attention.lab.files import write_atomic
from better_attention.lab.ladder.grid import Rung
from better_attention.text import plural

from .findings import Pair, Verdict, final, judged, pairs, verdicts
from .grid import SCHEMES, STAGES, Trial
from .stages import Row, chosen, waiting

FAMILIES = {"main": ("main", "long"), "group": ("group",), "multi": ("multi",)}
"""Tables -> the stages whose rows they show, the later one in place of the earlier."""
TITLES = {
    "main": "At the tuned setting",
    "group": "In the setting of the group's code: one-hot tokens, raw q·k, SGD with momentum, 20,000 updates",
    "multi": "Four rules at once",
}
MEASURED = ("params", "made", "solved_at", "validation_loss", "test_accuracy", "seconds", "commit")
"""Columns of ``cells.csv`` behind those of the cell."""
LABELS = {
    "learned": "learned positions",
    "rotary": "rotary positions",
    "alibi-weight": "ALiBi on the weight",
    "alibi-score": "ALiBi in the score",
}


def write(trial: Trial, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the files below ``folder``; returns their paths."""
    write_csv(folder / "cells.csv", [*asdict(rows[0].cell), *MEASURED], map(_flat, rows))
    write_json(folder / "summary.json", summary(trial, rows))
    write_atomic(folder / "tables.md", "\n".join(tables(trial, rows)))
    return [folder / name for name in ("cells.csv", "summary.json", "tables.md")]


def _flat(row: Row) -> list[object]:
    cell = asdict(row.cell) | {"rules": "+".join(row.cell.rules)}
    found = row.outcome
    lowest = min((loss for _, loss, _ in found.curve), default=None)
    seconds = round(found.seconds, 3)
    return [
        *cell.values(),
        *(found.params, found.updates, found.solved_at, lowest, found.test_accuracy, seconds, row.commit),
    ]


def summary(trial: Trial, rows: Sequence[Row]) -> dict[str, object]:
    """Verdicts, settings and how much is left, as plain values."""
    return {
        "finished": {stage: sum(row.cell.stage == stage for row in rows) for stage in STAGES},
        "waiting": {stage: sum(1 for _ in waiting(trial, rows, [stage])) for stage in STAGES},
        "settings": {" / ".join(who): " / ".join(what) for who, what in chosen(trial, rows).items()},
        "judged": {
            name: {"sizes": _sizes(found), "verdicts": [asdict(one) for one in verdicts(found)]}
            for name, of in FAMILIES.items()
            if (found := judged(final(rows, of), trial.seeds))
        },
        "commits": sorted({row.commit for row in rows}),
    }


def tables(trial: Trial, rows: Sequence[Row]) -> Iterator[str]:
    """The lines of ``tables.md``."""
    yield "# Tables of the trial\n\nWritten by `better-attention trial --report`; README.md says what they mean.\n"
    for name, stages in FAMILIES.items():
        of = final(rows, stages)
        if of:
            yield f"## {TITLES[name]}\n"
            if whole := judged(of, trial.seeds):
                yield f"Judged on the sizes with {plural(trial.seeds, 'seed')}: {', '.join(_sizes(whole))}.\n"
                yield from _verdict_table(verdicts(whole))
            else:
                yield "No size has all its seeds yet: nothing is judged.\n"
            for scheme in SCHEMES:
                yield from _pair_table(trial, scheme, pairs(of, scheme))
    yield "## Chosen in `tune`: scale and optimiser\n\n| size | score, positions | setting |\n|---|---|---|"
    for (size, mechanism, positions), (scaling, optimiser) in chosen(trial, rows).items():
        yield f"| {size} | {_score(mechanism)}, {positions} | {scaling}, {optimiser} |"
    yield ""


def _sizes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.cell.size for row in rows))


def _score(mechanism: str) -> str:
    return "softmax" if mechanism == "standard" else mechanism


def _verdict_table(found: Sequence[Verdict]) -> Iterator[str]:
    yield "| positions | pairs | expressive − softmax, points | E2 | slope, points per doubling of states | E3 |"
    yield "|---|---|---|---|---|---|"
    for one in found:
        if one.difference is not None:
            gap = f"{one.difference.difference.format(1, sign=True)}, {p_text(one.difference.corrected_p)}"
            line = "–" if one.slope is None else one.slope.format(2, sign=True)
            n = one.difference.difference.n
            yield f"| {LABELS[one.scheme]} | {n} | {gap} | {one.at_least_as_good} | {line} | {one.grows} |"
    yield "\n| positions | solved by expressive alone | by softmax alone | by softmax nowhere | E5 | time |"
    yield "|---|---|---|---|---|---|"
    for one in found:
        if one.difference is not None and one.time is not None:
            places = (_places(of) for of in (one.weakly, one.reverse, one.strongly))
            yield f"| {LABELS[one.scheme]} | {' | '.join(places)} | {one.alone} | {one.time.format(2)} |"
    yield ""


def _places(found: Sequence[tuple[str, Rung]]) -> str:
    return "; ".join(f"{size} ({modulus}, {delay})" for size, (modulus, delay) in found) or "none"


def _pair_table(trial: Trial, scheme: str, made: Sequence[Pair]) -> Iterator[str]:
    """A row a size and rung: both accuracies, their difference, how many seeds solved it."""
    if not made:
        return
    yield f"### {LABELS[scheme]}\n"
    yield "| size | N | τ | softmax % | expressive % | difference | solved: softmax, expressive | updates |"
    yield "|---|---|---|---|---|---|---|---|"
    sizes = [size for size in trial.sizes if any(pair.place[0] == size for pair in made)]
    for size in sizes:
        for rung in sorted({p.place[1] for p in made if p.place[0] == size}, key=lambda r: (r[0] ** r[1], r)):
            yield _pair_line(size, rung, [p for p in made if p.place[:2] == (size, rung)])
    yield ""


def _pair_line(size: str, rung: Rung, made: Sequence[Pair]) -> str:
    means = [_accuracy([getattr(p, side) for p in made]) for side in ("softmax", "expressive")]
    gap = estimate([pair.difference for pair in made]).format(1, sign=True)
    solved = [sum(getattr(p, side).outcome.solved_at is not None for p in made) for side in ("softmax", "expressive")]
    counts = ", ".join(f"{n}/{len(made)}" for n in solved)
    updates = number(max(pair.expressive.cell.updates for pair in made), 0)
    return f"| {size} | {rung[0]} | {rung[1]} | {means[0]} | {means[1]} | {gap} | {counts} | {updates} |"


def _accuracy(rows: Sequence[Row]) -> str:
    values = [row.outcome.test_accuracy for row in rows]
    return "diverged" if None in values else estimate([v for v in values if v is not None]).format(1)
