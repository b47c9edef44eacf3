"""Kinds of arguments that several verbs take."""

from __future__ import annotations

import argparse
from pathlib import Path

from better_attention.lab.tasks.variant import Variant


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
    if not text.strip():
        raise argparse.ArgumentTypeError("expected the name of a folder, received nothing; . is the folder you are in")
    return Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return whole(text, at_least=1)


def whole(text: str, at_least: int = 0) -> int:
    """A whole number of at least 0."""
    if not text.strip().isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {at_least}, received {text!r}")
    return int(text)
