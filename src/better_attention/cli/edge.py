"""``better-attention edge``: table 4 of the paper on this CPU, in float32 and in int8."""

from __future__ import annotations

import argparse
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import folder, names, numbers, positive, words
from better_attention.cli.bench import say, terminable
from better_attention.cli.compare import command_line
from better_attention.mechanism import MECHANISMS

if TYPE_CHECKING:
    from better_attention.benchmarks.edge_view import Report
    from better_attention.experiments.task import Task

HELP = "seconds for 5,000 samples on this CPU, float32 and int8, beside the paper's table 4"
PRECISIONS = ("float32", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--tasks", metavar="A,B,...", help="default: those of mnist,cifar100,imagenet,imdb,amazon")
    parser.add_argument("--heads", type=numbers, default=(1, 4, 8), metavar="1,4,8", help="default: 1,4,8, the paper's")
    parser.add_argument(
        "--mechanisms",
        type=names,
        default=tuple(MECHANISMS),
        metavar="A,B,...",
        help=f"default: {','.join(MECHANISMS)}; ratios need standard among them",
    )
    parser.add_argument("--precisions", type=precisions, default=PRECISIONS, metavar="A,B", help="float32, int8")
    parser.add_argument("--samples", type=positive, default=5000, metavar="N", help="default: 5000")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="samples of one call; default: 32")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="passes of each model; default: 3")
    parser.add_argument(
        "--measured", type=positive, metavar="N", help="time N samples a pass and extrapolate, which the output says"
    )
    parser.add_argument(
        "--quick", action="store_true", help="passes of about a second, extrapolated, which the output says"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="default: as many as torch takes")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder for edge.csv, edge.json; default: runs/edge")


def precisions(text: str) -> tuple[str, ...]:
    """Precisions from a comma-separated list; each once."""
    found = words(text)
    wrong = [word for word in found if word not in PRECISIONS]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected float32, int8 or both, received {wrong[0]!r}")
    return found


def run(args: argparse.Namespace) -> int:
    """Time, print, write; 0, 130 after Ctrl-C, or 143 after SIGTERM."""
    from better_attention.benchmarks import edge_view
    from better_attention.benchmarks.runner import threads
    from better_attention.experiments.output import check_output

    out = args.out or Path("runs") / "edge"
    check_output(out, edge_view.FILES, edge_view.is_report)
    tasks = chosen(args.tasks)
    if not any(task.width % heads == 0 for task in tasks for heads in args.heads):
        widths = ", ".join(f"{task.name} {task.width}" for task in tasks)
        raise UserError(f"--heads: none of {', '.join(map(str, args.heads))} divides a model's width ({widths}).")
    with threads(args.threads), terminable() as received:
        report = measure(args, tasks, out)
    if args.json:
        document = {"machine": report.machine, "settings": asdict(report.settings), "complete": report.complete}
        print(json.dumps(document | {"rows": edge_view.beside_paper(report)}, indent=2, ensure_ascii=False))
    else:
        edge_view.print_report(report, console())
    for path in edge_view.write(report, out):
        say(f"wrote {path}")
    return 0 if report.complete else 143 if signal.SIGTERM in received else 130


def chosen(text: str | None) -> list[Task]:
    """The tasks that ``--tasks`` names, at the paper's scale; by default all of table 4 that there are.

    Raises:
        UserError: an unknown task, or one that table 4 does not have.
    """
    from better_attention.benchmarks.edge import available_tasks

    tasks = available_tasks()
    if text is None:
        return list(tasks.values())
    wanted = words(text)
    wrong = [name for name in wanted if name not in tasks]
    if wrong:
        raise UserError(f"--tasks: expected some of {', '.join(tasks)}, received {wrong[0]!r}.")
    return [tasks[name] for name in wanted]


def measure(args: argparse.Namespace, tasks: list[Task], out: Path) -> Report:
    """Every combination, or what is done by then, if Ctrl-C ends it."""
    from better_attention.benchmarks import edge, edge_view, machine
    from better_attention.benchmarks.edge import Timing

    settings = edge.Settings(args.samples, args.batch_size, args.rounds, args.measured, args.quick)
    about = machine.describe(command_line())
    timings: list[Timing] = []
    complete = True
    try:
        for found in edge.measure(tasks, args.mechanisms, args.heads, args.precisions, settings, say):
            timings += found
            # Whatever ends the run, even SIGKILL, the rows timed so far are kept.
            edge_view.write(edge_view.Report(about, settings, timings, complete=False), out)
    except KeyboardInterrupt:
        complete = False
        say("interrupted: what follows is what was done by then.")
    return edge_view.Report(about, settings, timings, complete)
