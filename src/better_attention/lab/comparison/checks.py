"""What is refused before anything is trained.

Each check takes the plan, the output folder as it was read, and the kind of device. None of them reads or writes a
file, so that all processes of a launch decide alike and the order of the checks is the order of the messages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch

from better_attention.lab.comparison.plan import Plan
from better_attention.lab.lock import in_use_message
from better_attention.lab.runs.record import RunConfig
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.text import plural

PARAMETER_COPIES_IN_TRAINING = 3
"""Weights, gradients and a moment: the least that training keeps in memory."""
IDENTITY = ("mechanism", "heads", "seed")
"""What distinguishes the runs of one comparison; everything else must agree."""
TRAIN_AGAIN = "Delete that folder and run again, it is trained anew."


def check_results_are_not_data(plan: Plan, stored: Snapshot, device: str) -> None:
    """Refuse an output folder inside a data folder that is read as a whole: the next call would read results as data.

    Raises:
        ValueError: it lies there.
    """
    if plan.data is None or not plan.task.own_data or not plan.data.is_dir():
        return
    if plan.out.resolve().is_relative_to(plan.data.resolve()):
        raise ValueError(
            f"--out {plan.out} lies in --data {plan.data}, and what is written there would be read as data. Choose "
            "another --out."
        )


def check_models(plan: Plan, stored: Snapshot, device: str) -> None:
    """Build every model once without memory, so that what cannot be built is refused before hours of training.

    Raises:
        ValueError: heads that do not divide the width, for example, or more parameters than the memory can train.
    """
    memory = physical_memory() if device == "cpu" else math.inf
    for job in plan.jobs()[: len(plan.variants) * len(plan.heads)]:  # every seed has the same models
        # Raises where the mechanism has no name that a folder may bear.
        _ = job.folder_name
        width = job.task.sized(job.variant, job.heads).width
        if width % job.heads:
            raise ValueError(f"--heads {job.heads} does not divide the width of task {job.task.name!r}, {width}.")
        with torch.device("meta"):
            size = sum(parameter.nbytes for parameter in job.task.build(job.variant, job.heads).parameters())
        if PARAMETER_COPIES_IN_TRAINING * size > memory:
            raise ValueError(
                f"{job.variant.name} with {plural(job.heads, 'head')} has {size / 2**30:,.0f} GiB of parameters; "
                f"training needs {PARAMETER_COPIES_IN_TRAINING} times that, and this machine has "
                f"{memory / 2**30:,.0f} GiB of memory."
            )


def check_settings(plan: Plan, stored: Snapshot, device: str) -> None:
    """Refuse a folder with runs of another task or of other settings: one table must not mix them.

    Raises:
        ValueError: lists the differences.
    """
    description = plan.jobs()[0].describe("", device)
    del description["data_sha256"]  # the data have not been read yet
    for name, run in stored.runs.items():
        check_agreement(f"{stored.out / name}", run.config, description)


def check_orphans(plan: Plan, stored: Snapshot, device: str) -> None:
    """Refuse a planned run whose folder holds files of a run, but nothing that says of which.

    Raises:
        ValueError: names the files.
    """
    for job in plan.jobs():
        if files := stored.orphans.get(job.folder_name):
            raise ValueError(
                f"{stored.out / job.folder_name} holds {', '.join(files)}, but no config.json: either a damaged run or "
                "unrelated files. Move them elsewhere, or choose another --out."
            )


def check_finished(plan: Plan, stored: Snapshot, device: str) -> None:
    """Refuse a folder with a finished run that cannot be used: the report would fail after all the training.

    Raises:
        ValueError: names the run, and what is wrong with it: damaged, or a model that is built differently now.
    """
    for name, record in stored.finished.items():
        run, path = stored.runs[name], stored.out / name
        if run.damage:
            raise ValueError(f"{path}: {run.damage.rstrip('.')}. {TRAIN_AGAIN}")
        size = plan.task.size(run.config.mechanism, run.config.heads)
        if record.total_params not in (None, size):
            raise ValueError(
                f"{path} is a model of {record.total_params:,} parameters; this version of better-attention builds it "
                f"with {size:,} (the run was written by {run.config.written_by}). {TRAIN_AGAIN}"
            )


def check_writers(plan: Plan, stored: Snapshot, device: str) -> None:
    """Refuse runs that another process writes at this moment, before data is read and speeds are measured.

    Raises:
        ValueError: names the run and the process.
    """
    for job in plan.jobs():
        if writer := stored.writers.get(job.folder_name):
            raise ValueError(in_use_message(stored.out / job.folder_name, writer))


Check = Callable[[Plan, Snapshot, str], None]
CHECKS: Sequence[Check] = (check_models, check_settings, check_orphans, check_finished, check_writers)
"""The checks of a plan whose task is fitted to the data, in order."""


def refuse(plan: Plan, stored: Snapshot, device: str) -> None:
    """Refuse a plan that one of :data:`CHECKS` refuses.

    Raises:
        ValueError: says what is wrong and what to do.
    """
    for check in CHECKS:
        check(plan, stored, device)


def refuse_other_data(stored: Snapshot, data_sha256: str) -> None:
    """Refuse a folder with runs on other data.

    Raises:
        ValueError: a stored run was trained on other data.
    """
    for name, run in stored.runs.items():
        check_agreement(f"{stored.out / name}", run.config, {"task": run.config.task, "data_sha256": data_sha256})


def check_agreement(path: str, config: RunConfig, description: dict[str, object]) -> None:
    """Make sure that a run may stand in one table with others.

    Args:
        path: of the run, for the message.
        config: its configuration.
        description: of a job, or a part of it.

    Raises:
        ValueError: lists the differences.
    """
    if config.task != description["task"]:
        raise ValueError(f"{path} is a run of task {config.task!r}: choose another folder with --out.")
    lines = config.differences({key: value for key, value in description.items() if key not in IDENTITY})
    if lines:
        raise ValueError(
            f"{path} holds a run with another configuration (written by {config.written_by}):\n  "
            + "\n  ".join(lines)
            + "\nChoose another folder with --out, use the settings from there, or delete that folder."
        )


def physical_memory() -> float:
    """Bytes of memory of this machine; infinity on a system that does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
