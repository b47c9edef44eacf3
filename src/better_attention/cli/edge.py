"""``better-attention edge``: table 4 of the paper on this CPU, in float32 and in int8; or trained models."""

from __future__ import annotations

import argparse
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import command_line, folder, names, numbers, positive, words
from better_attention.cli.measurements import differing, output, say_kept, terminable
from better_attention.cli.screen import say
from better_attention.mechanism import MECHANISMS

if TYPE_CHECKING:
    from better_attention.bench.edge.view import Report
    from better_attention.lab.tasks.base import Task

HELP = "seconds for 5,000 samples on this CPU beside the paper's table 4; or trained models and .onnx files timed"
PRECISIONS = ("float32", "int8")
RUNTIMES = ("eager", "compiled", "onnx", "onnx-int8")
HEADS = (1, 4, 8)
SAMPLES = 5000
TABLE_4 = {
    **{"tasks": None, "heads": HEADS, "mechanisms": tuple(MECHANISMS), "precisions": PRECISIONS},
    **{"samples": SAMPLES, "measured": None, "again": False},
}
"""Options that have a meaning for table 4 alone -> their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--models",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="instead of table 4: finished runs, converted models, .onnx files, or folders of them, against each "
        "other; time of a call, memory, size",
    )
    parser.add_argument(
        "--runtimes",
        type=runtimes,
        default=RUNTIMES,
        metavar="A,B,...",
        help=f"of --models; default: {','.join(RUNTIMES)}",
    )
    parser.add_argument("--tasks", metavar="A,B,...", help="default: those of mnist,cifar100,imagenet,imdb,amazon")
    parser.add_argument("--heads", type=numbers, default=HEADS, metavar="1,4,8", help="default: 1,4,8, the paper's")
    parser.add_argument(
        "--mechanisms",
        type=names,
        default=tuple(MECHANISMS),
        metavar="A,B,...",
        help=f"default: {','.join(MECHANISMS)}; ratios need standard among them",
    )
    parser.add_argument("--precisions", type=precisions, default=PRECISIONS, metavar="A,B", help="float32, int8")
    parser.add_argument("--samples", type=positive, default=SAMPLES, metavar="N", help="default: 5000")
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
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="folder for edge.csv and edge.json, which hold each row once it is timed: the same command continues "
        "where it stopped; default: runs/edge, or runs/edge-2 and so on where that holds rows of other settings",
    )
    parser.add_argument("--again", action="store_true", help="time the rows again that edge.json holds, replace them")


def precisions(text: str) -> tuple[str, ...]:
    """Precisions from a comma-separated list; each once."""
    names = words(text)
    wrong = [word for word in names if word not in PRECISIONS]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected float32, int8 or both, received {wrong[0]!r}")
    return names


def runtimes(text: str) -> tuple[str, ...]:
    """Runtimes from a comma-separated list; each once."""
    names = words(text)
    wrong = [word for word in names if word not in RUNTIMES]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(RUNTIMES)}, received {wrong[0]!r}")
    return names


def run(args: argparse.Namespace) -> int:
    """Time, print, write; 0, 130 after Ctrl-C, or 143 after SIGTERM."""
    own, other = (TABLE_4, "--models") if args.models else ({"runtimes": RUNTIMES}, "table 4")
    for name, default in own.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name} has no meaning for {other}: omit it.")
    return run_models(args) if args.models else run_table_4(args)


def run_models(args: argparse.Namespace) -> int:
    """Time trained models against each other."""
    from better_attention.bench import machine
    from better_attention.bench.edge import model_table, models
    from better_attention.bench.edge.contenders import contenders, models_in
    from better_attention.bench.runner import threads
    from better_attention.lab.runs.overwrite_guard import check_output

    out = args.out or Path("runs") / "edge-models"
    check_output(out, models.FILES, models.is_report)
    paths = models_in(args.models)
    settings = models.Settings(args.batch_size, args.rounds, 0.1 if args.quick else 0.5)
    with threads(args.threads), terminable() as received:
        about = machine.describe(command_line())
        with contenders(paths, args.runtimes, args.batch_size, say) as found:
            rows, complete = models.measure(found, settings, say)
    report = models.Report(about, settings, rows, complete)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        model_table.print_report(report, console())
    for path in models.write(report, out):
        say(f"wrote {path}")
    return 0 if complete else 143 if signal.SIGTERM in received else 130


def run_table_4(args: argparse.Namespace) -> int:
    """Time the paper's models beside its table."""
    from better_attention.bench.edge import view
    from better_attention.bench.runner import threads
    from better_attention.lab.runs.overwrite_guard import check_output

    if args.out is not None:
        check_output(args.out, view.FILES, view.is_report)
    tasks = chosen(args.tasks)
    if not any(task.width % heads == 0 for task in tasks for heads in args.heads):
        widths = ", ".join(f"{task.name} {task.width}" for task in tasks)
        raise UserError(f"--heads: none of {', '.join(map(str, args.heads))} divides a model's width ({widths}).")
    with threads(args.threads), terminable() as received:
        report = measure(args, tasks)
    if args.json:
        document = {"machine": report.machine, "settings": asdict(report.settings), "complete": report.complete}
        print(json.dumps(document | {"rows": view.beside_paper(report)}, indent=2, ensure_ascii=False))
    else:
        view.print_report(report, console())
    return 0 if report.complete else 143 if signal.SIGTERM in received else 130


def chosen(text: str | None) -> list[Task]:
    """The tasks that ``--tasks`` names, at the paper's scale; by default all of table 4 that there are.

    Raises:
        UserError: an unknown task, or one that table 4 does not have.
    """
    from better_attention.bench.edge.timing import available_tasks

    tasks = available_tasks()
    if text is None:
        return list(tasks.values())
    wanted = words(text)
    wrong = [name for name in wanted if name not in tasks]
    if wrong:
        raise UserError(f"--tasks: expected some of {', '.join(tasks)}, received {wrong[0]!r}.")
    return [tasks[name] for name in wanted]


def measure(args: argparse.Namespace, tasks: list[Task]) -> Report:
    """Every combination, or what is done by then, if Ctrl-C ends it. Rows already in the file are kept."""
    from better_attention.bench import machine
    from better_attention.bench.edge import timing, view
    from better_attention.bench.edge.timing import Timing
    from better_attention.lab.runs.overwrite_guard import check_output

    settings = timing.Settings(args.samples, args.batch_size, args.rounds, args.measured, args.quick)
    about = machine.describe(command_line())

    def stored(out: Path) -> Report | None:
        check_output(out, view.FILES, view.is_report)
        return view.read(out / "edge.json") if (out / "edge.json").exists() else None

    def differences(out: Path) -> list[str]:
        found = stored(out)
        return (
            differing(found.machine, asdict(found.settings), about, asdict(settings)) if found and found.timings else []
        )

    out = output(args.out, Path("runs") / "edge", differences, again=args.again)
    before = None if args.again and differences(out) else stored(out)
    planned = [(task.name, h, precision) for task in tasks for h in args.heads for precision in args.precisions]
    rows = {(*group, mechanism) for group in planned for mechanism in args.mechanisms}
    timings: dict[tuple[str, int, str], list[Timing]] = {}
    for kept_timing in before.timings if before else ():
        if not (args.again and (*kept_timing.group, kept_timing.mechanism) in rows):
            timings.setdefault(kept_timing.group, []).append(kept_timing)
    kept = [timing for found in timings.values() for timing in found]
    done = rows & {(*timing.group, timing.mechanism) for timing in kept}
    if before and kept:
        about = dict(before.machine) if done == rows else machine.resumed(before.machine, about)
        say_kept(out / "edge.json", len(done), len(rows))

    def report(*, complete: bool) -> Report:
        order = dict.fromkeys((*planned, *timings))
        return view.Report(about, settings, [t for group in order for t in timings.get(group, [])], complete)

    complete = True
    try:
        for found in timing.measure(tasks, args.mechanisms, args.heads, args.precisions, settings, say, kept):
            timings[found[0].group] = found
            view.write(report(complete=False), out)  # whatever ends the run, even SIGKILL, these rows are kept
    except KeyboardInterrupt:
        complete = False
        say("interrupted: the rows timed until then follow. The same command continues from there.")
    for path in view.write(report(complete=complete), out):
        say(f"wrote {path}")
    return report(complete=complete)
