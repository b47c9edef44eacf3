"""``better-attention ladder``: softmax against expressive attention on recurrences of rising difficulty."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import command_line, folder, names, numbers, positive, words
from better_attention.cli.screen import message
from better_attention.cli.settings import settings_of
from better_attention.lab.tasks.base import SCALES
from better_attention.lab.tasks.variant import Variant

if TYPE_CHECKING:
    from rich.console import Console

    from better_attention.lab.ladder.grid import Ladder
    from better_attention.lab.training.events import Notify

HELP = "how hard a recurrence each score still predicts: heat maps over N and τ, updates to 99 %, paired tests"
MECHANISMS = ("standard", "expressive", "efficient", "efficient+expressive")
GRID = ("modulus", "delay", "scaling", "positions", "layers", "epochs", "seeds", "length")
"""Settings of the task that the grid and the options below set."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="small",
        help="the grid: a minute, hours (default; the estimate says how many), days; our own task, in no paper",
    )
    parser.add_argument(
        "--mechanisms", type=names, default=MECHANISMS, metavar="A,B,...", help=f"default: {','.join(MECHANISMS)}"
    )
    parser.add_argument("--rungs", type=rungs, metavar="2x4,8x4", help="N x τ, rising in difficulty")
    parser.add_argument("--scalings", type=words, metavar="A,B", help="sqrt (1/√d_k), raw (1), learned (per head)")
    parser.add_argument("--positions", type=words, metavar="A,B", help="learned, rotary, alibi-weight, alibi-score")
    parser.add_argument("--layers", type=numbers, metavar="1,2", help="depths of the model")
    parser.add_argument("--heads", type=positive, metavar="N", help="default: the task's")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 ... N-1")
    parser.add_argument(
        "--updates",
        type=positive,
        metavar="N",
        help="maximum per run, in whole epochs of 50 updates (of N, if N is less)",
    )
    parser.add_argument(
        "--screen",
        action="store_true",
        help="all settings with seed 0 alone, the other seeds where validation was best",
    )
    parser.add_argument(
        "--equal-width", action="store_true", help="one width for all; default: widths of about equal parameters"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting of the task; repeatable"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu", help="default: cpu; the models are small"
    )
    parser.add_argument(
        "--json", action="store_true", help="print ladder.json at the end; progress goes to standard error"
    )
    parser.add_argument("--yes", action="store_true", help="begin even if the estimate is above an hour")
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder for the runs; default: runs/ladder-SCALE")


def rungs(text: str) -> tuple[tuple[int, int], ...]:
    """Rungs from a comma-separated list of NxT."""
    pairs = [part.partition("x") for part in text.split(",")]
    if not all(sign for _, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"expected N x τ, such as 8x4 or 2x4,8x4, received {text!r}")
    return tuple((positive(modulus), positive(delay)) for modulus, _, delay in pairs)


def run(args: argparse.Namespace) -> int:
    """Climb, and write the page after every rung; 0, 1 where a run diverged, 130 after Ctrl-C."""
    from better_attention.lab.ladder.climb import Climb
    from better_attention.lab.ladder.grid import FILES
    from better_attention.lab.training.launch import is_first
    from better_attention.lab.training.progress import Interrupted

    ladder = make_ladder(args)
    screen = console(stderr=args.json)  # standard output is for the JSON alone
    screen.print("a ladder of recurrences, our own definition: neither paper has it", markup=False, soft_wrap=True)
    climb = Climb(ladder, make_progress(screen, ladder, args.scale, args.yes))
    try:
        for rung in climb.run():
            from better_attention.lab.ladder import page  # seconds, which the estimate need not wait for

            if is_first():
                page.write(ladder, climb.rows, climb.notes, complete=rung == ladder.rungs[-1])
    except Interrupted as stopped:
        text = f"Interrupted. {stopped} The same command continues there:\n  {ladder.command}"
        screen.print(message(text), markup=False, soft_wrap=True)
        return 128 + stopped.signal
    from better_attention.lab.ladder.findings import duels, sentence

    for duel in duels(climb.rows)["overall"]:
        screen.print(sentence(duel), markup=False, soft_wrap=True)
    for name in reversed(FILES):
        screen.print(message(f"{ladder.out / name}"), markup=False, soft_wrap=True)
    if args.json:
        print((ladder.out / "ladder.json").read_text("utf-8"))
    return 1 if any(row.test_accuracy is None for row in climb.rows) else 0


def make_ladder(args: argparse.Namespace) -> Ladder:
    """The ladder that the arguments describe.

    Raises:
        UserError, ValueError: a setting out of range.
    """
    from better_attention.lab.ladder import grid as grids
    from better_attention.lab.ladder.climb import epoch_updates
    from better_attention.lab.ladder.grid import Ladder, Setting
    from better_attention.lab.tasks.catalogue.recurrence import recurrence

    grid = grids.SCALES[args.scale]
    task = recurrence(args.scale)
    chosen = settings_of(task, args.set)
    taken = [name for name in chosen if name in GRID]
    if taken:
        raise UserError(f"--set {taken[0]}: the ladder's grid sets it; see --rungs, --scalings, --layers, --updates.")
    rungs = args.rungs or grid["rungs"]
    task = replace(task, modulus=min(modulus for modulus, _ in rungs))  # rules that differ there differ everywhere
    # The model is that of "small" at every scale; only the grid grows.
    task = replace(task, **{"width": recurrence("small").width, "equal_params": not args.equal_width} | chosen)
    updates = args.updates or grid["updates"]
    if updates < epoch_updates(task):  # validation comes after each epoch, so none may be longer than the run
        task = replace(task, train_samples=updates * task.batch_size)
    task = replace(task, epochs=updates // epoch_updates(task))
    columns = [getattr(args, name) or grid[name] for name in ("scalings", "positions", "layers")]
    ladder = Ladder(
        task=task,
        rungs=rungs,
        settings=[Setting(*column) for column in product(*columns)],
        variants=[Variant.of(name) for name in args.mechanisms],
        heads=args.heads or task.default_heads,
        seeds=args.seeds or grid["seeds"],
        out=args.out or Path("runs") / f"ladder-{args.scale}",
        screen=args.screen,
        device=args.device,
        command=command_line(),
    )
    for rung, column in product(ladder.rungs, ladder.settings):
        ladder.task_of(rung, column)  # refuses what the task cannot be
    return ladder


def make_progress(screen: Console, ladder: Ladder, scale: str, yes: bool) -> Notify:
    """Prints one line per run, and one every half minute of a long one.

    When it is called with an estimate of more than an hour and the user has not said ``yes``, it raises UserError.
    """
    from better_attention.cli.progress import LONG_RUN_SECONDS, ProgressLines, duration
    from better_attention.lab.ladder.climb import epoch_updates
    from better_attention.lab.training.events import Began, Ended, Estimated, Event
    from better_attention.text import plural

    class LadderProgress(ProgressLines):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            match event:
                case Estimated(seconds=seconds, runs=runs):
                    self.show_estimate(seconds, runs)
                case Began(name=name, number=number, runs=runs):
                    self.title = f"[{number} of at most {runs}] {name}"
                case Ended(record=record):
                    updates = record.epochs * epoch_updates(ladder.task)
                    self.say(f"{self.title}  test {record.test_accuracy:.2f} % after {updates:,} updates")
                case _:
                    pass

        def show_estimate(self, seconds: float, runs: int) -> None:
            self.say(
                f"at most {duration(seconds)} of training for {plural(runs, 'run')} with "
                f"{epoch_updates(ladder.task)} updates per epoch and at most {plural(self.epochs, 'epoch')}; solved "
                "runs end sooner, hopeless ones are not begun"
            )
            if seconds > LONG_RUN_SECONDS and not yes:
                smaller = "" if scale == "smoke" else ", take --scale smoke, which needs minutes,"
                raise UserError(
                    f"that may take more than an hour: add --yes to begin{smaller} or choose fewer --rungs, "
                    "--mechanisms, --scalings, --positions, --layers or --seeds. Nothing was begun."
                )

    return LadderProgress(screen, ladder.task.epochs)
