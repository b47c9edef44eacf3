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
    from better_attention.lab.runs.states import Found

TOLD = 10
"""Runs that one note names."""

HELP = "list the runs below a folder: finished, interrupted where, diverged why, being written by whom, damaged"
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
    from better_attention.lab.runs.states import inventory

    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder. Runs are what `better-attention compare` writes below its --out.")
    folders = args.folders or [Path(name) for name in DEFAULT if Path(name).is_dir()]
    found = inventory(folders)
    if args.json:
        print(json.dumps([one.as_json() for one in found], indent=2, ensure_ascii=False))
    else:
        print_runs(found, folders)
    return 1 if any(one.state == "damaged" for one in found) else 0


def print_runs(found: list[Found], folders: list[Path]) -> None:
    """A table with a line for each run and for damaged results; then how many there are in each state."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from better_attention.cli.progress import duration
    from better_attention.cli.screen import message
    from better_attention.lab.files import plain

    screen = console()
    if not found:
        where = " and ".join(map(str, folders)) or "runs/ and results/, which do not exist"
        screen.print(message(f"No run folders below {where}. `better-attention compare` makes some."))
        if any(any(folder.glob("*/results.json")) for folder in folders):
            screen.print("There are results of comparisons without their runs: `better-attention table N` reads them.")
        return
    colours = {"finished": "green", "interrupted": "yellow", "diverged": "red", "being written": "cyan"}
    lines = []
    for one in found:
        told = one.as_json()
        accuracy = told["test_accuracy"]
        cells = {
            "Run": plain(one.path),
            **{key.title(): plain("–" if told[key] is None else told[key], 60) for key in ("task", "scale")},
            "State": f"{one.state}{': ' if one.detail else ''}{plain(one.detail, 1_000)}",
            "Test acc. %": f"{accuracy:.2f}" if isinstance(accuracy, int | float) else "–",
            "Epochs": str(one.epochs) if one.kind == "run" else "–",
            "Time": duration(one.seconds) if one.kind == "run" else "–",
            "Commit": plain(told["commit"] or "–", 80)[:10],
        }
        lines.append({title: Text(cell) for title, cell in cells.items()})
        lines[-1]["State"].stylize(colours.get(one.state, "bold red"))

    def drawn(titles: Collection[str]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title in titles:
            number = title in ("Test acc. %", "Epochs", "Time", "Commit")
            table.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for line in lines:
            table.add_row(*(line[title] for title in titles))
        return table

    titles, unbounded = list(lines[0]), screen.options.update(max_width=10_000)
    for title in ("Commit", "Time", "Epochs", "Scale", "Task", "Test acc. %"):  # a narrow screen: what matters least
        if screen.measure(drawn(titles), options=unbounded).maximum > screen.width:
            titles.remove(title)
    screen.print(drawn(titles))
    if len(titles) < len(lines[0]):
        screen.print("A wider screen, or --json, shows more.", markup=False)
    unlike: dict[str, list[str]] = {}
    for one in found:
        for departure in one.as_json()["departures"]:
            unlike.setdefault(departure, []).append(one.path.name)
    for departure, names in unlike.items():
        more = f" and {len(names) - TOLD:,} more" if len(names) > TOLD else ""
        screen.print(Text(f"≠ {plain(', '.join(names[:TOLD]), 300)}{more}: {plain(departure, 400)}."), soft_wrap=True)
    counts = Counter(one.state if one.kind == "run" else f"{one.state} results" for one in found)
    screen.print(", ".join(f"{number} {state}" for state, number in counts.items()), markup=False)
