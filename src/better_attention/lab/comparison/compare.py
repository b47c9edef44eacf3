"""A comparison: every mechanism, head count and seed of a task, trained alike, and what they amount to."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from better_attention.errors import counted
from better_attention.lab.analysis import learning_speed
from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap, Study, run_of
from better_attention.lab.comparison.notes import guessing, remarks
from better_attention.lab.comparison.run_pictures import draw_kernels, draw_maps
from better_attention.lab.lock import TURN, holder, locked, taken
from better_attention.lab.report import html, tables
from better_attention.lab.runs import manifest
from better_attention.lab.runs.folder import (
    check_agreement,
    check_sizes,
    describe_run,
    divergence,
    list_runs,
    load_run,
    open_run,
    read_curve,
    run_name,
)
from better_attention.lab.runs.overwrite_guard import check_output
from better_attention.lab.runs.provenance import commit
from better_attention.lab.runs.states import left_behind, look_at
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.events import Watcher
from better_attention.lab.training.interruption import Stop
from better_attention.lab.training.loop import Training
from better_attention.lab.training.processes import at_most, make_accelerator, watching_peers
from better_attention.lab.training.progress import DivergedError, Interrupted
from better_attention.lab.training.step_time import Pace, measure

RESULTS = ("results.json", "results.csv", "curves.csv", "report.html")
OPTIMISED = 3  # copies of the parameters in training, at least: weights, gradients and a moment


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        task: the task, its settings resolved.
        variants, heads, seeds: a run is trained for each combination; ``seeds`` counts from 0.
        out: folder of the comparison, a folder a run below it.
        data: the user's data folder; None: the library's own.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.
        command: the command line, for the record.
        threshold: validation accuracy in per cent, the epochs to which are counted; None: by the rule of
            :func:`better_attention.lab.analysis.learning_speed.find_threshold`.
    """

    task: Task
    variants: Sequence[Variant]
    heads: Sequence[int]
    seeds: int
    out: Path
    data: Path | None = None
    device: str = "auto"
    command: str = ""
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            learning_speed.check_threshold(self.threshold)

    def runs(self) -> list[tuple[Variant, int, int]]:
        """Variant, heads and seed of every run, seeds outermost: what is interrupted is balanced."""
        return [(v, h, s) for s in range(self.seeds) for h in self.heads for v in self.variants]


def compare(plan: Plan, watcher: Watcher) -> tuple[Study, list[str]]:
    """Train what is not yet trained, then write ``results.csv``, ``results.json`` and ``report.html``.

    All runs share the data, the order of the samples (by seed), and the initial weights that mechanisms
    have in common. Finished runs are kept, an interrupted one continues; the results cover every finished
    run in ``plan.out``. A run that fails is left out, the others go on.

    Returns:
        The study that was written, and the names of the runs that failed.

    Raises:
        ValueError: settings that do not fit, data that is missing, a folder that holds another comparison.
        Interrupted: a signal arrived; everything is saved.
        PeerLostError: another process of the launch has ended.
    """
    check_output(plan.out, (*RESULTS, manifest.NAME), is_results, known=bool(list_runs(plan.out)))
    if (plan.out / "ladder.json").is_file():
        raise ValueError(f"{plan.out} holds a ladder: choose another --out.")
    accelerator = make_accelerator(plan.device)
    with watching_peers(accelerator.num_processes, plan.command):
        return train_all(plan, accelerator, watcher)


def train_all(plan: Plan, accelerator: Accelerator, watcher: Watcher) -> tuple[Study, list[str]]:
    """What :func:`compare` does once the processes of the launch have met."""
    check_apart(plan)
    plan = replace(plan, task=plan.task.fitted(plan.data))
    check_sizes(plan.task.settings())
    check_models(plan, accelerator)
    same = describe_run(plan.task, plan.variants[0], plan.heads[0], 0, "", accelerator.device.type)
    check_agreement(plan.out, {key: value for key, value in same.items() if key != "data_sha256"})
    check_finished(plan)
    if accelerator.is_main_process:  # it may hold a run already when the others come here
        check_free(plan)
    splits = plan.task.load(plan.data)
    notes = (*splits.notes, *guessing(splits), *remarks(plan.task, plan.variants, plan.heads, splits.sizes))
    splits = replace(splits, notes=notes).to(accelerator.device)
    watcher.data(splits, accelerator)
    check_agreement(plan.out, same | {"data_sha256": splits.digest})
    failed: list[str] = []
    stop = Stop(watcher)
    with at_most(plan.task.threads):  # nothing is to be saved yet: a signal ends it at once
        paces = measure_paces(plan, splits, accelerator, watcher)
    with at_most(plan.task.threads), stop.listening():
        for number, (variant, heads, seed) in enumerate(plan.runs(), start=1):
            name = run_name(variant, heads, seed)
            with locked(plan.out / name) if accelerator.is_main_process else nullcontext():
                if accelerator.is_main_process:
                    device = accelerator.device.type
                    claim(plan, name, describe_run(plan.task, variant, heads, seed, splits.digest, device))
                watcher.begin(name, number, len(plan.runs()))
                training = Training(
                    *(plan.task, splits, variant, heads, seed, plan.out / name, accelerator),
                    command=plan.command,
                    pace=paces.get((variant, heads)),
                    progress=watcher.progress,
                    stop=stop,
                )
                try:
                    watcher.end(name, training.run())
                except DivergedError as error:
                    failed.append(name)
                    watcher.failed(name, error)
                except Interrupted as error:
                    error.signal = stop.signal or error.signal
                    raise
                finally:
                    accelerator.free_memory()  # it holds on to every model it has prepared
    # One at a time, so that what is written last has seen every run: another command may work in this folder, too.
    with locked(plan.out, TURN) if accelerator.is_main_process else nullcontext():
        study = make_study(plan, splits)
        if accelerator.is_main_process and study.finished:
            write_results(study, plan.out)
    accelerator.wait_for_everyone()
    return study, failed


def is_results(found: object) -> bool:
    """Whether the value in a JSON file is a ``results.json``."""
    return (
        isinstance(found, list) and bool(found) and all(isinstance(run, dict) and "mechanism" in run for run in found)
    )


def check_apart(plan: Plan) -> None:
    """Refuse results within a folder that is read as a whole: the next call would take them for data.

    Raises:
        ValueError: they would be.
    """
    if plan.data is None or not plan.task.own_data or not plan.data.is_dir():
        return
    if plan.out.resolve().is_relative_to(plan.data.resolve()):
        raise ValueError(
            f"--out {plan.out} lies in --data {plan.data}, and what is written there would be read as data. Choose "
            "another --out."
        )


def claim(plan: Plan, name: str, run: Mapping[str, Any]) -> None:
    """Make the folder ``name`` of ``run``, a :func:`describe_run`, if the others in ``plan.out`` still agree with it.

    Another command may have begun there since :func:`check_agreement` looked: whoever comes first sets the settings.

    Raises:
        ValueError: one has, with others.
    """
    with locked(plan.out, TURN):
        check_agreement(plan.out, run)
        open_run(plan.out / name, run, plan.command)


def check_finished(plan: Plan) -> None:
    """Refuse a folder with a finished run that cannot be used: no report could be made of it after all the training.

    The runs are of the plan's task and settings: :func:`check_agreement` has seen to that.

    Raises:
        ValueError: names the run, and what is wrong with it: damaged, or a model that is built otherwise now.
    """
    again = "Delete that folder and run again, it is trained anew."
    for planned in plan.runs():
        folder = plan.out / run_name(*planned)
        if files := left_behind(folder):
            raise ValueError(
                f"{folder} holds {', '.join(files)}, but no config.json: a run that is damaged, or files of somebody "
                "else's. Move them away, or choose another --out."
            )
    for run in list_runs(plan.out):
        if run["result"] is None:
            continue
        found = look_at(run["path"])
        if found.state == "damaged":
            raise ValueError(f"{run['path']}: {found.detail.rstrip('.')}. {again}")
        size = plan.task.size(found.run["mechanism"], found.run["heads"])
        if size != run["result"].get("total_params", size):
            raise ValueError(
                f"{run['path']} is a model of {run['result']['total_params']:,} parameters; this version of "
                f"better-attention builds it with {size:,}. {again}"
            )


def check_free(plan: Plan) -> None:
    """Refuse runs that another process writes at this moment, before data is read and paces are measured.

    Raises:
        ValueError: names the run and the process.
    """
    for planned in plan.runs():
        folder = plan.out / run_name(*planned)
        if writer := holder(folder):
            raise ValueError(taken(folder, writer))


def check_models(plan: Plan, accelerator: Accelerator) -> None:
    """Build every model once without memory, so that what cannot be built is refused before hours of training.

    Raises:
        ValueError: heads that do not divide the width, for example, or more parameters than the memory can train.
    """
    memory = physical_memory() if accelerator.device.type == "cpu" else math.inf
    for variant in plan.variants:
        for heads in plan.heads:
            run_name(variant, heads, 0)
            width = plan.task.sized(variant, heads).width
            if width % heads:
                raise ValueError(f"--heads {heads} does not divide the width of task {plan.task.name!r}, {width}.")
            with torch.device("meta"):
                size = sum(parameter.nbytes for parameter in plan.task.build(variant, heads).parameters())
            if OPTIMISED * size > memory:
                raise ValueError(
                    f"{variant.name} with {counted(heads, 'head')} has {size / 2**30:,.0f} GiB of parameters; to train "
                    f"it takes {OPTIMISED} times that, and this machine has {memory / 2**30:,.0f} GiB of memory."
                )


def physical_memory() -> float:
    """Bytes of this machine's memory; infinite where it does not say."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        return float(pages * os.sysconf("SC_PAGE_SIZE")) if pages > 0 else math.inf
    except (AttributeError, OSError, ValueError):
        return math.inf


def measure_paces(
    plan: Plan, splits: Splits, accelerator: Accelerator, watcher: Watcher
) -> dict[tuple[Variant, int], Pace]:
    """The speed of every model that is still to be trained; the watcher hears how long all of it will take."""
    waiting = [run for run in plan.runs() if not (plan.out / run_name(*run) / "result.json").is_file()]
    paces: dict[tuple[Variant, int], Pace] = {}
    for variant, heads, _ in waiting:
        if (variant, heads) not in paces:
            paces[variant, heads] = measure(plan.task, splits, variant, heads, accelerator.device)
    if waiting:
        shares = [math.ceil(size / accelerator.num_processes) for size in splits.sizes.values()]
        seconds = sum(paces[v, h].run_seconds(plan.task, *shares) for v, h, _ in waiting)
        watcher.estimate(seconds, len(waiting))
    return paces


def make_study(plan: Plan, splits: Splits) -> Study:
    """What the finished runs in ``plan.out`` amount to, and which diverged."""
    runs = list_runs(plan.out)
    finished = sorted(
        (run for run in runs if run["result"]),
        key=lambda run: (run["result"]["seed"], run["result"]["heads"], _rank(plan, run["result"]["mechanism"])),
    )
    lost = [record for run in runs if run["result"] is None and (record := diverged_record(run, splits)) is not None]
    curves = {}
    maps: list[AttentionMap] = []
    alignments: list[AlignmentPicture] = []
    for entry in finished:
        record = entry["result"]
        name = run_of(record)
        curves[name] = read_curve(entry["path"])
        if (
            record["seed"] == 0
            and record["heads"] == plan.heads[-1]
            and (entry["path"] / "model.safetensors").is_file()
        ):
            run = load_run(entry["path"])
            maps += draw_maps(name, run.model, run.task, splits)
            alignments += draw_kernels(name, run)
    guessing = learning_speed.guessing_accuracy(splits.validation.targets)
    threshold = learning_speed.find_threshold(curves, guessing, plan.threshold)
    notes = [
        *splits.notes,
        *(
            f"{run['name']} has lost its weights (model.safetensors): no maps of it are shown"
            for run in finished
            if not (run["path"] / "model.safetensors").is_file()
        ),
        *(f"a run diverged, and nothing is claimed of its mechanism: {record['diverged']}" for record in lost),
    ]
    return Study(
        task={
            "name": plan.task.name,
            "title": plan.task.title,
            "source": plan.task.source,
            "settings": plan.task.settings(),
        },
        records=learning_speed.timed([*(run["result"] for run in finished), *lost], curves, threshold),
        curves=curves,
        maps=maps,
        alignments=alignments,
        command=plan.command,
        commit=commit(),
        notes=notes,
        threshold=threshold,
        folders={run_of(run["result"]): run["name"] for run in finished},
    )


def diverged_record(run: Mapping[str, Any], splits: Splits) -> dict[str, Any] | None:
    """What ``results.json`` says of a run that was given up, from an entry of :func:`list_runs`; None if it was not.

    It has no numbers, but it counts: the runs that got through say nothing of the mechanism as a whole.
    """
    reason = divergence(run["path"])
    if not reason:
        return None
    what, where = run["config"]["run"], run["config"].get("environment", {})
    return {
        "task": what["task"],
        "scale": what["settings"]["scale"],
        "mechanism": what["mechanism"],
        "score": Variant.of(what["mechanism"]).mechanism.score,
        **{key: what[key] for key in ("heads", "seed", "settings", "device")},
        **{key: where.get(key) for key in ("threads", "commit", "command", "versions")},
        "samples": splits.sizes,
        "diverged": reason,
    }


def _rank(plan: Plan, mechanism: str) -> tuple[int, str]:
    names = [variant.name for variant in plan.variants]
    return (names.index(mechanism) if mechanism in names else len(names), mechanism)


def write_results(study: Study, out: Path) -> None:
    """``results.csv``, ``results.json``, ``curves.csv`` and ``report.html`` in ``out``, and their digests."""
    manifest.remove(out, RESULTS)  # it would be wrong until all of them are written
    tables.write_csv(tables.summarise(study.records), out / "results.csv", study.threshold)
    tables.write_json(study.records, out / "results.json")
    tables.write_curves(study.curves, out / "curves.csv")
    html.write_report(study, out / "report.html")
    manifest.add(out, RESULTS)
