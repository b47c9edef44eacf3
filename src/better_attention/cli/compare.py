"""``better-attention compare``: train the mechanisms side by side, and print the paper's kind of table."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.mechanism import MECHANISMS, Mechanism

if TYPE_CHECKING:
    from better_attention.experiments.compare import Plan

HELP = "train the mechanisms side by side on real data: table, results.csv, results.json, report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("task", nargs="?", default="digits", metavar="TASK", help="digits (default), mnist or imdb")
    parser.add_argument(
        "--mechanisms",
        type=names,
        default=tuple(MECHANISMS),
        metavar="A,B,...",
        help=f"default: {','.join(MECHANISMS)}; each may be followed by +expressive or +align",
    )
    parser.add_argument("--heads", type=numbers, metavar="1,2,4", help="attention heads; default: the task's")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="runs of each row, seeds 0 ... N-1; default: the task's"
    )
    parser.add_argument(
        "--scale",
        choices=("smoke", "small", "paper"),
        default="small",
        help="seconds, minutes (default), the paper's setting",
    )
    parser.add_argument("--epochs", type=positive, metavar="N", help="most epochs of a run")
    parser.add_argument(
        "--patience", type=whole, metavar="N", help="stop after N epochs without a better validation loss; 0: never"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="samples of one update")
    parser.add_argument("--lr", type=float, metavar="X", help="learning rate")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the data; default: where `data fetch` puts it"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the runs; default: runs/TASK-SCALE")


def names(text: str) -> tuple[str, ...]:
    """Mechanisms from a comma-separated list; each once."""
    try:
        return tuple(dict.fromkeys(Mechanism.of(name.strip()).name for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from a comma-separated list; each once."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = whole(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1, received 0")
    return number


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, received {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Compare, and print the table."""
    from better_attention.cli.watch import make_watcher
    from better_attention.experiments import tables
    from better_attention.experiments.compare import compare
    from better_attention.experiments.train import Interrupted

    plan = make_plan(args)
    screen = console()
    watcher = make_watcher(screen, plan)
    try:
        with watcher:
            study, failed = compare(plan, watcher)
    except Interrupted as stopped:
        message = f"Interrupted. {stopped} The same command continues there:\n  {plan.command}"
        screen.print(message, markup=False, soft_wrap=True)
        return 128 + stopped.signal
    if study.records:
        tables.print_table(tables.summarise(study.records), screen)
        for name in ("report.html", "results.csv", "results.json", "curves.csv"):
            screen.print(f"{plan.out / name}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that the arguments describe.

    Raises:
        UserError, ValueError: an unknown task, or a setting out of range.
    """
    from better_attention.experiments.compare import Plan
    from better_attention.experiments.tasks import TASKS

    if args.task not in TASKS:
        raise UserError(f"unknown task {args.task!r}: choose one of {', '.join(TASKS)}.")
    task = TASKS[args.task](args.scale)
    given = {name: getattr(args, name) for name in ("epochs", "patience", "batch_size", "lr")}
    task = replace(task, **{name: value for name, value in given.items() if value is not None})
    return Plan(
        task=task,
        mechanisms=[Mechanism.of(name) for name in args.mechanisms],
        heads=args.heads or (task.default_heads,),
        seeds=args.seeds or task.seeds,
        out=args.out or Path("runs") / f"{task.name}-{task.scale}",
        data=args.data,
        device=args.device,
        command=command_line(),
    )


def command_line() -> str:
    """The command as the user could type it again."""
    return shlex.join(["better-attention", *sys.argv[1:]])
