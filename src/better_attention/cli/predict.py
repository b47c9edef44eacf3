"""``better-attention predict``: a finished run's model on new inputs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from better_attention.cli import UserError, console
from better_attention.cli.run_inputs import INPUTS, numbered_samples
from better_attention.cli.screen import say

if TYPE_CHECKING:
    from better_attention.lab.runs.load import Run
    from better_attention.lab.tasks.inputs import NamedInput

MOST_NAMED = 10
"""Inputs that one note names."""

HELP = "classify new inputs, or test samples, with the model of a finished run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("path", type=Path, metavar="RUN", help="folder of a run, such as runs/digits-small/super-h4-s0")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=INPUTS,
    )
    parser.add_argument("--index", type=int, action="append", metavar="N", help="test sample N of the data set, from 0")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the data set is, for --index")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="scale images of another size to that of the data set, and take the middle square",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Predict, and print one line per input: class, probability, and the true class of a test sample."""
    from better_attention.lab.runs.load import load_run

    trained = load_run(args.path)
    if not args.inputs and not args.index:
        raise UserError("nothing to predict: name inputs after the run, or --index N for a test sample.")
    # A function, so that standard input is read only where an input is called "-".
    inputs = trained.task.read_inputs(args.inputs, lambda: sys.stdin.buffer.read(), resize=args.resize)
    say_unlike(inputs, trained)
    inputs += numbered_samples(trained, args.index or [], args.data)
    predictions = trained.predict([named.value for named in inputs])
    rows = [
        {
            "input": named.title,
            "class": prediction.label,
            "probability": prediction.probability,
            "probabilities": dict(prediction.probabilities),
        }
        | ({} if named.truth is None else {"truth": named.truth})
        for named, prediction in zip(inputs, predictions, strict=True)
    ]
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print_rows(rows)
    return 0


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table with one row per input."""
    from rich.table import Table
    from rich.text import Text

    from better_attention.lab.files import plain

    table = Table(
        "Input",
        # A translation is no class, and has no probabilities of classes.
        "Class" if all(row["probabilities"] for row in rows) else "Output",
        "Probability",
        *(["Truth"] if any("truth" in row for row in rows) else []),
        box=None,
    )
    for row in rows:
        # Names and contents come from files, and may hold what acts on a terminal.
        cells = [plain(row["input"], 60), plain(row["class"]), f"{row['probability']:.3f}"]
        table.add_row(*map(Text, [*cells, *([plain(row["truth"])] if "truth" in row else [])]))
    console().print(table)


def say_unlike(inputs: Sequence[NamedInput], trained: Run) -> None:
    """Report on standard error which inputs differ from all training data: predictions for them mean little."""
    from better_attention.lab.files import plain

    titles: dict[str, list[str]] = {}
    for named in inputs:
        for difference in trained.task.unlike(named.value, trained.assets):
            titles.setdefault(difference, []).append(plain(named.title, 300))
    for difference, names in titles.items():
        more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
        say(f"note: {', '.join(names[:MOST_NAMED])}{more}: {difference}")
