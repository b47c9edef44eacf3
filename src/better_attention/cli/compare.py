"""``better-attention compare``: train the mechanisms side by side, and print the paper's kind of table."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from better_attention.cli import UserError, console
from better_attention.cli.arguments import command_line, folder, names, numbers, option, positive, whole, words
from better_attention.cli.screen import message
from better_attention.cli.settings import settings_of
from better_attention.lab.tasks.base import SCALES
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import MECHANISMS

if TYPE_CHECKING:
    from better_attention.lab.comparison.compare import Engine
    from better_attention.lab.comparison.plan import Plan

HELP = "train the mechanisms side by side on real data: table, results.csv, results.json, report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "task", nargs="?", default="digits", metavar="TASK", help=f"one of {', '.join(TASKS)}; default: digits"
    )
    parser.add_argument(
        "--mechanisms",
        type=names,
        default=tuple(MECHANISMS),
        metavar="A,B,...",
        help=f"default: {','.join(MECHANISMS)}; each may be followed by +expressive or +align, and one with W_A by "
        "+per-head (a kernel each) or +identity (where it starts)",
    )
    parser.add_argument("--heads", type=numbers, metavar="1,2,4", help="attention heads; default: the task's")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="runs of each row, seeds 0 ... N-1; default: the task's"
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="small",
        help="seconds, minutes (default), the paper's setting",
    )
    parser.add_argument("--epochs", type=positive, metavar="N", help="most epochs of a run")
    parser.add_argument(
        "--patience", type=whole, metavar="N", help="stop after N epochs without a better validation loss; 0: never"
    )
    parser.add_argument(
        "--equal-params",
        action="store_true",
        help="widen each mechanism until its model has about as many parameters as the standard one (table 7)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of the task, such as layers=4; repeatable; the report lists them all",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="samples of one update")
    parser.add_argument("--lr", type=float, metavar="X", help="learning rate")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder or file with the data, or with pictures or texts of your own; default: where `data fetch` puts it",
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder for the runs; default: runs/TASK-SCALE")
    parser.add_argument(
        "--shard",
        choices=("fsdp",),
        default="",
        help="spread each model over the processes of torchrun, with FSDP2; default: each process has all of it",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="one run after the other here (default), or all of them as tasks of Ray, many at once",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of --engine ray: a cluster that this machine is part of; default: this machine alone",
    )
    parser.add_argument(
        "--cpus-per-run", type=positive, metavar="N", help="of --engine ray: CPUs and threads of a run; default: 1"
    )
    parser.add_argument(
        "--gpus-per-run", type=whole, metavar="N", help="of --engine ray: GPUs of a run, at most 1; default: 0"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="PERCENT",
        help="count the epochs until the validation accuracy reaches this; default: what the task has, or 90 %% of the "
        "way from guessing to what standard achieves",
    )
    parser.add_argument(
        "--json", action="store_true", help="print results.json at the end; progress goes to standard error"
    )
    parser.add_argument(
        "--track",
        type=words,
        default=(),
        metavar="A,B",
        help="also log learning curves to tensorboard and/or wandb (offline unless WANDB_MODE says otherwise), below "
        "OUT/trackers; default: to neither",
    )


def run(args: argparse.Namespace) -> int:
    """Compare, and print the table."""
    from better_attention.cli.progress import make_progress
    from better_attention.lab.comparison.compare import compare
    from better_attention.lab.comparison.trackers import Tracking
    from better_attention.lab.report import tables
    from better_attention.lab.training.events import to_all
    from better_attention.lab.training.launch import is_first
    from better_attention.lab.training.progress import Interrupted

    plan, engine = make_plan(args), make_engine(args)
    screen = console(stderr=args.json)  # standard output is for the JSON alone
    try:
        with make_progress(screen, plan) as progress, Tracking(plan, args.track, progress.say, first=is_first()) as log:
            study, failed = compare(plan, to_all(progress, log), engine=engine)
    except Interrupted as stopped:
        text = f"Interrupted. {stopped} The same command continues there:\n  {plan.command}"
        screen.print(message(text), markup=False, soft_wrap=True)
        # The status by which shells report a process that a signal has ended.
        return 128 + stopped.signal
    if study.finished:
        tables.print_table(tables.summarise(study.records), screen, study.threshold)
        for name in ("report.html", "results.csv", "results.json", "curves.csv"):
            screen.print(message(f"{plan.out / name}"), markup=False, soft_wrap=True)
    if args.json and is_first():
        print((plan.out / "results.json").read_text("utf-8") if study.finished else "[]")
    return 1 if failed else 0


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that the arguments describe.

    Raises:
        UserError, ValueError: an unknown task, or a setting out of range.
    """
    from better_attention.lab.comparison.plan import Plan

    if args.task not in TASKS:
        raise UserError(f"unknown task {args.task!r}: choose one of {', '.join(TASKS)}.")
    task = TASKS[args.task](args.scale)
    given = {name: getattr(args, name) for name in ("epochs", "patience", "batch_size", "lr")}
    settings = {name: value for name, value in given.items() if value is not None}
    named = settings_of(task, args.set)
    for name in sorted(named.keys() & settings.keys()):
        raise UserError(f"{name} is given twice: by --set and by --{name.replace('_', '-')}.")
    if args.data is not None and not task.reads_files:
        raise UserError(f"--data: task {task.name!r} uses built-in data; remove --data.")
    task = replace(task, **(named | settings), equal_params=args.equal_params)
    return Plan(
        task=task,
        variants=[Variant.of(name) for name in args.mechanisms],
        heads=args.heads or (task.default_heads,),
        seeds=args.seeds or task.seeds,
        out=args.out or Path("runs") / f"{task.name}-{task.scale}",
        data=args.data,
        device=args.device,
        command=command_line(),
        threshold=args.threshold,
        shard=args.shard,
    )


def make_engine(args: argparse.Namespace) -> Engine | None:
    """What trains the runs; None: this process.

    Raises:
        UserError, ValueError: options that do not fit together.
    """
    given = {name: getattr(args, name) for name in ("address", "cpus_per_run", "gpus_per_run")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.engine == "local":
        for name in given:
            raise UserError(f"{option(name)} has a meaning for --engine ray alone: add that, or omit it.")
        return None
    from better_attention.lab.comparison.cluster import Cluster, imported

    if args.shard:
        raise UserError(
            "--shard spreads a model over processes of torchrun, --engine ray trains whole models: choose one."
        )
    cluster = Cluster(**given)
    if cluster.gpus_per_run > 1:
        raise UserError("--gpus-per-run: a run uses one GPU; several are used by several runs at once.")
    if args.device not in ("auto", cluster.device):
        raise UserError(
            f"--device {args.device}: with --engine ray, --gpus-per-run decides that runs are trained on "
            f"{cluster.device!r}. Omit --device."
        )
    imported()  # what is missing is said before data are read
    from better_attention.lab.comparison.ray_engine import RayEngine

    return RayEngine(cluster)
