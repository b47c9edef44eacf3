"""``better-attention list``: the mechanisms and the tasks."""

from __future__ import annotations

import argparse
import json
from typing import Any

from better_attention.cli import console
from better_attention.layer.parts import PARTS
from better_attention.mechanism import MECHANISMS, PROJECTIONS, Mechanism

HELP = "list the mechanisms and the tasks"

Entry = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print both lists; returns 0."""
    found = {"mechanisms": mechanisms(), "tasks": tasks()}
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    return 0


def mechanisms() -> list[Entry]:
    """One mapping per named mechanism: which maps are learned, whether W_A is there, which score."""
    return [
        {
            "name": name,
            "learned": [p for p in PROJECTIONS if p in row.projections],
            "aligned": row.aligned,
            "score": row.score,
        }
        for name, row in MECHANISMS.items()
    ]


def tasks() -> list[Entry]:
    """One mapping per task: its title, its source in the paper, its data set."""
    from better_attention.lab.tasks.catalogue import TASKS

    found: list[Entry] = []
    for name, make in TASKS.items():
        task = make("paper")
        found.append({"name": name, "title": task.title, "source": task.source, "dataset": task.dataset})
    return found


def _print(found: dict[str, list[Entry]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="Mechanisms", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("Name", no_wrap=True)
    for part in PARTS:
        table.add_column(part.symbol, justify="center", no_wrap=True)
    table.add_column("Score", no_wrap=True)
    for row in found["mechanisms"]:
        mechanism = Mechanism.of(row["name"])
        marks = ["✓" if part.is_in(mechanism) else part.absent for part in PARTS]
        table.add_row(str(row["name"]), *marks, str(row["score"]))
    out = console()
    out.print(table)
    out.print(
        "Any name can be followed by +expressive or +align: efficient+expressive, standard+align. In a comparison, one "
        "with W_A can be followed by +per-head or +identity: super+per-head.\n"
    )

    table = Table(title="Tasks", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("Name", "What", "Source"):
        table.add_column(title, no_wrap=title == "Name")
    for row in found["tasks"]:
        table.add_row(str(row["name"]), str(row["title"]), str(row["source"]))
    out.print(table)
    out.print("`better-attention show NAME` tells more of either.")
