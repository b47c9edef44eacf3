"""``better-attention bench``: how fast, against whom, and how far from what the machine can do."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.bench.suites import SUITES
from better_attention.cli import UserError, console
from better_attention.cli.arguments import command_line, folder, positive, words
from better_attention.cli.measurements import differing, output, say_kept, terminable
from better_attention.cli.screen import say

if TYPE_CHECKING:
    from better_attention.bench.registry import Row
    from better_attention.bench.report import Report
    from better_attention.bench.runner import Settings

HELP = "measure speed and memory against PyTorch and others: tables, JSON, targets met and missed"
DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--suite",
        choices=(*SUITES, "all"),
        default="all",
        help="what is measured: the attention function (kernel), one query over a long cache (decode), W_A (align), "
        "whole layers or models; default: all",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of every tensor; default: float32")
    parser.add_argument(
        "--shapes",
        type=shapes,
        metavar="BxLxDxH,...",
        help="batch x length (decode: keys) x model width x heads, as in 64x32x32x4; default: the papers'",
    )
    parser.add_argument(
        "--variants",
        type=words,
        metavar="A,B,...",
        help="rows of these kinds only, as in plain,causal,padded,mask,dropout of the suite kernel",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of everybody; default: as many as torch takes")
    parser.add_argument("--repeats", type=positive, metavar="N", help="most rounds of a row; default: 15, quick: 5")
    parser.add_argument(
        "--seconds", type=seconds, metavar="S", help="no new round of a row after S seconds; default: 10, quick: 2"
    )
    parser.add_argument(
        "--limit", type=seconds, default=120.0, metavar="S", help="for a contender to be ready; default: 120 seconds"
    )
    parser.add_argument("--flex", action="store_true", help="FlexAttention too: it compiles for seconds in each row")
    parser.add_argument(
        "--compiled", action="store_true", help="steps under torch.compile too (suite generation): seconds in each row"
    )
    parser.add_argument("--quick", action="store_true", help="one shape of each suite, few rounds, rougher limits")
    parser.add_argument("--targets", action="store_true", help="also print which of this project's targets are met")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="folder for the JSON and CSV files, which hold each row once it is measured: the same command continues "
        "where it stopped; default: runs/bench, or runs/bench-2 and so on where that holds rows of other settings",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure the rows again that the files hold, and replace them"
    )


def shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Shapes from a comma-separated list; each once."""
    shapes = []
    for word in text.split(","):
        sizes = tuple(int(part) if part.isdecimal() else 0 for part in word.strip().split("x"))
        if len(sizes) != 4 or min(sizes) < 1:
            raise argparse.ArgumentTypeError(
                f"expected batch x length x width x heads, as in 64x32x32x4, received {word!r}"
            )
        if sizes[2] % sizes[3]:
            raise argparse.ArgumentTypeError(f"the width must be divisible by the heads, received {word!r}")
        shapes.append(sizes)
    return tuple(dict.fromkeys(shapes))


def seconds(text: str) -> float:
    """A positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, received {text!r}")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0, 1 if a contender failed or its numbers were wrong, 130 (Ctrl-C), 143 (SIGTERM)."""
    from better_attention.bench.report import as_json
    from better_attention.bench.runner import Settings, threads
    from better_attention.bench.terminal import print_report

    rounds, budget = (5, 2.0) if args.quick else (15, 10.0)
    settings = Settings(
        repeats=args.repeats or rounds,
        seconds=args.seconds or budget,
        limit=args.limit,
        switches=frozenset(name for name in ("flex", "compiled") if getattr(args, name)),
    )
    with threads(args.threads), terminable() as received:
        report = measure(args, settings)
    if args.json:
        print(as_json(report))
    else:
        print_report(report, console(), targets=args.targets)
    if not report.complete:
        return 143 if signal.SIGTERM in received else 130
    return 1 if any(result.status in ("wrong", "failed") for result in report.results) else 0


def measure(args: argparse.Namespace, settings: Settings) -> Report:
    """Measure what was asked for, and is not in the files already."""
    from better_attention.bench import machine, report
    from better_attention.bench.session import Session
    from better_attention.lab.runs.overwrite_guard import check_writable

    rows = planned_rows(args)
    about = machine.describe(command_line())
    name = report.stem(about, args.suite, args.dtype) + ".json"

    def differences(out: Path) -> list[str]:
        check_writable(out)
        stored = report.read(out / name)
        return differing(stored["machine"], stored["settings"], about, report.settings_of(settings)) if stored else []

    out = output(args.out, Path("runs") / "bench", differences, again=args.again)
    session = Session(rows, settings, about, args.suite, args.dtype, out, args.quick)
    # With --again the folder may hold rows of other settings, which are replaced and not continued.
    stored = None if differences(out) else report.read(out / name)
    if stored:
        session.resume(stored, again=args.again)
    if session.results:
        say_kept(out / name, len(rows) - len(session.todo), len(rows))
    return session.run(say)


def planned_rows(args: argparse.Namespace) -> list[Row]:
    """The rows that the arguments ask for.

    Raises:
        UserError: an unknown variant, or no row at all.
    """
    import torch

    from better_attention.bench.registry import Shape

    dtype: torch.dtype = getattr(torch, args.dtype)
    suites = list(SUITES.values()) if args.suite == "all" else [SUITES[args.suite]]
    shapes = tuple(Shape(*sizes) for sizes in args.shapes or ())
    rows = [row for suite in suites for row in suite.rows(dtype, shapes or (suite.quick if args.quick else None))]
    known = tuple(dict.fromkeys(variant for suite in suites for variant in suite.variants))
    for name in args.variants or ():
        if name not in known:
            raise UserError(f"--variants: the suite {args.suite!r} has {', '.join(known)}, received {name!r}.")
    rows = [row for row in rows if row.variant in (args.variants or known)]
    if not rows:
        raise UserError(
            f"--suite {args.suite} has no rows in {args.dtype} of these --shapes and --variants. The models are "
            "measured in float32, those of pictures at lengths that are a square (cifar100: one more)."
        )
    return rows
