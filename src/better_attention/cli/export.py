"""``better-attention export``: a trained model as a file for ONNX Runtime, in float32 or int8."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import add_samples, positive
from better_attention.cli.screen import message, say
from better_attention.export.onnx import ATTENTION_OPSET
from better_attention.export.quantise import AGREEMENT

if TYPE_CHECKING:
    from better_attention.lab.trained.export import Exported, Settings

HELP = "write a trained model as ONNX, in float32 or int8, compared with the model in ONNX Runtime"
SAMPLES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CONVERTED",
        help="folder of a finished run, of a model that `convert` or `distil` wrote, or of a model of transformers",
    )
    parser.add_argument(
        "--to", choices=("onnx", "int8"), default="onnx", help="float32 (default), or int8 for linear maps"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, such as model.onnx")
    parser.add_argument(
        "--opset",
        type=positive,
        default=ATTENTION_OPSET,
        metavar="N",
        help=f"version of ONNX's operators, at least 18; default: {ATTENTION_OPSET}, the first with one for softmax",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=AGREEMENT,
        metavar="X",
        help=f"least mean cosine similarity of int8 outputs to those in float32; default: {AGREEMENT}",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=SAMPLES,
        metavar="N",
        help=f"held-out samples on which that is measured; default: {SAMPLES}",
    )
    parser.add_argument("--force", action="store_true", help="write the file even if it differs from the model by more")
    add_samples(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Export, compare, and print how far the file is from the model."""
    from torch.onnx import OnnxExporterError

    from better_attention.lab.runs.overwrite_guard import check_file
    from better_attention.lab.trained.export import export_trained, is_onnx
    from better_attention.lab.trained.model import open_trained
    from better_attention.lab.trained.samples import samples_of

    settings = make_settings(args)
    # Before the model and its data are read, which may take long.
    if args.out.suffix.lower() != ".onnx":
        raise UserError(
            f"--out {args.out}: what is written is an ONNX file, in float32 or int8, and `better-attention edge` and "
            f"others know one by its name: call it {args.out.with_suffix('.onnx').name}."
        )
    check_file(args.out, "--out", is_onnx)
    trained = open_trained(args.path)
    samples = samples_of(trained.origin, args.data, args.texts)
    if samples is None:
        raise UserError(f"{args.path} is a model of transformers: name a file with one text in each line with --texts.")
    try:
        exported = export_trained(trained, args.out, samples, settings)
    except OnnxExporterError as error:
        # torch wraps the reason in a page of advice on its exporter.
        raise UserError(f"torch cannot export this model to ONNX: {error.__cause__ or error}") from error
    except ValueError as error:
        raise UserError(in_words_of_the_command(str(error))) from error
    if args.json:
        print(json.dumps(exported.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(exported)
    say(f"wrote {args.out}")
    return 0


def make_settings(args: argparse.Namespace) -> Settings:
    """The settings that the arguments describe.

    Raises:
        UserError: an agreement that is no cosine similarity.
    """
    from better_attention.lab.trained.export import Settings

    if not 0 <= args.agreement <= 1:
        raise UserError(f"--agreement must be from 0 to 1, received {args.agreement:g}.")
    return Settings(args.to == "int8", args.opset, args.agreement, args.samples, args.force)


def show(exported: Exported) -> None:
    """Print the comparison with the model, and the accuracy before and after."""
    screen = console()
    lines = [str(exported.parity)]
    if exported.int8:
        lines = ["in float32, before it became int8: " + lines[0].partition(": ")[2], str(exported.int8)]
    if exported.accuracy_before is not None and exported.accuracy_after is not None:
        lines.append(
            f"test accuracy: {exported.accuracy_before:.2f} % of the model, {exported.accuracy_after:.2f} % of the file"
        )
    for line in lines:
        screen.print(message(line), markup=False, soft_wrap=True)


def in_words_of_the_command(error: str) -> str:
    """An error of the library with the options of the command in the place of its arguments."""
    options = {
        "Pass tolerance=None to write it all the same.": "Add --force to write it all the same.",
        "Pass a lower agreement=, or refuse=False to have it all the same.": "Nothing was written. Pass a lower "
        "--agreement, or --force to write it all the same.",
        "Choose another opset= than": "Choose another --opset than",
    }
    for argument, option in options.items():
        error = error.replace(argument, option)
    return error
