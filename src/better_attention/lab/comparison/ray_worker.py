"""One run of a comparison, trained by a worker of Ray. What goes in and out is JSON, arrays and the files of a run."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from better_attention.lab.comparison.compare import train_one
from better_attention.lab.runs import manifest
from better_attention.lab.runs.folder import FILES, RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.provenance import versions
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.events import Began, Event, Updated
from better_attention.lab.training.loop import Training
from better_attention.lab.training.processes import limited_threads, make_accelerator
from better_attention.lab.training.progress import DivergedError, Interrupted, Position
from better_attention.lab.training.step_time import measure

TOLD_SECONDS = 0.5
"""Time between two messages about a run in progress."""
SENT = (*FILES, manifest.NAME)
"""The files of a run that a worker sends where it does not share the folder of the comparison."""

Tell = Callable[[Mapping[str, Any]], bool]
"""Hands a message to the comparison; true if it wants the run to stop."""


@dataclass(frozen=True)
class Order:
    """What a worker is to train, as plain JSON values.

    Args:
        task, scale, settings, variant, heads, seed: the run.
        number, runs: which one of how many it is.
        data_sha256, assets, departures: of the data.
        out: folder of the comparison, and ``mark``, a file in it by which a worker sees that it is the same folder.
        command: the command line, for the record.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads.
        versions: of the packages that numbers depend on.
    """

    task: str
    scale: str
    settings: Mapping[str, Any]
    variant: str
    heads: int
    seed: int
    number: int
    runs: int
    data_sha256: str
    assets: Mapping[str, Any]
    departures: tuple[str, ...]
    out: str
    mark: str
    command: str
    device: str
    threads: int
    versions: Mapping[str, str]

    @property
    def job(self) -> Job:
        """The run."""
        task = TASKS[self.task](self.scale).with_settings(self.settings)
        return Job(task, Variant.of(self.variant), self.heads, self.seed)


def work(text: str, arrays: Mapping[str, Any], tell: Tell) -> tuple[str, dict[str, bytes]]:
    """Train a run, in the folder of the comparison where this machine has it, else in one of its own.

    Args:
        text: the order, as JSON.
        arrays: name of a split -> its inputs and targets, NumPy arrays.
        tell: takes messages; see :func:`event_of`.

    Returns:
        JSON with ``state``, ``"finished"``, ``"failed"``, ``"interrupted"`` or ``"refused"``, and ``text``; and the
        files of the run, where the comparison has not got them.
    """
    order = Order(**json.loads(text))
    try:
        if tell({"kind": "waiting"}):
            raise Interrupted("not begun.")
        return json.dumps({"state": "finished", "text": ""}), _train(order, arrays, tell)
    except DivergedError as error:
        return json.dumps({"state": "failed", "text": str(error)}), {}
    except Interrupted as error:
        return json.dumps({"state": "interrupted", "text": str(error)}), {}
    except (ValueError, OSError) as error:
        return json.dumps({"state": "refused", "text": str(error)}), {}


def _train(order: Order, arrays: Mapping[str, Any], tell: Tell) -> dict[str, bytes]:
    _check_versions(order)
    torch.set_num_threads(order.threads)
    job, splits = order.job, _splits(order, arrays)
    accelerator = make_accelerator(order.device)
    with limited_threads(job.task.threads), ExitStack() as until_sent:
        shared = (Path(order.out) / order.mark).is_file()
        out = Path(order.out if shared else until_sent.enter_context(TemporaryDirectory(prefix="better-attention-")))
        until_sent.enter_context(_warnings_told(tell))
        messages = _Messages(tell)
        pace = measure(job.task, splits, job.variant, job.heads, accelerator.device)
        training = Training(
            *(job, splits.to(accelerator.device), RunFolder(out / job.folder_name), accelerator),
            command=order.command,
            progress=lambda position, steps: messages.tell(Updated(position, steps)),
            stop=lambda: messages.stop,
            pace=pace,
        )
        began = Began(job.folder_name, order.number, order.runs)
        try:
            train_one(training, Snapshot(out, {}), began, messages.tell)
        finally:
            accelerator.free_memory()
        return {} if shared else {name: (training.folder.path / name).read_bytes() for name in SENT}


def _check_versions(order: Order) -> None:
    here = versions()
    if differing := [name for name, version in order.versions.items() if here.get(name) != version]:
        lines = [f"{name} {here.get(name)} there, {order.versions[name]} here" for name in differing]
        raise ValueError(
            "a worker of the Ray cluster has other versions than this command:\n  "
            + "\n  ".join(lines)
            + "\nInstall the same on every machine of the cluster."
        )


def _splits(order: Order, arrays: Mapping[str, Any]) -> Splits:
    """The data, in the memory that all workers of a machine share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they cannot be written, which nobody does
        train, validation, test = (
            Split(torch.from_numpy(inputs), torch.from_numpy(targets))
            for inputs, targets in (arrays[name] for name in ("train", "validation", "test"))
        )
    splits = Splits(train, validation, test, assets=order.assets, departures=tuple(order.departures))
    if splits.digest != order.data_sha256:
        raise ValueError("the data arrived damaged at a worker of the Ray cluster: run again.")
    return splits


class _Messages:
    """Tells of the events of a run, of updates now and then, and knows from the answers whether to stop."""

    def __init__(self, tell: Tell) -> None:
        self.send, self.stop, self.told_at = tell, False, -TOLD_SECONDS

    def tell(self, event: Event) -> None:
        match event:
            case Began():
                self.stop = self.send({"kind": "began"})
            case Updated(position=position, steps=steps):
                if time.monotonic() - self.told_at >= TOLD_SECONDS:
                    self.told_at = time.monotonic()
                    self.stop = self.send({"kind": "updated", "position": asdict(position), "steps": steps})


@contextmanager
def _warnings_told(tell: Tell) -> Iterator[None]:
    """Hand warnings to the comparison: nobody sees the screen of a worker."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        tell({"kind": "warning", "text": str(message)})

    with warnings.catch_warnings():
        warnings.showwarning = show  # catch_warnings puts the old one back
        yield


def event_of(message: Mapping[str, Any], name: str, number: int, runs: int) -> Event | None:
    """The event that a message of the run ``name`` describes; None for other messages."""
    match message:
        case {"kind": "began"}:
            return Began(name, number, runs)
        case {"kind": "updated", "position": position, "steps": steps}:
            return Updated(Position(**position), steps, name)
    return None
