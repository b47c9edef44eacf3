"""``better-attention generate``: text from the language model of a finished run, as it is written."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

from better_attention.cli import UserError
from better_attention.cli.arguments import positive, whole
from better_attention.cli.screen import say
from better_attention.text import plural

if TYPE_CHECKING:
    from better_attention.lab.data.tokenisers import Tokeniser
    from better_attention.lab.generation.writer import Settings, Written
    from better_attention.lab.models.language_model import LanguageModel

HELP = "continue a text with the language model of a finished run"
RESTRICTIONS = ("temperature", "top_k", "top_p", "min_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "path", type=Path, metavar="RUN", help="folder of a run of text-lm, such as runs/text-lm-small/efficient-h4-s0"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="what the model continues; repeatable"
    )
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="prompts, one in each line, UTF-8")
    parser.add_argument("--max-tokens", type=positive, default=200, metavar="N", help="most new tokens; default: 200")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token always")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="below 1: likelier tokens more often; default: 1"
    )
    parser.add_argument("--top-k", type=positive, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="choose among the likeliest tokens of probability P together"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="choose among tokens of at least P times the likeliest one's probability",
    )
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="another seed gives another text; default: 0"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end where this would come; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print JSON at the end instead of text as it comes")


def run(args: argparse.Namespace) -> int:
    """Generate, and print each prompt with what the model wrote behind it."""
    from better_attention.lab.generation.writer import write

    prompts = prompts_of(args)
    settings = settings_of(args)
    model, tokeniser = language_model(args.path)
    began = time.perf_counter()
    if len(prompts) == 1 and not args.json:
        with _Live(prompts[0]) as live:
            written = write(model, tokeniser, prompts, settings, live.show)
    else:
        written = write(model, tokeniser, prompts, settings)
        print_all(written, as_json=args.json)
    seconds = time.perf_counter() - began
    if not args.json:
        tokens = sum(one.tokens for one in written)
        say(f"{plural(tokens, 'token')}, {tokens / seconds:,.0f} a second; {_endings(written)}")
    return 0


class _Live:
    """One text on the screen, as it is written: the prompt once it is accepted, then the pieces, then a line end."""

    def __init__(self, prompt: str) -> None:
        self.prompt, self.begun = prompt, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.show(0, "")  # a text may be empty
        if self.begun:
            print()  # also where Ctrl-C ended the text, so that the shell begins in a line of its own

    def show(self, number: int, piece: str) -> None:
        """Print the next piece."""
        print(piece if self.begun else self.prompt + piece, end="", flush=True)
        self.begun = True


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        UserError: there is none, or the file has an empty line or is not UTF-8.
    """
    prompts: list[str] = [*args.prompt]
    if args.prompt_file is not None:
        prompts += _lines(args.prompt_file)
    if not prompts:
        raise UserError("nothing to continue: give a --prompt, or a --prompt-file with one in each line.")
    if "" in args.prompt:
        raise UserError("--prompt '' is empty: there is nothing to continue. Write at least one character.")
    return prompts


def _lines(path: Path) -> list[str]:
    from better_attention.lab.files import read_regular

    try:
        text = read_regular(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"--prompt-file {path} does not exist: name a text file with one prompt in each line."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path} is not UTF-8 text ({error}). Convert it first.") from None
    if not text.strip("\r\n"):
        raise UserError(f"--prompt-file {path} holds no prompt: write one in each line.")
    # splitlines() would also cut at other separators, such as U+2028, within a prompt.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    empty = [number for number, line in enumerate(lines, start=1) if not line]
    if empty:
        raise UserError(f"--prompt-file {path}: line {empty[0]} is empty, and nothing can be continued. Remove it.")
    return lines


def settings_of(args: argparse.Namespace) -> Settings:
    """How the text is to be continued.

    Raises:
        UserError: greedy decoding with options that it does not heed, or a number out of range.
        ValueError: an empty stop string.
    """
    from better_attention.lab.generation.sampling import Sampling
    from better_attention.lab.generation.writer import Settings

    given = {name: value for name in RESTRICTIONS if (value := getattr(args, name)) is not None}
    greedy, unheeded = ("--greedy", {*given}) if args.greedy else ("--temperature 0", {*given} - {"temperature"})
    if (args.greedy or args.temperature == 0) and unheeded:
        options = ", ".join(_option(name) for name in RESTRICTIONS if name in unheeded)
        raise UserError(f"{greedy} takes the likeliest token always, whatever {options} says: leave out one of them.")
    try:
        sampling = Sampling(temperature=0.0) if args.greedy else Sampling(**given)
    except ValueError as error:
        # It names arguments, "top_k=1", where the command has options, "--top-k 1".
        argument = re.compile(rf"\b({'|'.join(RESTRICTIONS)})(=?)")
        named = argument.sub(lambda found: _option(found[1]) + (" " if found[2] else ""), str(error))
        raise UserError(named) from None
    return Settings(sampling, max_tokens=args.max_tokens, stop=tuple(args.stop), seed=args.seed)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def language_model(path: Path) -> tuple[LanguageModel, Tokeniser]:
    """The language model in a folder, and the tokeniser that it was trained with.

    Raises:
        UserError: it holds another kind of model.
        FileNotFoundError, ValueError: see :func:`better_attention.lab.trained.model.open_trained`.
    """
    from better_attention.lab.data.tokenisers import tokeniser_of
    from better_attention.lab.models.language_model import LanguageModel
    from better_attention.lab.trained.model import open_trained
    from better_attention.lab.trained.origin import RunOrigin

    trained = open_trained(path)
    if not isinstance(trained.model, LanguageModel) or not isinstance(trained.origin, RunOrigin):
        task = (
            f"is a run of task {trained.origin.task.name!r}"
            if isinstance(trained.origin, RunOrigin)
            else "holds a model"
        )
        raise UserError(
            f"{path} {task}, which writes no text: name a run of text-lm (`better-attention runs` lists runs)."
        )
    return trained.model, tokeniser_of(trained.origin.assets)


def print_all(written: Sequence[Written], *, as_json: bool) -> None:
    """Print several texts, each below its number; or all of them as JSON."""
    if as_json:
        print(json.dumps([asdict(one) for one in written], indent=2, ensure_ascii=False))
        return
    for number, one in enumerate(written, start=1):
        print(f"[{number}]\n{one.prompt}{one.text}\n")


def _endings(written: Sequence[Written]) -> str:
    """Why the texts end, in words."""
    words = {
        "stop": "ended by a stop string",
        "max_tokens": "as many as --max-tokens allows",
        "length": "the model reads no more",
    }
    counts = {reason: sum(one.ended == reason for one in written) for reason in words}
    several = len(written) > 1
    return ", ".join(f"{words[reason]}{f' ({n})' if several else ''}" for reason, n in counts.items() if n)
