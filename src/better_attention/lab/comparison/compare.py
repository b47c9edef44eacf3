"""A comparison: every mechanism, head count and seed of a task, trained alike, and what they amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from better_attention.lab.analysis.study import Study
from better_attention.lab.comparison.checks import (
    check_agreement,
    check_results_are_not_data,
    refuse,
    refuse_other_data,
)
from better_attention.lab.comparison.gather import RESULTS, gather, is_results, write
from better_attention.lab.comparison.notes import guessing, remarks
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.lock import RESULTS_LOCK_SECONDS, locked
from better_attention.lab.runs import checkpoint, manifest
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.json_file import json_text
from better_attention.lab.runs.overwrite_guard import check_output
from better_attention.lab.runs.provenance import commit, versions
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training import sharding
from better_attention.lab.training.evaluation import total
from better_attention.lab.training.events import Began, DataRead, Ended, Estimated, Failed, Notify, Updated, ignore
from better_attention.lab.training.interruption import Stop
from better_attention.lab.training.launch import in_words, is_first, launched
from better_attention.lab.training.loop import Training
from better_attention.lab.training.processes import check_alike, limited_threads, make_accelerator, watching_peers
from better_attention.lab.training.progress import DivergedError, Interrupted
from better_attention.lab.training.step_time import Measure, Pace, measure
from better_attention.text import plural

Paces = Mapping[tuple[Variant, int], Pace]
"""The speed of each model, by variant and number of heads."""


class Engine(Protocol):
    """Another way to train the runs of a comparison than one after the other in this process."""

    @property
    def device(self) -> str:
        """The kind of device that runs are trained on."""

    def train(
        self, plan: Plan, stored: Snapshot, splits: Splits, accelerator: Accelerator, notify: Notify, measure: Measure
    ) -> list[str]:
        """See :func:`train`."""


def compare(
    plan: Plan, notify: Notify = ignore, *, measure: Measure = measure, engine: Engine | None = None
) -> tuple[Study, list[str]]:
    """Train what is not yet trained, then write ``results.csv``, ``results.json`` and ``report.html``.

    All runs share the data, the order of the samples (by seed), and the initial weights that mechanisms
    have in common. Finished runs are kept, an interrupted one continues; the results cover every finished
    run in ``plan.out``. A run that fails is left out, the others go on.

    Args:
        plan: what is compared.
        notify: called with every event.
        measure: finds the speed of each model before it is trained.
        engine: trains the runs; None: this process, or the processes of this launch.

    Returns:
        The study that was written, and the names of the runs that failed. Of several processes only the first gathers
        the study; the others return one without runs.

    Raises:
        ValueError: settings that do not fit, data that is missing, a folder that holds another comparison.
        Interrupted: a signal arrived; everything is saved.
        PeerLostError: another process of the launch has ended.
    """
    # Looking for a writer takes its lock for a moment, so several processes of one launch would find each other.
    stored = Snapshot.read(plan.out, verify=True, writers=is_first())
    check_folder(plan, stored)
    if engine is not None and launched() > 1:
        raise ValueError("an engine starts the processes that it needs: give the command without torchrun.")
    # Where an engine trains, this process only reads data and writes results.
    accelerator = make_accelerator(plan.device if engine is None else "cpu")
    device = accelerator.device.type if engine is None else engine.device
    with watching_peers(accelerator.num_processes, plan.command):
        plan = plan.fitted()
        refuse(plan, stored, device)
        sharding.check(plan.shard, accelerator.num_processes)
        check_shares(plan, accelerator.num_processes)
        splits = load(plan, accelerator)
        check_alike(accelerator, identity(plan, splits))
        refuse_other_data(stored, splits.digest)
        notify(DataRead(splits, accelerator.device))
        training = train if engine is None else engine.train
        failed = training(plan, stored, splits, accelerator, notify, measure)
        study = publish(plan, splits, accelerator)
    return study, failed


def check_folder(plan: Plan, stored: Snapshot) -> None:
    """Refuse an output folder that cannot be written or that belongs to something else.

    Raises:
        ValueError: says what it holds.
    """
    check_output(plan.out, (*RESULTS, manifest.NAME), is_results, known=bool(stored.runs))
    if (plan.out / "ladder.json").is_file():
        raise ValueError(f"{plan.out} holds a ladder: choose another --out.")
    check_results_are_not_data(plan, stored, plan.device)


def check_shares(plan: Plan, processes: int) -> None:
    """Refuse more processes than a batch has samples: some would never learn anything.

    Raises:
        ValueError: says how many there may be.
    """
    if processes > plan.task.batch_size:
        raise ValueError(
            f"{in_words(processes)} share batches of {plural(plan.task.batch_size, 'sample')}, and each needs one. "
            f"Launch at most {plan.task.batch_size}, or raise --batch-size."
        )


def identity(plan: Plan, splits: Splits) -> dict[str, str]:
    """What all processes of a launch must agree on: name -> value."""
    jobs = [job.describe("", plan.device) for job in plan.jobs()]
    return {
        "the version of better-attention": f"{versions()['better-attention']} {commit()}",
        "the version of torch": versions()["torch"],
        "task, settings or runs": json_text({"jobs": jobs, "shard": plan.shard}),
        "the data": splits.digest,
    }


def load(plan: Plan, accelerator: Accelerator) -> Splits:
    """The data, on the device, with the notes on the setting.

    Raises:
        ValueError: the data set is missing or damaged; the message says how to get it.
    """
    splits = plan.task.load(plan.data)
    notes = (*splits.notes, *guessing(splits), *remarks(plan.task, plan.variants, plan.heads, splits.sizes))
    return replace(splits, notes=notes).to(accelerator.device)


def train(
    plan: Plan,
    stored: Snapshot,
    splits: Splits,
    accelerator: Accelerator,
    notify: Notify = ignore,
    measure: Measure = measure,
) -> list[str]:
    """Train the runs that are not finished, one after the other; the names of those that diverged.

    Raises:
        ValueError: another command works in the folder, with other settings or on the same run.
        Interrupted: a signal arrived; everything is saved.
    """
    jobs, failed = plan.jobs(), []
    missing = missing_everywhere(jobs, stored, accelerator)
    with limited_threads(plan.task.threads):  # nothing needs to be saved yet: a signal ends it at once
        paces = measure_paces(plan, missing, splits, accelerator, notify, measure)
    stop = Stop(notify)
    with limited_threads(plan.task.threads), stop.listening():
        for number, job in enumerate(jobs, start=1):
            began = Began(job.folder_name, number, len(jobs))
            if job not in missing:
                report_finished(began, stored, notify, tidy=accelerator.is_main_process)
                continue
            training = Training(
                *(job, splits, RunFolder(plan.out / job.folder_name), accelerator),
                command=plan.command,
                pace=paces[job.variant, job.heads],
                shard=bool(plan.shard),
                progress=lambda position, steps: notify(Updated(position, steps)),
                stop=stop,
            )
            try:
                notify(Ended(began.name, train_one(training, stored, began, notify)))
            except DivergedError as error:
                failed.append(began.name)
                notify(Failed(began.name, error))
            except Interrupted as error:
                error.signal = stop.signal or error.signal
                raise
            finally:
                accelerator.free_memory()  # it keeps every model that it has prepared
    return failed


def train_one(training: Training, stored: Snapshot, began: Began, notify: Notify) -> RunRecord:
    """Claim the folder of a run and train it; its record.

    The settings of whichever command creates a run first are those of the folder: they are compared, and the run's
    configuration written, while no other command can do the same.

    Raises:
        ValueError: another process writes this run, or has begun runs with other settings.
    """
    first = training.main
    with exclusive(training.folder.path, first):
        # The lock of the whole folder is held for a moment only, that of the run for as long as it is trained.
        with exclusive(stored.out, first, RESULTS_LOCK_SECONDS):
            if first and (newcomer := stored.newcomer()):
                description = training.job.describe(training.splits.digest, training.accelerator.device.type)
                check_agreement(f"{newcomer.path}", newcomer.config(), description)
            record = training.open()
        # After the run was opened, because listeners may read its configuration.
        notify(began)
        return record or training.finish()


def report_finished(began: Began, stored: Snapshot, notify: Notify, *, tidy: bool) -> None:
    """Report a run that an earlier command finished.

    Args:
        began: the run.
        stored: the runs.
        notify: called with the events.
        tidy: remove the checkpoints that a crash right after the last step left behind.
    """
    folder = stored.out / began.name
    if tidy and any(folder.glob("checkpoint-*")):
        with locked(folder):
            checkpoint.clear(folder)
    notify(began)
    if record := stored.finished.get(began.name):
        notify(Ended(began.name, record))


def missing_everywhere(jobs: Sequence[Job], stored: Snapshot, accelerator: Accelerator) -> list[Job]:
    """The jobs that are not finished, as the first process sees it: all processes must train the same ones."""
    missing = stored.missing(jobs)
    # A sum over the processes, to which the first alone contributes.
    flags = total(accelerator, *(float(accelerator.is_main_process and job in missing) for job in jobs))
    return [job for job, flag in zip(jobs, flags, strict=True) if flag]


def measure_paces(
    plan: Plan, missing: Sequence[Job], splits: Splits, accelerator: Accelerator, notify: Notify, measure: Measure
) -> Paces:
    """The speed of every model that is still to be trained; reports how long all of it will take."""
    models = dict.fromkeys((job.variant, job.heads) for job in missing)
    paces = {model: measure(plan.task, splits, *model, accelerator.device) for model in models}
    if missing:
        # Each process evaluates and trains on its share of every split.
        shares = [math.ceil(size / accelerator.num_processes) for size in splits.sizes.values()]
        seconds = sum(paces[job.variant, job.heads].run_seconds(plan.task, *shares) for job in missing)
        notify(Estimated(seconds, len(missing)))
    return paces


def publish(plan: Plan, splits: Splits, accelerator: Accelerator) -> Study:
    """Gather all finished runs of the folder and write the results; in the first process alone.

    Only one command at a time does so: the one that writes last has seen every run.
    """
    stored = Snapshot(plan.out, {})
    with exclusive(plan.out, accelerator.is_main_process, RESULTS_LOCK_SECONDS):
        if accelerator.is_main_process:
            stored = Snapshot.read(plan.out)
        study = gather(plan, stored, splits)
        # Without a finished run there is nothing to show, and the files of an earlier command stay as they are.
        if study.finished:
            write(study, plan.out)
    accelerator.wait_for_everyone()
    return study


def exclusive(folder: Path, first: bool, patience: float = 0.5) -> AbstractContextManager[None]:
    """The lock of a folder, which the first process holds for all processes of a launch."""
    return locked(folder, patience) if first else nullcontext()
