"""``better-attention trial``: expressive attention's claim per kind of positions, on a grid fixed beforehand."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import folder, positive, words
from better_attention.cli.screen import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from better_attention.lab.trial.stages import Row

HELP = "expressive against softmax attention per kind of positions, in cells of seconds; the same command continues"
STAGES = ("tune", "main", "group", "long", "multi")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--scale", choices=("smoke", "small"), default="small", help="the grid: seconds, or many hours (default)"
    )
    parser.add_argument("--stages", type=words, default=STAGES, metavar="A,B", help=f"default: {','.join(STAGES)}")
    parser.add_argument("--sizes", type=words, default=(), metavar="A,B", help="of the grid, these alone; default: all")
    parser.add_argument(
        "--part", type=share, default=(1, 1), metavar="K/N", help="the K-th of N shares, for N processes side by side"
    )
    parser.add_argument("--minutes", type=positive, metavar="N", help="begin no cell after N minutes")
    parser.add_argument("--report", action="store_true", help="train nothing, write the tables of what is there")
    parser.add_argument(
        "--draw",
        type=place,
        metavar="SIZE,NxT",
        help="also draw the weights over distance of all contestants at a size and rung, trained again: d16,4x8",
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder of the cells; default: runs/trial-SCALE")


def share(text: str) -> tuple[int, int]:
    """K and N from ``K/N``."""
    own, sign, of = text.partition("/")
    if not sign or positive(own) > positive(of):
        raise argparse.ArgumentTypeError(f"expected K/N with K <= N, such as 1/2, received {text!r}")
    return positive(own), positive(of)


def place(text: str) -> tuple[str, tuple[int, int]]:
    """Size and rung from ``SIZE,NxT``."""
    size, comma, rung = text.partition(",")
    modulus, sign, delay = rung.partition("x")
    if not comma or not sign:
        raise argparse.ArgumentTypeError(f"expected a size and N x τ, such as d16,4x8, received {text!r}")
    return size, (positive(modulus), positive(delay))


def run(args: argparse.Namespace) -> int:
    """Train what waits, then write the tables; 0, or 130 after Ctrl-C.

    Raises:
        UserError: a stage or size of another name; nothing to show.
    """
    from better_attention.lab.training.interruption import Stop
    from better_attention.lab.trial.grid import SCALES, Trial
    from better_attention.lab.trial.run import read
    from better_attention.lab.trial.run import run as run_cells

    if unknown := [name for name in args.stages if name not in STAGES]:
        raise UserError(f"--stages {unknown[0]}: the stages are {', '.join(STAGES)}.")
    trial, out, screen = Trial(**SCALES[args.scale]), args.out or Path("runs") / f"trial-{args.scale}", console()
    if missing := [name for name in args.sizes if name not in trial.sizes]:
        raise UserError(f"--sizes {missing[0]}: the sizes are {', '.join(trial.sizes)}.")
    stop = Stop()
    if not args.report:
        seconds = 60.0 * (args.minutes or math.inf)
        train = partial(run_cells, sizes=args.sizes, part=args.part, seconds=seconds, stop=stop)
        with stop.listening():
            for row in train(trial, out, args.stages):
                screen.print(message(line(row)), markup=False, soft_wrap=True)
    rows = read(out)
    if not rows:
        raise UserError(f"{out} holds no finished cell yet.")
    from better_attention.lab.trial.report import write

    for path in [*write(trial, rows, out), *([] if args.draw is None else [draw(args, rows, out)])]:
        screen.print(message(str(path)), markup=False, soft_wrap=True)
    return 128 + stop.signal if stop.signal else 0


def draw(args: argparse.Namespace, rows: Sequence[Row], out: Path) -> Path:
    """Write the picture of the first seed at ``--draw``.

    Raises:
        UserError: no cell of ``main`` or ``long`` there.
    """
    from better_attention.lab.files import write_atomic
    from better_attention.lab.trial.distances import drawing
    from better_attention.lab.trial.findings import final
    from better_attention.lab.trial.grid import CONTESTANTS, SCALES, Trial

    size, rung = args.draw
    there = [row for row in final(rows, ("main", "long")) if (row.cell.size, row.cell.rung) == (size, rung)]
    shown = sorted(
        (row for row in there if row.cell.seed == 0),
        key=lambda row: CONTESTANTS.index((row.cell.mechanism, row.cell.positions)),
    )
    if not shown:
        raise UserError(f"--draw {size},{rung[0]}x{rung[1]}: no such cell of the stages main and long is finished.")
    path = out / f"distances-{size.replace(' ', '-')}-{rung[0]}x{rung[1]}.svg"
    write_atomic(path, drawing(Trial(**SCALES[args.scale]), shown))
    return path


def line(row: Row) -> str:
    """A finished cell in one line."""
    c, found = row.cell, row.outcome
    accuracy = "diverged" if found.test_accuracy is None else f"{found.test_accuracy:.1f} %"
    where = f"{c.stage} N {c.modulus} τ {c.delay} {c.size}, {c.positions}, {c.scaling}, {c.optimiser}, seed {c.seed}"
    return f"{where}: {c.mechanism} {accuracy} after {found.updates:,} updates, {found.seconds:.1f} s"
