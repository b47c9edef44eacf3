"""A climbed ladder in files: ``ladder.csv``, ``ladder.json``, and ``ladder.html``, a page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from statistics import geometric_mean

import jinja2

from better_attention.lab.analysis.estimates import number
from better_attention.lab.csv_json import write_csv, write_json
from better_attention.lab.files import write_atomic
from better_attention.lab.ladder.findings import at_best, duels, heights, sentence, spots, within
from better_attention.lab.ladder.grid import FILES, GIVE_UP, Ladder, Rung, RungResult, rung_words
from better_attention.lab.lock import RESULTS_LOCK_SECONDS, locked
from better_attention.lab.report.page import template
from better_attention.lab.runs import manifest
from better_attention.lab.runs.provenance import commit, versions
from better_attention.lab.tasks.recurrence import formula
from better_attention.text import plural


@dataclass(frozen=True, slots=True)
class Report:
    """What a page is made of. Text in it may come from anywhere; the page trusts none of it.

    Args:
        ladder: what was to be climbed.
        rows: what has been found so far.
        notes: rung -> what its data say of themselves.
        complete: False while rungs are left.
        commit, versions: of the program.
    """

    ladder: Ladder
    rows: Sequence[RungResult]
    notes: Mapping[Rung, str]
    complete: bool
    commit: str
    versions: Mapping[str, str]


def write(ladder: Ladder, rows: Sequence[RungResult], notes: Mapping[Rung, str], *, complete: bool) -> None:
    """Write :data:`FILES` below ``ladder.out``, each whole or not at all, and their digests.

    The one by which they are known comes first.
    """
    report = Report(ladder, rows, notes, complete, commit(), versions())
    header = [field.name for field in fields(RungResult)]
    with locked(ladder.out, RESULTS_LOCK_SECONDS):
        manifest.remove(ladder.out, FILES)  # it would be wrong until all of them are written
        write_json(ladder.out / "ladder.json", as_json(report))
        write_csv(ladder.out / "ladder.csv", header, (asdict(row).values() for row in rows))
        write_atomic(ladder.out / "ladder.html", render(report))
        manifest.add(ladder.out, FILES)


def as_json(report: Report) -> dict[str, object]:
    """The whole ladder as plain values."""
    ladder = report.ladder
    return {
        "source": ladder.task.source,
        "task": ladder.task.settings(),
        "grid": {
            "rungs": [list(rung) for rung in ladder.rungs],
            "settings": [asdict(setting) for setting in ladder.settings],
            "mechanisms": [variant.name for variant in ladder.variants],
            "heads": ladder.heads,
            "seeds": ladder.seeds,
            "screen": ladder.screen,
            "given_up_after": GIVE_UP,
        },
        "complete": report.complete,
        "command": ladder.command,
        "commit": report.commit,
        "versions": dict(report.versions),
        "rows": [asdict(row) for row in report.rows],
        "findings": [sentence(duel) for duel in duels(report.rows)["overall"]],
    }


def render(report: Report) -> str:
    """The page as HTML text."""
    ladder, rows = report.ladder, report.rows
    budget = ladder.task.epochs * -(-(ladder.task.train_samples or 0) // ladder.task.batch_size)
    names = [variant.name for variant in ladder.variants]
    found = duels(rows)
    best = spots(at_best(rows))
    return _template().render(
        ladder=ladder,
        report=report,
        task=ladder.task,
        budget=budget,
        names=names,
        # formula() is asked for a delay of 0, which here makes room for the letter τ.
        rules=[f"{name}: x_t = {formula(name, 0).replace('-0', '-τ')} mod N" for name in ladder.task.rules],
        moduli=sorted({N for N, _ in ladder.rungs}),
        delays=sorted({delay for _, delay in ladder.rungs}),
        best=best,
        by_setting={setting: spots([r for r in rows if r.setting == setting]) for setting in ladder.settings},
        heights=heights(rows, ladder.rungs),
        equal_compute=heights(within(rows, budget), ladder.rungs),
        sizes={name: size_of(name, rows) for name in names},
        trained_at=list(dict.fromkeys(row.commit for row in rows if row.commit)),
        paces={name: pace_of(name, rows) for name in names},
        duels=found,
        findings=[sentence(duel) for duel in found["overall"]],
        give_up=GIVE_UP,
    )


def size_of(name: str, rows: Sequence[RungResult]) -> str:
    """The widths and parameters of a mechanism's models, from the smallest to the largest: ``28 … 32; 9,770``."""
    own = [row for row in rows if row.mechanism == name]
    sizes = ({row.width for row in own}, {row.params for row in own if row.params})
    spans = [" … ".join(number(size, 0) for size in sorted({min(some), max(some)})) for some in sizes if some]
    return "; ".join(spans) or "–"


def pace_of(name: str, rows: Sequence[RungResult]) -> str:
    """A mechanism's updates beside torch's layer: the geometric mean over its models, and from the least to the most.

    Each model was measured once, so that equal values are one measurement.
    """
    ratios = sorted({row.times_as_fast for row in rows if row.mechanism == name and row.times_as_fast})
    if not ratios:
        return "–"
    mean = number(geometric_mean(ratios), 2)
    return f"{mean} ({number(ratios[0], 2)}–{number(ratios[-1], 2)})" if len(ratios) > 1 else mean


def shade(accuracy: float | None, modulus: int) -> str:
    """How far an accuracy is from chance to 100 %, 0 ... 1, for the colour of its cell.

    >>> shade(50.0, 2), shade(75.0, 2), shade(None, 2)
    ('0.00', '0.50', '0.00')
    """
    chance = 100 / modulus
    return f"{0.0 if accuracy is None else min(1.0, max(0.0, (accuracy - chance) / (100 - chance))):.2f}"


@cache
def _template() -> jinja2.Template:
    return template("ladder.html", plural=plural, shade=shade, rung_words=rung_words)
