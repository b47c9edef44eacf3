"""``better-attention convert``: a trained model with another mechanism, and what that costs it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import add_samples, command_line, folder, layers, positive, whole
from better_attention.cli.screen import message, say
from better_attention.mechanism import MECHANISMS, Mechanism

if TYPE_CHECKING:
    from better_attention.lab.trained.convert import Settings
    from better_attention.lab.trained.origin import Origin
    from better_attention.lab.trained.samples import Samples

HELP = "give a trained model another mechanism and keep its weights: report, accuracy before and after"
CALIBRATE = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_DIR",
        help="folder of a finished run, such as runs/digits-small/standard-h4-s0, or of a model that save_pretrained "
        "of transformers wrote",
    )
    parser.add_argument("mechanism", type=mechanism, metavar="MECHANISM", help=f"{', '.join(MECHANISMS)}, or a sum")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder for the converted model")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_true", help="refuse what cannot compute the same function; the default")
    how.add_argument("--approximate", action="store_true", help="least squares where it cannot be exact")
    parser.add_argument(
        "--calibrate",
        type=whole,
        metavar="N",
        help=f"training samples on which errors are measured and approximations fitted; default: {CALIBRATE} with "
        "--approximate where there are samples, otherwise 0",
    )
    parser.add_argument(
        "--max-len", type=positive, metavar="L", help="size of a new W_A; default: the length of the run's inputs"
    )
    parser.add_argument(
        "--layers", type=layers, metavar="A,B,...", help="numbers, names or patterns such as 'blocks.*'; default: all"
    )
    parser.add_argument("--align-causal", action="store_true", help="keep a new W_A triangular, for causal models")
    add_samples(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def mechanism(text: str) -> str:
    """The name of a mechanism."""
    try:
        return Mechanism.of(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Convert, judge, write, and print the report."""
    from better_attention.lab.trained import convert
    from better_attention.lab.trained.model import open_trained

    # First, because reading a model and its data may take long.
    convert.check_folder(args.out)
    trained = open_trained(args.path)
    samples = samples_for(args, trained.origin)
    settings = make_settings(args, samples)
    try:
        report, accuracy = convert.convert_trained(trained, args.mechanism, settings, samples)
    except ValueError as error:
        raise UserError(in_words_of_the_command(str(error))) from error
    story = convert.story_of(args.mechanism, settings, report, accuracy, command_line())
    convert.write(trained, trained.model, args.out, story)
    if args.json:
        print(json.dumps(story, indent=2, ensure_ascii=False))
    else:
        screen = console()
        screen.print(message(str(report)), markup=False, soft_wrap=True)
        if accuracy.before is not None and accuracy.after is not None:
            screen.print(f"test accuracy: {accuracy.before:.2f} % before, {accuracy.after:.2f} % after")
    say(f"wrote {args.out}")
    return 0


def samples_for(args: argparse.Namespace, origin: Origin) -> Samples | None:
    """The samples of the model; None where there are none and an exact conversion needs none.

    Raises:
        ValueError: data that an approximation needs, or that was named, is missing or of another run.
    """
    from better_attention.lab.data.samples import NotFetched
    from better_attention.lab.trained.samples import samples_of

    try:
        return samples_of(origin, args.data, args.texts)
    except NotFetched as missing:
        if args.approximate or args.calibrate or args.data is not None:
            raise
        say(f"note: the accuracy is not measured: {missing}")
        return None


def make_settings(args: argparse.Namespace, samples: Samples | None) -> Settings:
    """The settings that the arguments describe; by default an approximation is calibrated where there are samples."""
    from better_attention.lab.trained.convert import Settings

    calibrate = args.calibrate
    if calibrate is None:
        there = samples.available if samples else 0
        calibrate = min(CALIBRATE, there) if args.approximate else 0
    return Settings(not args.approximate, calibrate, args.max_len, args.layers, args.align_causal or None)


def in_words_of_the_command(error: str) -> str:
    """An error of the library with the options of the command in the place of its arguments."""
    options = {
        "Pass exact=False for an approximation.": "Add --approximate for an approximation.",
        "max_len=": "--max-len ",
        "layers=": "--layers ",
    }
    for argument, option in options.items():
        error = error.replace(argument, option)
    return error
