"""Learning curves in TensorBoard or Weights & Biases, in addition to our own files.

Tracking is optional and cannot disturb training: an error in a tracker ends that tracker and nothing else. Each run of
a comparison is a run there, below ``OUT/trackers/``. How much was logged is recorded beside it, epoch by epoch, so that
the log of an interrupted run continues where it ended and no epoch appears twice. A run that was deleted and is trained
anew is another run: its log begins anew, as ``RUN-2``.
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

from accelerate.tracking import TensorBoardTracker, WandBTracker

from better_attention.lab.comparison.plan import Plan
from better_attention.lab.files import remove_leftovers
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.json_file import read_json, write_json
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.training.events import Began, Ended, Event, Failed, Updated

CURVE = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
FIGURES = ("accuracy", "loss", "top5", "bleu", "bits_per_character", "perplexity")
FINAL = tuple(f"{split}_{key}" for split in ("validation", "test") for key in FIGURES)


class Tracker(Protocol):
    """The part of :class:`accelerate.tracking.GeneralTracker` that is used."""

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
    # Resolved, so that the same folder has the same identity from whatever directory the command is given.
    identity = sha256(f"{folder.resolve()} {run}".encode()).hexdigest()[:16]
    tracker: Tracker = WandBTracker(
        f"better-attention-{plan.task.name}",
        name=run,
        group=f"{plan.task.name}-{plan.task.scale}",
        id=identity,
        resume="allow",
        dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings={"console": "off"},  # it would capture our own output
    )
    return tracker


Maker = Callable[[Path, Plan, str], Tracker]
"""Makes the tracker of a run: from the folder of the trackers, the comparison and the name of the run."""
TRACKERS: Mapping[str, Maker] = MappingProxyType({"tensorboard": tensorboard, "wandb": wandb})
"""Name on the command line, which is also that of the package -> a function that makes the tracker of a run."""


def check(names: Sequence[str], makers: Mapping[str, Maker] = TRACKERS) -> None:
    """Refuse trackers that are not available, before anything is trained.

    Args:
        names: what was asked for.
        makers: those there are, by the name of their package.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in makers:
            raise ValueError(f"unknown tracker {name!r}: choose among {', '.join(makers)}.")
        package = find_spec(name)
        if package is None or package.origin is None:  # a mere folder of that name, which wandb leaves behind
            raise ValueError(f"--track {name} needs the package {name!r}, which is not installed: pip install {name}")


class Tracking:
    """Logs the finished epochs and the results of each run; to be called with every event.

    Args:
        plan: the comparison.
        names: keys of ``makers``.
        say: called with one line when a tracker fails.
        first: whether this is the first process of the launch, which alone logs.
        makers: the trackers there are.

    Raises:
        ValueError: see :func:`check`.
    """

    def __init__(
        self,
        plan: Plan,
        names: Sequence[str],
        say: Callable[[str], None],
        *,
        first: bool = True,
        makers: Mapping[str, Maker] = TRACKERS,
    ) -> None:
        check(names, makers)
        self.makers = makers
        self.plan, self.names, self.say = plan, list(dict.fromkeys(names)) if first else [], say
        self.folder = plan.out / "trackers"
        self.run = ""
        self.open: dict[str, Tracker] = {}
        self.identity = ""  # digest of the run's configuration
        self.logged: dict[str, int] = {}
        self.attempts: dict[str, int] = {}
        self.least = 0  # epochs that every tracker has: what each update is compared with

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what an interruption left open."""
        self._close()

    def __call__(self, event: Event) -> None:
        """Log what an event adds."""
        match event:
            case _ if not self.names:
                return
            case Began(name=name):
                self._begin(name)
            case Updated(position=position, name=name):  # the end of an epoch shows at the next update
                if name in ("", self.run) and len(position.curve) > self.least:
                    self._log_curve(position.curve)
            case Ended(name=name, record=record):
                if name != self.run:  # of several runs in progress the one that began last is followed, the others now
                    self._begin(name)
                self._end(name, record)
            case Failed():
                self._close()

    def _begin(self, name: str) -> None:
        """Look up what was logged of a run; its tracker starts with the first values to log."""
        self._close()
        self.run, self.logged = name, {}
        try:
            self.identity = sha256((self.plan.out / name / "config.json").read_bytes()).hexdigest()
        except FileNotFoundError:  # it is trained on another machine, from which it comes when it has ended
            self.run = ""
            return
        for tracker in list(self.names):
            self._guarded(tracker, self._remember, tracker)
        self.least = min(self.logged.values(), default=0)

    def _end(self, name: str, record: RunRecord) -> None:
        """Log what is missing of a finished run."""
        self._log_curve(RunFolder(self.plan.out / name).curve())
        for tracker in list(self.names):
            self._guarded(tracker, self._log_final, tracker, record)
        self._close()

    def _log_curve(self, curve: Sequence[Mapping[str, float]]) -> None:
        # A copy of the list, from which _guarded() removes a tracker that fails.
        for tracker in list(self.names):
            self._guarded(tracker, self._log_epochs, tracker, curve)
        self.least = max(self.least, len(curve))

    def _log_epochs(self, name: str, curve: Sequence[Mapping[str, float]]) -> None:
        for line in curve[self.logged[name] :]:
            # Trackers group their charts by what stands before the slash.
            values = {key.replace("_", "/", 1): line[key] for key in CURVE}
            self._tracker(name).log({**values, "epoch/seconds": line["seconds"]}, step=int(line["epoch"]))
            self._note(name, int(line["epoch"]))

    def _log_final(self, name: str, record: RunRecord) -> None:
        if read_json(self._memory(name)).get("final"):
            return
        values = {f"final/{key}": record.values[key] for key in FINAL if record.values.get(key) is not None}
        self._tracker(name).log(values, step=self.logged[name])
        self._note(name, self.logged[name], final=True)

    def _tracker(self, name: str) -> Tracker:
        """The tracker of this run; started, and given the settings, when it is first needed."""
        if name not in self.open:
            attempt = self.attempts[name]
            tracker = self.makers[name](self.folder, self.plan, self.run if attempt == 1 else f"{self.run}-{attempt}")
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
            # Where no epoch was logged under the old name, the new run can have it.
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
        """Call; on any error this tracker is given up for the rest of the comparison, and training continues."""
        try:
            call(*arguments)
        except Exception as error:
            if name in self.names:
                self.names.remove(name)
            self.open.pop(name, None)
            self.say(
                f"{name} failed ({type(error).__name__}: {error}): nothing more is logged there, training continues. "
                "The same command with --track logs what is missing."
            )


def _scalar(value: object) -> bool | int | float | str:
    """A setting in a form that trackers accept."""
    return value if isinstance(value, bool | int | float | str) else str(value)
