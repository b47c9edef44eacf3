"""A table of the paper beside ours, on the screen and as data: difference, seeds, interval, and what was not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from better_attention.lab import csv_json
from better_attention.lab.analysis.estimates import Estimate, number
from better_attention.lab.analysis.summary import Column
from better_attention.lab.files import plain
from better_attention.lab.paper.beside import TABLES, Block, Line
from better_attention.lab.report.tables import Strip, print_fitting


def print_blocks(table: int, found: Sequence[Block], console: Console) -> None:
    """Print a table of the paper; below each block what was not run and where parameters differ."""
    console.print(Text(f"Table {table} of arXiv 2403.01643v2: {TABLES[table][0]}", style="bold"))
    console.print(
        Text(
            "Ours: mean ± half width of the 95 % interval over seeds, of one seed its value alone. The paper: means of "
            "five runs (ImageNet: one), no spread given; seconds on an RTX 4090. Times as fast: above 1 is faster, as "
            "standard attention or as torch.nn.MultiheadAttention; ours from updates timed alternately, where a run "
            "has them.",
            style="dim",
        )
    )
    for block in found:
        _print_block(block, console)
    if any(block.ours for block in found):
        console.print(
            Text(
                "Our train figures are those of the kept weights (best validation), dropout off; "
                "the paper does not say which it gives.",
                style="dim",
            )
        )


def _print_block(block: Block, console: Console) -> None:
    title = f"{block.part.task}, {block.part.published()[0]['source']}; ours: "
    title += block.ours.description() if block.ours else "nothing was run"
    lines = block.lines
    heads: list[Strip] = [
        ("Mechanism", [line.mechanism for line in lines]),
        ("Heads", [line.heads for line in lines]),
        ("Seeds", [line.seeds or "not run" for line in lines]),
    ]
    groups = [_strips(block, column) for column in block.columns()]
    ends = [*(line.mechanism != following.mechanism for line, following in pairwise(lines)), True]
    whole = block.ours and block.ours.paper_scale and not block.not_run
    console.print(Text(f"\n{plain(title)}", style="bold" if whole else "bold yellow"), soft_wrap=True)
    print_fitting("", heads, groups, ends, console)
    for departure in block.ours.departures if block.ours else ():
        console.print(Text(f"≠ Our data: {plain(departure, 400)}.", style="bold red"), soft_wrap=True)
    for line, column in block.wrong_counts():
        ours, theirs = line.estimate(column.key), line.paper(column.key)
        console.print(
            Text(
                f"≠ {column.title} of {line.mechanism}, h {line.heads}: {number(ours.mean if ours else 0, 0)} ours, "
                f"{number(theirs or 0, 0)} in the paper: not the same model.",
                style="bold red",
            )
        )
    if block.not_run:
        console.print(Text(f"Not run: {_named(block.not_run)}. To run: {block.part.command}"))


def _named(lines: Sequence[Line]) -> str:
    """``standard (h 1, 2), super (h 1)``."""
    heads: dict[str, list[str]] = {}
    for line in lines:
        heads.setdefault(line.mechanism, []).append(str(line.heads))
    return ", ".join(f"{name} (h {', '.join(numbers)})" for name, numbers in heads.items())


def _strips(block: Block, column: Column) -> list[Strip]:
    key, lines = column.key, block.lines

    def cells(values: Sequence[float | None], digits: int = column.digits, *, sign: bool = False) -> list[str]:
        return ["–" if value is None else number(value, digits, sign=sign) for value in values]

    ours = [Text("–") if (value := line.estimate(key)) is None else _cell(line, column, value) for line in lines]
    theirs: Strip = ("paper", cells([line.paper(key) for line in lines]))
    if column.kind == "metric":
        return [(column.title, ours), theirs, ("diff.", cells([line.difference(key) for line in lines], sign=True))]
    if key == "epoch_seconds":  # of different machines: the ratios are what can be compared
        ratios = [cells([block.times_as_fast(line, theirs=who) for line in lines], 3) for who in (False, True)]
        return [(column.title, ours), theirs, ("times as fast as standard", ratios[0]), ("paper", ratios[1])]
    return [(column.title, ours), theirs] if column.kind == "size" else [(column.title, ours)]


def _cell(line: Line, column: Column, value: Estimate) -> Text:
    if column.kind != "size":
        return Text(value.format(column.digits))
    wrong = line.count_agrees(column.key) is False
    return Text(number(value.mean, 0) + " ≠" * wrong, style="bold red" if wrong else "")


def as_json(table: int, found: Sequence[Block]) -> dict[str, Any]:
    """The same as plain JSON values."""
    return {
        "table": table,
        "title": TABLES[table][0],
        "blocks": [
            {
                "task": block.part.task,
                "source": block.part.published()[0]["source"],
                "scale": block.ours and block.ours.scale,
                "paper_scale": block.ours and block.ours.paper_scale,
                "changed": block.ours and block.ours.changed,
                "departures": list(block.ours.departures) if block.ours else [],
                "files": [str(file) for file in block.ours.files] if block.ours else [],
                "rows": [cells for _, cells in _flat(block)],
                "not_run": [{"mechanism": line.mechanism, "heads": line.heads} for line in block.not_run],
                "command": block.part.command,
            }
            for block in found
        ],
    }


def write_csv(found: Sequence[Block], path: str | Path) -> None:
    """A line a row, atomically: of each figure ours, ``_interval`` (half width), ``_paper`` and ``_difference``."""
    lines = [
        {
            "task": block.part.task,
            "source": block.part.published()[0]["source"],
            "scale": block.ours and block.ours.scale,
            "paper_scale": block.ours and block.ours.paper_scale,
            **({"departures": "; ".join(block.ours.departures)} if block.ours and block.ours.departures else {}),
            **cells,
        }
        for block in found
        for _, cells in _flat(block)
    ]
    header = list(dict.fromkeys(key for cells in lines for key in cells))
    csv_json.write_csv(path, header, ([cells.get(key) for key in header] for cells in lines))


def _flat(block: Block) -> Iterator[tuple[Line, dict[str, object]]]:
    for line in block.lines:
        cells: dict[str, object] = {
            "mechanism": line.mechanism,
            "heads": line.heads,
            "in_paper": line.published is not None,
            "seeds": line.seeds,
        }
        for column in block.columns():
            key, ours = column.key, line.estimate(column.key)
            mean = None if ours is None else int(ours.mean) if column.kind == "size" else ours.mean
            cells |= {key: mean, f"{key}_paper": line.paper(key)}
            if column.kind == "size":
                cells[f"{key}_agrees"] = line.count_agrees(key)
            elif column.kind == "ratio":  # a geometric mean: its interval has two sides
                cells |= {f"{key}_low": ours and ours.low, f"{key}_high": ours and ours.high}
            else:
                cells[f"{key}_interval"] = ours and ours.half_width
            if column.kind == "metric":
                cells[f"{key}_difference"] = line.difference(key)
            if key == "epoch_seconds":
                cells["times_as_fast_as_standard"] = block.times_as_fast(line, theirs=False)
                cells["times_as_fast_as_standard_paper"] = block.times_as_fast(line, theirs=True)
        yield line, cells
