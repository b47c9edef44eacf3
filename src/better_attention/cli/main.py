"""``better-attention VERB ...``: finds the verb, runs it, and turns errors into messages and exit statuses.

Exit status: 0 done; 1 a run failed, or the machine did (a full disk, for example); 2 an error that the user can correct
in the command; 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from better_attention import __version__, command
from better_attention.cli import screen
from better_attention.lab.training.launch import PeerLostError, first_to_say

VERBS = (
    *("compare", "ladder", "trial", "table", "runs", "data", "list", "show", "cost", "predict", "generate", "inspect"),
    *("convert", "distil", "export", "bench", "edge"),
)
EXTRAS = frozenset(
    {
        "accelerate",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "numpy",
        "PIL",
        "pooch",
        "rich",
        "safetensors",
        "scipy",
        "sklearn",
        "tokenizers",
    }
)


class Parser(argparse.ArgumentParser):
    """Accepts options before, between and after the arguments, and suggests the nearest name for an unknown one."""

    inside = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.color = False  # Python 3.14 would write its own escape sequences

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, then the usage, and end with exit status 2; of several processes, one prints."""
        if not first_to_say(message):
            self.exit(2)
        usage = f"usage: {self.prog} [options]; `{self.prog} --help` lists them."
        self.exit(2, f"{screen.message(f'{self.prog}: {message}')}\n{usage}\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """See :class:`argparse.ArgumentParser`; a verb knows all its arguments, so that its own usage is shown."""
        if self.inside or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self.inside = True  # parse_known_intermixed_args calls this method again
        try:
            known, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self.inside = False
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.75)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f' (did you mean {near[0]}?)' if near else ''}")
        return known, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, built from the verbs' own modules."""
    parser = Parser(
        prog="better-attention",
        description="Standard, optimised, efficient, super and expressive attention, compared on real data.",
        epilog="`better-attention compare` is a good first command: it needs no download.",
    )
    parser.add_argument("--version", action="version", version=f"better-attention {__version__}")
    parser.add_argument("--traceback", action="store_true", help="on an error, show where in the program it arose")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"better_attention.cli.{name}")
        # argparse fills in %(prog)s where it lists the verbs: a per cent sign is written twice there.
        verb = verbs.add_parser(name, help=module.HELP.replace("%", "%%"), description=module.HELP)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: the process's own); returns the exit status."""
    with screen.guarded(json="--json" in (sys.argv if arguments is None else arguments)):
        status = 1  # of a traceback
        try:
            status = _run(arguments)
        except KeyboardInterrupt:  # again, while what the first one interrupted was being told
            status = 130
        except SystemExit as end:  # the parser's
            status = end.code if isinstance(end.code, int) else 0
            raise
        finally:
            command.ending(status)
        return status


def _run(arguments: Sequence[str] | None) -> int:
    traceback = False
    try:
        command.loud()
        parser = build_parser()
        if not (sys.argv[1:] if arguments is None else arguments):
            parser.print_help(sys.stderr)
            parser.exit(2)
        options = parser.parse_args(arguments)
        traceback = options.traceback
        status: int = options.run(options)
        sys.stdout.flush()  # a reader that has ended (`| head`) is noticed here, not at exit
        return status
    except KeyboardInterrupt:
        return _say("interrupted.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        return 0
    except Exception as error:
        explained = None if traceback else explain(error)
        if explained is None:
            raise
        return _say(*explained)


def explain(error: Exception) -> tuple[str, int] | None:
    """The message and exit status for an error that needs no traceback; None for a bug."""
    match error:
        # Before ImportError, of which it is a kind.
        case ModuleNotFoundError():
            package = (error.name or "").partition(".")[0]
            missing = f'this needs the package {package!r}: pip install "better-attention[all]"'
            # A package that we always need is a bug of the installation if it is missing, so its traceback is shown.
            return (missing, 2) if package in EXTRAS else None
        case ImportError(name=None):  # ours, which says what to install; Python's own has the name of a module
            return str(error), 2
        # The user can correct these; other errors of the system, a full disk for example, are the machine's.
        case FileNotFoundError() | NotADirectoryError() | IsADirectoryError() | PermissionError() | FileExistsError():
            return str(error), 2
        case OSError():
            return str(error), 1
        case ValueError() | TypeError():
            return str(error), 2
        case PeerLostError():
            return str(error), 1
    return None


def _say(text: str, status: int) -> int:
    if first_to_say(text):
        print(screen.message(f"better-attention: {text}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
