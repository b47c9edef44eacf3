"""What several verbs take: kinds of arguments, the sizes of a layer; and the command line as the user typed it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from better_attention.cli import UserError
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training import launch

SIZES = {"embed_dim": (128, "D", "model width"), "heads": (4, "H", "attention heads"), "length": (64, "L", "tokens")}
"""Of a layer: name -> default, that of the paper's MNIST model, and what it is."""


def names(text: str) -> tuple[str, ...]:
    """Mechanisms from a comma-separated list; each once."""
    try:
        return tuple(dict.fromkeys(Variant.of(name).name for name in words(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def words(text: str) -> tuple[str, ...]:
    """Words from a comma-separated list; each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from a comma-separated list; each once."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def folder(text: str) -> Path:
    """A folder to write into; it need not exist."""
    # Path("") is the current folder, which nobody means by an empty variable of a shell.
    if not text.strip():
        raise argparse.ArgumentTypeError("expected the name of a folder, received nothing; . is the folder you are in")
    return Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return whole(text, at_least=1)


def whole(text: str, at_least: int = 0) -> int:
    """A whole number of at least 0."""
    # int() would also take signs, and underscores between digits.
    if not text.strip().isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {at_least}, received {text!r}")
    return int(text)


def layers(text: str) -> tuple[str | int, ...]:
    """Attention layers from a comma-separated list of numbers, names and patterns; each once."""
    return tuple(int(word) if word.isdecimal() else word for word in words(text))


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Declare where samples of a trained model come from."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data of a run's task; default: where `data fetch` puts it"
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="texts for a model of transformers, one in each line, UTF-8"
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes of a layer; the defaults are those of the paper's MNIST model."""
    for name, (size, letter, what) in SIZES.items():
        text = f"{what}; default: {size}"
        parser.add_argument(option(name), type=positive, default=size, metavar=letter, help=text)


def add_kv_heads(parser: argparse.ArgumentParser, of: str) -> None:
    """Declare the heads of projected keys and values; ``of``: what they are of."""
    parser.add_argument(
        "--kv-heads",
        type=positive,
        metavar="G",
        help=f"grouped heads: G of projected keys and values {of}; divides --heads; default: as many",
    )


def kv_heads_of(args: argparse.Namespace, variants: Sequence[Variant]) -> list[int | None]:
    """``--kv-heads`` for each of the variants; None for those that project no keys and have none to group.

    Raises:
        UserError: it does not divide ``--heads``, or none of the variants projects keys.
    """
    try:
        found = [variant.kv_heads(args.kv_heads, args.heads, ("--kv-heads", "--heads")) for variant in variants]
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.kv_heads not in (None, args.heads) and not any(variant.projects_keys for variant in variants):
        raise UserError(
            f"--kv-heads {args.kv_heads} groups projected keys, and {', '.join(variant.name for variant in variants)} "
            f"has no W_K: each of the {args.heads} heads reads its own slice of the input. Leave --kv-heads out, or "
            "take a mechanism that projects keys, such as 'optimised'."
        )
    return found


def option(name: str) -> str:
    """How the setting ``name`` is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse a number of heads that does not divide the width.

    Raises:
        UserError: it does not.
    """
    if args.embed_dim % args.heads:
        raise UserError(
            f"--embed-dim must be divisible by --heads, received {args.embed_dim} and {args.heads}: "
            "each head has D / H columns."
        )


def command_line() -> str:
    """The command as the user could type it again, with as many processes."""
    return launch.command_line(sys.argv[1:])
