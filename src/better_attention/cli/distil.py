"""``better-attention distil``: a converted model learns from the model that it was."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import add_samples, command_line, folder, positive, whole
from better_attention.cli.screen import message, say

if TYPE_CHECKING:
    from rich.console import Console

    from better_attention.lab.trained.convert import Accuracy
    from better_attention.lab.trained.distil import Settings
    from better_attention.lab.training.distillation import Distilled

HELP = "train a converted model towards the one that it was: accuracy before and after; continues where it stopped"
PLAIN_SECONDS = 30.0
"""Time between two lines about the progress."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("path", type=Path, metavar="CONVERTED", help="folder that `better-attention convert` wrote")
    parser.add_argument(
        "--teacher", type=Path, required=True, metavar="RUN_OR_DIR", help="folder of the model that was converted"
    )
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder for the distilled model; default: CONVERTED-distilled"
    )
    parser.add_argument(
        "--hidden-epochs",
        type=whole,
        default=1,
        metavar="N",
        help="passes in which each converted layer learns what its predecessor returned; default: 1",
    )
    parser.add_argument(
        "--output-epochs",
        type=whole,
        default=2,
        metavar="N",
        help="passes after those in which the outputs of the model are learned; default: 2",
    )
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="largest learning rate; default: 0.001")
    parser.add_argument("--samples", type=positive, metavar="N", help="training samples to learn from; default: all")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="of one update; default: 64")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the order of the batches; default: 0")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: a GPU if there is one"
    )
    add_samples(parser)
    parser.add_argument("--json", action="store_true", help="print JSON; progress goes to standard error")


def run(args: argparse.Namespace) -> int:
    """Distil, write, and print the losses; 0, 1 where a loss was not finite, 130 after Ctrl-C."""
    from better_attention.lab.trained import distil
    from better_attention.lab.trained.convert import check_folder
    from better_attention.lab.trained.model import open_trained
    from better_attention.lab.trained.samples import samples_of
    from better_attention.lab.training.launch import is_first
    from better_attention.lab.training.progress import DivergedError, Interrupted

    out = args.out or args.path.with_name(f"{args.path.name}-distilled")
    # The student is read from there, again by the command that continues after an interruption.
    if out.resolve() == args.path.resolve():
        raise UserError(f"--out {out} is the model that is to be distilled: name another folder.")
    check_folder(out)
    student, teacher = open_trained(args.path), open_trained(args.teacher)
    distil.check_pair(student, teacher)
    samples = samples_of(teacher.origin, args.data, args.texts)
    if samples is None:
        raise UserError(f"{args.teacher} is a model of transformers: name a file with its texts with --texts.")
    screen = console(stderr=args.json)
    lines, command = progress(screen), command_line()
    try:
        result, accuracy = distil.distil_trained(student, teacher, samples, make_settings(args), out, lines, command)
    except Interrupted as stopped:
        text = f"Interrupted. {stopped} The same command continues there:\n  {command}"
        screen.print(message(text), markup=False, soft_wrap=True)
        # The status by which shells report a process that a signal has ended.
        return 128 + stopped.signal
    except DivergedError as error:
        say(f"better-attention: {error}")
        return 1
    if is_first():
        show(result, accuracy, screen, json_too=args.json)
        say(f"wrote {out}")
    return 0


def make_settings(args: argparse.Namespace) -> Settings:
    """The settings that the arguments describe.

    Raises:
        UserError: there would be nothing to do, or a learning rate that is not above 0.
    """
    from better_attention.lab.trained.distil import Settings

    if not args.hidden_epochs + args.output_epochs:
        raise UserError("--hidden-epochs and --output-epochs are both 0: there would be nothing to do.")
    if not args.lr > 0:
        raise UserError(f"--lr must be above 0, received {args.lr:g}.")
    names = ("hidden_epochs", "output_epochs", "lr", "seed", "samples", "batch_size", "device")
    return Settings(**{name: getattr(args, name) for name in names})


def progress(screen: Console) -> Callable[[int, int, float], None]:
    """Prints where the distillation stands, every half minute."""
    said = time.monotonic()

    def line(step: int, steps: int, loss: float) -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_SECONDS:
            said = time.monotonic()
            screen.print(f"update {step:,} of {steps:,}  loss {loss:.4g}")

    return line


def show(result: Distilled, accuracy: Accuracy, screen: Console, *, json_too: bool) -> None:
    """Print the losses of the epochs and the accuracy, as text or as JSON."""
    if json_too:
        before_after = {"before": accuracy.before, "after": accuracy.after}
        print(json.dumps(result.as_dict() | {"accuracy": before_after}, indent=2))
        return
    for number, losses in enumerate(result.hidden, start=1):
        worst = max(losses)
        mean = sum(losses) / len(losses)
        screen.print(f"layers, epoch {number}: relative squared error {mean:.3g} in the mean, at most {worst:.3g}")
    for number, loss in enumerate(result.output, start=1):
        screen.print(f"outputs, epoch {number}: loss {loss:.4g}")
    if accuracy.before is not None and accuracy.after is not None:
        screen.print(f"test accuracy: {accuracy.before:.2f} % before, {accuracy.after:.2f} % after")
