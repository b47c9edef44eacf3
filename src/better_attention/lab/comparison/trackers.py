"""Learning curves in TensorBoard or Weights & Biases, beside our own files: optional, and never in training's way.

A run of a comparison is a run there, below ``OUT/trackers/``. What was logged is remembered beside it, epoch by epoch,
so that a run that was interrupted goes on where its log ended and no epoch is there twice. A run that was deleted and
is trained anew is another one: its log begins anew, as ``RUN-2``. Whatever goes wrong in a tracker ends that tracker
and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker

from better_attention.lab.comparison.compare import Plan
from better_attention.lab.files import remove_leftovers
from better_attention.lab.runs.folder import read_curve, read_json, write_json
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.events import Watcher
from better_attention.lab.training.progress import DivergedError, Position

CURVE = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
FINAL = tuple(f"{split}_{key}" for split in ("validation", "test") for key in ("accuracy", "loss", "top5", "bleu"))


class Tracker(Protocol):
    """What is used of :class:`accelerate.tracking.GeneralTracker`."""

    def start(self) -> None:
        """Begin, or continue, the run."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log settings."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Log numbers."""

    def finish(self) -> None:
        """End the run."""


def tensorboard(folder: Path, plan: Plan, run: str) -> Tracker:
    """A run of TensorBoard, in ``folder/tensorboard/RUN``."""
    tracker: Tracker = TensorBoardTracker(run, folder / "tensorboard")
    return tracker


def wandb(folder: Path, plan: Plan, run: str) -> Tracker:
    """A run of Weights & Biases: offline, in ``folder/wandb``, unless ``WANDB_MODE`` says otherwise.

    Its id follows from the folder, so that ``wandb sync`` brings the parts of an interrupted run together.
    """
    identity = sha256(f"{folder.resolve()} {run}".encode()).hexdigest()[:16]
    tracker: Tracker = WandBTracker(
        f"better-attention-{plan.task.name}",
        name=run,
        group=f"{plan.task.name}-{plan.task.scale}",
        id=identity,
        resume="allow",
        dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings={"console": "off"},  # the screen is ours
    )
    return tracker


TRACKERS: Mapping[str, Callable[[Path, Plan, str], Tracker]] = MappingProxyType(
    {"tensorboard": tensorboard, "wandb": wandb}
)
"""Name on the command line, which is that of the package too -> a function that makes the tracker of a run."""


def check(names: Sequence[str]) -> None:
    """Refuse trackers that are not there, before anything is trained.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}: choose among {', '.join(TRACKERS)}.")
        package = find_spec(name)
        if package is None or package.origin is None:  # a folder of that name, which wandb likes to leave, is none
            raise ValueError(f"--track {name} needs the package {name!r}, which is not installed: pip install {name}")


class TrackingWatcher(Watcher):
    """Hands the finished epochs and the results of each run to trackers.

    Args:
        plan: the comparison.
        names: keys of :data:`TRACKERS`.
        say: told in one line when a tracker fails.

    Raises:
        ValueError: see :func:`check`.
    """

    def __init__(self, plan: Plan, names: Sequence[str], say: Callable[[str], None]) -> None:
        check(names)
        self.plan, self.names, self.say = plan, list(dict.fromkeys(names)), say
        self.folder = plan.out / "trackers"
        self.main, self.run = True, ""
        self.open: dict[str, Tracker] = {}
        self.identity = ""  # of the run: of what its configuration says
        self.logged: dict[str, int] = {}
        self.attempts: dict[str, int] = {}
        self.least = 0  # epochs that every tracker has: what `progress` looks at

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what an interruption left open."""
        self._close()

    def data(self, splits: Splits, accelerator: Accelerator) -> None:
        """See :class:`Watcher`."""
        self.main = accelerator.is_main_process

    def begin(self, name: str, number: int, runs: int) -> None:
        """See :class:`Watcher`; the run has its configuration. The tracker starts with the first thing to log."""
        self._close()
        self.run, self.logged = name, {}
        if self.main:
            self.identity = sha256((self.plan.out / name / "config.json").read_bytes()).hexdigest()
            for tracker in list(self.names):
                self._guarded(tracker, self._remember, tracker)
        self.least = min(self.logged.values(), default=0)

    def progress(self, position: Position, steps: int) -> None:
        """See :class:`Watcher`; an epoch's end shows at the next update."""
        if self.main and len(position.curve) > self.least:
            self._log_curve(position.curve)

    def end(self, name: str, record: dict[str, Any]) -> None:
        """See :class:`Watcher`."""
        if self.main and self.names:
            self._log_curve(read_curve(self.plan.out / name))
            for tracker in list(self.names):
                self._guarded(tracker, self._log_final, tracker, record)
        self._close()

    def failed(self, name: str, error: DivergedError) -> None:
        """See :class:`Watcher`."""
        self._close()

    def _log_curve(self, curve: Sequence[Mapping[str, float]]) -> None:
        for tracker in list(self.names):
            self._guarded(tracker, self._log_epochs, tracker, curve)
        self.least = max(self.least, len(curve))

    def _log_epochs(self, name: str, curve: Sequence[Mapping[str, float]]) -> None:
        for line in curve[self.logged[name] :]:
            values = {key.replace("_", "/", 1): line[key] for key in CURVE}
            self._tracker(name).log({**values, "epoch/seconds": line["seconds"]}, step=int(line["epoch"]))
            self._note(name, int(line["epoch"]))

    def _log_final(self, name: str, record: Mapping[str, Any]) -> None:
        if read_json(self._memory(name)).get("final"):
            return
        values = {f"final/{key}": record[key] for key in FINAL if record.get(key) is not None}
        self._tracker(name).log(values, step=self.logged[name])
        self._note(name, self.logged[name], final=True)

    def _tracker(self, name: str) -> Tracker:
        """The tracker of this run; started, and told the settings, when it is first asked for."""
        if name not in self.open:
            attempt = self.attempts[name]
            tracker = TRACKERS[name](self.folder, self.plan, self.run if attempt == 1 else f"{self.run}-{attempt}")
            tracker.start()
            self.open[name] = tracker
            if not self.logged[name]:
                settings = {"run": self.run, **self.plan.task.settings()}
                tracker.store_init_configuration({key: _scalar(value) for key, value in settings.items()})
        return self.open[name]

    def _memory(self, name: str) -> Path:
        return self.folder / "logged" / f"{self.run}.{name}.json"

    def _remember(self, name: str) -> None:
        memory = self._memory(name)
        if memory.parent.is_dir():  # this run is locked, and nobody else writes its memory
            remove_leftovers(memory.parent, re.compile(re.escape(memory.name[:64])))
        known = read_json(self._memory(name)) if self._memory(name).is_file() else {}
        self.logged[name], self.attempts[name] = int(known.get("epochs", 0)), int(known.get("attempt", 1))
        if known and known.get("run") != self.identity:
            self.attempts[name] += self.logged[name] > 0
            known = {}
        if not known:
            self._note(name, 0)

    def _note(self, name: str, epochs: int, *, final: bool = False) -> None:
        self.logged[name] = epochs
        memory = {"run": self.identity, "attempt": self.attempts[name], "epochs": epochs, "final": final}
        write_json(self._memory(name), memory)

    def _close(self) -> None:
        for name in list(self.open):
            self._guarded(name, self.open.pop(name).finish)

    def _guarded(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call; on any error this tracker is given up for the rest of the comparison, and training goes on."""
        try:
            call(*arguments)
        except Exception as error:
            if name in self.names:
                self.names.remove(name)
            self.open.pop(name, None)
            self.say(
                f"{name} failed ({type(error).__name__}: {error}): nothing more is logged there, training goes on. "
                "The same command with --track logs what is missing."
            )


def _scalar(value: object) -> bool | int | float | str:
    """A setting as trackers take it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
