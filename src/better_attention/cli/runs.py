"""``better-attention runs``: the runs below a folder, and the state of each; results that are damaged."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from better_attention.lab.runs.states import RunState

NAMED_IN_A_NOTE = 10
"""Runs that one note names."""

HELP = "list the runs in a folder and their state (finished, interrupted, diverged, in progress, damaged)"
DEFAULT = ("runs", "results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="default: runs/ and results/")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list; returns 0, or 1 where a run is damaged, or results made of runs.

    Raises:
        UserError: a folder that does not exist.
    """
    from better_attention.lab.runs.states import run_states

    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder. Runs are what `better-attention compare` writes below its --out.")
    folders = args.folders or [Path(name) for name in DEFAULT if Path(name).is_dir()]
    runs = run_states(folders)
    if args.json:
        print(json.dumps([run.as_json() for run in runs], indent=2, ensure_ascii=False))
    else:
        print_runs(runs, folders)
    return 1 if any(run.state == "damaged" for run in runs) else 0


def print_runs(runs: list[RunState], folders: list[Path]) -> None:
    """Print a table with one line for each run and for damaged results, then how many there are in each state."""
    from better_attention.cli.screen import message

    screen = console()
    if not runs:
        where = " and ".join(map(str, folders)) or "runs/ and results/, which do not exist"
        screen.print(message(f"No run folders below {where}. `better-attention compare` makes some."))
        if any(any(folder.glob("*/results.json")) for folder in folders):
            screen.print("There are results of comparisons without their runs: `better-attention table N` reads them.")
        return
    _print_table(screen, [_cells(run) for run in runs])
    _print_departures(screen, runs)
    counts = Counter(run.state if run.kind == "run" else f"{run.state} results" for run in runs)
    screen.print(", ".join(f"{number} {state}" for state, number in counts.items()), markup=False)


COLOURS = {"finished": "green", "interrupted": "yellow", "diverged": "red", "being written": "cyan"}
"""State of a run -> its colour; damaged runs are bold red."""
NUMBERS = ("Test acc. %", "Epochs", "Time", "Commit")
"""Columns that are aligned to the right and never broken."""
LEAST_IMPORTANT = ("Commit", "Time", "Epochs", "Scale", "Task", "Test acc. %")
"""The columns that a narrow screen loses, in this order."""


def _cells(run: RunState) -> dict[str, Text]:
    """Title of a column -> the cell of a run."""
    from rich.text import Text

    from better_attention.cli.progress import duration
    from better_attention.lab.files import plain

    values = run.as_json()
    accuracy = values["test_accuracy"]
    cells = {
        "Run": plain(run.path),
        **{key.title(): plain("–" if values[key] is None else values[key], 60) for key in ("task", "scale")},
        "State": f"{run.state}{': ' if run.detail else ''}{plain(run.detail, 1_000)}",
        "Test acc. %": "–" if accuracy is None else f"{accuracy:.2f}",
        "Epochs": str(run.epochs) if run.kind == "run" else "–",
        "Time": duration(run.seconds) if run.kind == "run" else "–",
        "Commit": plain(values["commit"] or "–", 80)[:10],
    }
    texts = {title: Text(cell) for title, cell in cells.items()}
    texts["State"].stylize(COLOURS.get(run.state, "bold red"))
    return texts


def _print_table(screen: Console, lines: list[dict[str, Text]]) -> None:
    """Print the columns that fit on the screen."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def table_of(titles: Collection[str]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title in titles:
            number = title in NUMBERS
            table.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for line in lines:
            table.add_row(*(line[title] for title in titles))
        return table

    # Without the limit of the screen: a bounded measurement never exceeds its width, so no column would have to go.
    titles, unbounded = list(lines[0]), screen.options.update(max_width=10_000)
    for title in LEAST_IMPORTANT:
        if screen.measure(table_of(titles), options=unbounded).maximum > screen.width:
            titles.remove(title)
    screen.print(table_of(titles))
    if len(titles) < len(lines[0]):
        screen.print("A wider screen, or --json, shows more.", markup=False)


def _print_departures(screen: Console, runs: list[RunState]) -> None:
    """Print how the data of runs differ from those of the task's source, and which runs."""
    from rich.text import Text

    from better_attention.lab.files import plain

    names_of: dict[str, list[str]] = {}
    for run in runs:
        for departure in run.departures:
            names_of.setdefault(departure, []).append(run.path.name)
    for departure, names in names_of.items():
        more = f" and {len(names) - NAMED_IN_A_NOTE:,} more" if len(names) > NAMED_IN_A_NOTE else ""
        listed = plain(", ".join(names[:NAMED_IN_A_NOTE]), 300)
        screen.print(Text(f"≠ {listed}{more}: {plain(departure, 400)}."), soft_wrap=True)
