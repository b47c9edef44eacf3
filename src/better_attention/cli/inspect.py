"""``better-attention inspect``: what the heads of a finished run or of a converted model look at, as one page."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from better_attention.cli import UserError
from better_attention.cli.arguments import layers, positive
from better_attention.cli.run_inputs import INPUTS, numbered_samples, own_data
from better_attention.cli.screen import say
from better_attention.errors import describe

if TYPE_CHECKING:
    from torch import nn

    from better_attention.lab.inspection.gather import RunInput
    from better_attention.lab.inspection.inspection import Inspection
    from better_attention.lab.runs.load import Run

HELP = "one page of a model's attention on samples: every head by both scores, its entropy, W_A"
EXAMPLES = 3
MODEL_OPTIONS = ("model", "samples")
RUN_OPTIONS = ("inputs", "index", "examples", "data", "resize")
RECIPE, ORIGIN = "recipe.json", "origin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "path",
        metavar="RUN_OR_MODEL",
        help="folder of a run, such as runs/digits-small/super-h4-s0, or of `better-attention convert`; folder that "
        "save_converted wrote, with --model and --samples; or MODULE:FUNCTION, which returns a model, with --samples",
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help=f"of a run or of transformers: {INPUTS}")
    parser.add_argument("--index", type=int, action="append", metavar="N", help="test sample N of the data set, from 0")
    parser.add_argument(
        "--examples", type=positive, metavar="N", help=f"test samples where no inputs are named; default: {EXAMPLES}"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the data set is")
    parser.add_argument("--resize", action="store_true", default=None, help="scale images of another size")
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="returns the model as it was before the conversion; weights are read"
    )
    parser.add_argument(
        "--samples",
        metavar="MODULE:FUNCTION",
        help="returns a list of inputs of one sample each: tensors, tuples, dicts or lab.inspection.gather.ModelInput",
    )
    parser.add_argument("--layers", type=layers, metavar="A,B,...", help="numbers, names or patterns; default: all")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; default: inspection-NAME.html in the current folder"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, and print its path."""
    from better_attention.lab.inspection.page import is_ours, write_page
    from better_attention.lab.runs.overwrite_guard import check_file

    if Path(args.path).name == RECIPE:
        args.path = str(Path(args.path).parent)
    name = Path(args.path).resolve().name if ":" not in args.path else args.path
    out = args.out or Path(f"inspection-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}.html")
    check_file(out, "--out", is_ours)
    found = inspect_model(args, name) if is_model(args) else inspect_run(args, name)
    write_page(found, out)
    print(out)
    return 0


def is_model(args: argparse.Namespace) -> bool:
    """Whether a model of the user's is named, and not a run.

    Raises:
        UserError: an option that belongs to the other kind, or one that is missing.
    """
    folder = Path(args.path)
    converted = (folder / RECIPE).is_file() and not (folder / ORIGIN).is_dir()
    built = ":" in args.path and not folder.exists()
    if args.model is not None and not converted:
        raise UserError(
            f"--model is for a folder that save_converted wrote; {args.path} "
            f"{'says itself what its model is' if (folder / RECIPE).is_file() else f'holds no {RECIPE}'}."
        )
    other = RUN_OPTIONS if converted or built else MODEL_OPTIONS
    wrong = [name for name in other if getattr(args, name) not in (None, [])]
    if wrong:
        kind = "a model" if converted or built else "a run"
        what = "INPUT" if wrong[0] == "inputs" else f"--{wrong[0]}"
        raise UserError(f"{args.path} is {kind}, for which {what} has no meaning: omit it.")
    if (converted or built) and args.samples is None:
        raise UserError(f"{args.path} needs --samples MODULE:FUNCTION, a function that returns a list of inputs.")
    if converted and args.model is None:
        raise UserError(
            f"{args.path} holds the weights of a converted model and not its code: add --model MODULE:FUNCTION, a "
            "function that returns the model as it was before the conversion."
        )
    return converted or built


def inspect_run(args: argparse.Namespace, name: str) -> Inspection:
    """Look into a finished run, or into what `better-attention convert` made of one or of a model of transformers."""
    from better_attention.lab.inspection.gather import look_into_model, look_into_run, run_of, text_inputs
    from better_attention.lab.runs.load import load_run
    from better_attention.lab.tasks.inputs import read_texts
    from better_attention.lab.trained.host import is_host
    from better_attention.lab.trained.model import is_converted, open_trained
    from better_attention.lab.trained.origin import RunOrigin

    path = Path(args.path)
    if not is_converted(path) and not is_host(path):
        run = load_run(path)
        return look_into_run(run, run_inputs(args, run), args.layers)
    trained = open_trained(path)
    if isinstance(trained.origin, RunOrigin):
        run = run_of(trained)
        return look_into_run(run, run_inputs(args, run), args.layers)
    if not args.inputs:
        raise UserError(f"{path} is a model of transformers: name texts, or text files, after it.")
    texts = [one.title for one in read_texts(args.inputs, lambda: sys.stdin.buffer.read())]
    return look_into_model(trained.model, name, text_inputs(trained, texts), args.layers)


def run_inputs(args: argparse.Namespace, trained: Run) -> list[RunInput]:
    """The inputs that are named, or else some test samples."""
    from better_attention.lab.inspection.gather import RunInput, examples

    if not args.inputs and not args.index:
        return examples(trained, own_data(trained, args.data, "--data"), args.examples or EXAMPLES)
    if args.examples is not None:
        raise UserError("--examples is for inspections without INPUT and --index: omit one of them.")
    named = trained.task.read_inputs(args.inputs, lambda: sys.stdin.buffer.read(), resize=bool(args.resize))
    named += numbered_samples(trained, args.index or [], args.data)
    titles = [one.title if one.truth is None else f"{one.title}, class {one.truth}" for one in named]
    return [
        RunInput(title, trained.task.encode([one.value], trained.assets)[0])
        for title, one in zip(titles, named, strict=True)
    ]


def inspect_model(args: argparse.Namespace, name: str) -> Inspection:
    """Look into a model of the user's."""
    from torch import nn

    from better_attention.conversion.recipe import load_converted
    from better_attention.lab.inspection.gather import look_into_model

    built = ":" in args.path and not Path(args.path).exists()
    option, text = ("RUN_OR_MODEL", args.path) if built else ("--model", args.model)
    model: nn.Module = function(option, text)()
    if not isinstance(model, nn.Module):
        raise UserError(f"{option} {text}: expected a function that returns an nn.Module, received {describe(model)}.")
    if not built:
        say(f"loading the weights of {args.path}")
        load_converted(model, args.path)
    return look_into_model(model, name, function("--samples", args.samples)(), args.layers)


def function(option: str, text: str) -> Callable[[], Any]:
    """The function that ``MODULE:FUNCTION`` names; modules in the current folder come first.

    Raises:
        UserError: no such module or function.
    """
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module.removesuffix(".py"))
    except (ModuleNotFoundError, ValueError) as error:
        raise UserError(f"{option} {text}: expected MODULE:FUNCTION, but {error}.") from None
    if not callable(made := getattr(found, name, None)):
        raise UserError(f"{option} {text}: {module} has no function {name!r}.")
    return made  # type: ignore[no-any-return]
