"""The paper's kind of table, on the screen and in files: mean ± interval over seeds, a rank in every column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from better_attention.lab import csv_json
from better_attention.lab.analysis.estimates import number
from better_attention.lab.analysis.findings import gaps
from better_attention.lab.analysis.learning_speed import epochs_apart, told
from better_attention.lab.analysis.paired import Comparison, p_text
from better_attention.lab.analysis.study import Record, Threshold
from better_attention.lab.analysis.summary import (
    MACHINE,
    Column,
    Row,
    against_paper,
    by_importance,
    columns_of,
    compared_columns,
    paper_value,
    summarise,
)
from better_attention.lab.files import plain

__all__ = ["Row", "print_table", "summarise", "write_csv", "write_json"]


def print_table(rows: Sequence[Row], console: Console, threshold: Threshold | None = None) -> None:
    """Print the results, the differences to standard and, where the paper has the task, ours and the paper's.

    Ranks stand in parentheses, the best of each column is bold. Differences carry the corrected p and the word for what
    it shows. What does not fit side by side comes below. Of single seeds there are neither intervals nor tests, and
    nothing stands in their place.

    Args:
        rows: of :func:`better_attention.lab.analysis.summary.summarise`.
        console: where to.
        threshold: what the epochs and seconds to a threshold are about.
    """
    if not rows:
        console.print(Text("No run has finished."))
        return
    title = ", ".join(dict.fromkeys(f"{row.task} (scale {row.scale})" for row in rows))
    several = any(len(row.seeds) > 1 for row in rows)
    legend = f"mean{' ± half width of the 95 % interval over seeds' * several} (rank)"
    seeds: Strip = ("Seeds", [len(row.seeds) for row in rows])
    columns = by_importance(columns_of(rows))
    ours: list[list[Strip]] = [[(column.title, [_ours(row, column) for row in rows])] for column in columns]
    print_fitting(f"{title}: {legend}", [*_heads(rows), seeds], ours, _ends_of_blocks(rows), console)
    for text in _explanations(rows, threshold):
        console.print(Text(text, style="dim"))
    for gap in gaps(rows):
        console.print(Text(f"note: {plain(gap)}"))
    compared = [row for row in rows if row.tests]
    differences = [group for column in compared_columns(rows) for group in _against_standard(compared, column)]
    if differences:
        tested = any(one.corrected_p is not None for row in compared for one in row.tests.values())
        title = f"Difference to standard, seed by seed{' (p of the paired t-test, Holm-corrected)' * tested}"
        print_fitting(title, _heads(compared), differences, _ends_of_blocks(compared), console)

    printed = [row for row in rows if row.published]
    both = [_beside_paper(printed, column) for column in against_paper(rows)]
    if both:
        sources = ", ".join(sorted({str(row.published["source"]) for row in printed if row.published}))
        title = f"Ours, the paper's ({sources}), difference"
        print_fitting(title, _heads(printed), both, _ends_of_blocks(printed), console)


def _explanations(rows: Sequence[Row], threshold: Threshold | None) -> list[str]:
    """What the titles of the columns leave open."""
    found = []
    if any(len(row.seeds) == 1 for row in rows):
        found.append("A single seed tells nothing about chance: there is no interval and no test of it.")
    if any("times_as_fast" in row.estimates for row in rows):
        found.append(
            "times as fast as nn.MHA: speed of an update relative to the same model on torch.nn.MultiheadAttention, "
            "above 1 is faster."
        )
    if threshold is not None:
        found.append(
            "Epochs and seconds to threshold: until the validation accuracy reached "
            f"{number(threshold.accuracy, 1)} %, {threshold.rule}."
        )
    return found


Strip = tuple[str, Sequence[object]]
"""A column of a printed table: its title and its cells."""


def _heads(rows: Sequence[Row]) -> list[Strip]:
    return [("Mechanism", [row.mechanism for row in rows]), ("Heads", [row.heads for row in rows])]


def _ours(row: Row, column: Column) -> Text:
    value, rank = row.estimates.get(column.key), row.ranks.get(column.key)
    if value is None:
        return Text("never" if column.kind == "epochs" else "–")
    # Every seed has a model of the same size, so that an interval would say nothing.
    text = number(value.mean, column.digits) if column.kind == "size" else value.format(column.digits)
    if column.kind == "epochs" and value.n < len(row.seeds):
        text = f"{text}, {value.n} of {len(row.seeds)} runs"
    return Text(text if rank is None else f"{text} ({rank})", style="bold" if rank == 1 else "")


def _against_standard(rows: Sequence[Row], column: Column) -> list[list[Strip]]:
    """``+0.05 ± 0.40 (p 1.00)`` and ``no difference shown``; a column each, so that a narrow screen can part them."""
    found = [row.tests.get(column.key) for row in rows]
    style = ["bold" if one and one.shows else "" for one in found]
    differences = [Text(_difference(one, column), bold) for one, bold in zip(found, style, strict=True)]
    verdicts = [Text(_verdict(one, column), bold) for one, bold in zip(found, style, strict=True)]
    strips: list[list[Strip]] = [[(f"{column.title} − standard", differences)]]
    if any(one is not None and one.corrected_p is not None for one in found):
        strips.append([(f"{column.title}: verdict", verdicts)])
    return strips


def _verdict(one: Comparison | None, column: Column) -> str:
    if one is None:
        return "not compared"
    return told(one.verdict) if column.kind == "epochs" else one.verdict


def _difference(one: Comparison | None, column: Column) -> str:
    if one is None:
        return "–"
    text = epochs_apart(one) if column.kind == "epochs" else one.difference.format(column.digits, sign=True)
    return text if one.corrected_p is None else f"{text} ({p_text(one.corrected_p)})"


def _beside_paper(rows: Sequence[Row], column: Column) -> list[Strip]:
    ours = [row.estimates[column.key].mean if column.key in row.estimates else None for row in rows]
    theirs = [paper_value(row, column) for row in rows]
    differences = [None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)]

    def cells(values: Sequence[float | None], *, sign: bool = False) -> list[str]:
        return ["–" if value is None else number(value, column.digits, sign=sign) for value in values]

    return [(column.title, cells(ours)), ("paper", cells(theirs)), ("diff.", cells(differences, sign=True))]


def print_fitting(
    title: str, heads: Sequence[Strip], groups: Sequence[Sequence[Strip]], ends: Sequence[bool], console: Console
) -> None:
    """Print ``heads`` and as many ``groups`` of columns as the console is wide enough for; then the next ones."""
    # Without the console's limit: a bounded measurement never exceeds the width, so nothing would seem too wide.
    unbounded = console.options.update(max_width=10_000)
    shown: list[Strip] = []
    for group in groups:
        wider = _table("", [*heads, *shown, *group], ends)
        # A single group that is too wide is printed all the same, since it cannot be parted further.
        if shown and console.measure(wider, options=unbounded).maximum > console.width:
            console.print(_table(title, [*heads, *shown], ends))
            title, shown = "", []
        shown += group
    if shown:
        console.print(_table(title, [*heads, *shown], ends))


def _table(title: str, strips: Sequence[Strip], ends: Sequence[bool]) -> Table:
    table = Table(title=Text(plain(title)) if title else None, title_justify="left", title_style="bold", pad_edge=False)
    table.box = rich.box.SIMPLE_HEAD
    for place, (name, _) in enumerate(strips):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for cells, end in zip(zip(*(cells for _, cells in strips), strict=True), ends, strict=True):
        texts = [cell if isinstance(cell, Text) else Text(plain(cell, 60)) for cell in cells]
        table.add_row(*texts, end_section=end)
    return table


def _ends_of_blocks(rows: Sequence[Row]) -> list[bool]:
    keys = [(row.task, row.scale, row.heads) for row in rows]
    return [*(key != following for key, following in pairwise(keys)), True]


def write_csv(rows: Sequence[Row], path: str | Path, threshold: Threshold | None = None) -> None:
    """Write the rows as CSV, atomically.

    Each column of :data:`COLUMNS` that has values gives a mean, its ``_interval`` (half width; a ratio's two ends
    instead, ``_low`` and ``_high``), ``_rank``, ``_gain`` and ``_gain_interval`` (against standard, seed by seed),
    ``_paper`` and ``_difference`` (ours - the paper's). Those of the test split, and the epochs to the ``threshold``,
    also give what the comparison with standard shows: ``_pairs`` (seeds that both have), ``_p`` (paired t-test),
    ``_p_wilcoxon``, ``_p_holm`` (the former, or the latter where there is no spread, corrected for the number of
    comparisons), ``_effect`` (d_z, Hedges) and ``_verdict``.

    ``departures`` says what sets the runs of a row apart from the paper's, settings and data; it is empty where nothing
    does, and where the paper does not have the task.

    Numbers stay numbers, in full precision; free text that a spreadsheet could take for a formula is prefixed by an
    apostrophe. A cell without a value is empty.

    Args:
        rows: of :func:`better_attention.lab.analysis.summary.summarise`.
        path: where to.
        threshold: written as ``threshold_accuracy`` where there is one; ``epochs_to_threshold_runs`` counts the runs
            that reached it, and the mean is theirs.
    """
    columns = columns_of(rows)
    table = [_flat(row, columns) | ({"threshold_accuracy": threshold.accuracy} if threshold else {}) for row in rows]
    header = tuple(table[0]) if table else ("task", "scale", "mechanism", "score", "heads", "seeds", "departures")
    csv_json.write_csv(path, header, (cells.values() for cells in table))


def write_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> None:
    """Write learning curves as CSV, atomically: a line an epoch of every run, keyed by the run's name.

    Training values are running averages over the epoch, dropout on; ``results.csv`` has those of the finished model.
    """
    header = list(dict.fromkeys(key for curve in curves.values() for epoch in curve for key in epoch))
    lines = ([run, *(epoch.get(key) for key in header)] for run, curve in curves.items() for epoch in curve)
    csv_json.write_csv(path, ("run", *header), lines)


def _flat(row: Row, columns: Sequence[Column]) -> dict[str, object]:
    cells: dict[str, object] = {key: getattr(row, key) for key in ("task", "scale", "mechanism", "score")}
    cells |= {"heads": row.heads, "seeds": len(row.seeds), "departures": "; ".join(row.departures) or None}
    for column in columns:
        key, ours, gain = column.key, row.estimates.get(column.key), row.gains.get(column.key)
        theirs = paper_value(row, column)
        # A mean is a float, but a number of parameters is a whole number for a spreadsheet, too.
        cells[key] = ours and (int(ours.mean) if column.kind == "size" and ours.mean.is_integer() else ours.mean)
        if column.kind == "ratio":
            cells |= {f"{key}_low": ours and ours.low, f"{key}_high": ours and ours.high}
        elif column.kind != "size":
            cells[f"{key}_interval"] = ours and ours.half_width
        cells[f"{key}_rank"] = row.ranks.get(key)
        if column.kind == "metric":
            cells |= {f"{key}_gain": gain and gain.mean, f"{key}_gain_interval": gain and gain.half_width}
        if column.kind == "epochs":
            cells[f"{key}_runs"] = ours.n if ours else 0
        if column.compared:
            cells |= _tested(row, key)
        cells[f"{key}_paper"] = theirs
        if column.kind not in MACHINE:
            cells[f"{key}_difference"] = ours.mean - theirs if ours and theirs is not None else None
    return cells


def _tested(row: Row, key: str) -> dict[str, object]:
    one = row.tests.get(key)
    return {
        f"{key}_pairs": one and one.difference.n,
        f"{key}_p": one and one.t_p,
        f"{key}_p_wilcoxon": one and one.wilcoxon_p,
        f"{key}_p_holm": one and one.corrected_p,
        f"{key}_effect": one and one.effect,
        f"{key}_verdict": one and one.verdict,
    }


def write_json(records: Sequence[Record], path: str | Path) -> None:
    """Write the records as a JSON array of one object per run, atomically; numbers that are not finite become null."""
    csv_json.write_json(path, [dict(record) for record in records])
