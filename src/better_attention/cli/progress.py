"""What the screen shows while a comparison is under way: live bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from better_attention.cli.screen import message
from better_attention.errors import counted
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.events import Watcher
from better_attention.lab.training.progress import DivergedError, Position

if TYPE_CHECKING:
    from better_attention.lab.comparison.compare import Plan

PLAIN_SECONDS = 30.0  # between two lines about one run
LONG = 3600.0  # seconds above which the user is told of something shorter


class LineWatcher(Watcher):
    """A line when something happens to a run, and one every half minute of a long one.

    Args:
        console: where the lines go.
        epochs: most epochs of a run.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.title, self.said_at = "", 0.0

    def say(self, line: str) -> None:
        """Print one line; a line end in a name does not begin another."""
        self.console.print(message(line), markup=False, soft_wrap=True)

    def begin(self, name: str, number: int, runs: int) -> None:
        """See :class:`Watcher`."""
        self.title, self.said_at = f"[{number}/{runs}] {name}", time.monotonic()

    def progress(self, position: Position, steps: int) -> None:
        """See :class:`Watcher`."""
        if time.monotonic() - self.said_at >= PLAIN_SECONDS:
            self.said_at = time.monotonic()
            self.say(f"{self.title}  {where(position, self.epochs, steps)}")

    def failed(self, name: str, error: DivergedError) -> None:
        """See :class:`Watcher`."""
        self.say(f"{self.title}  FAILED  {error}")

    def stopping(self) -> None:
        """See :class:`Watcher`."""
        self.say("stopping after this step; once more stops at once")


class PlainWatcher(LineWatcher):
    """What a comparison says of its data, its time and each finished run."""

    def __init__(self, console: Console, plan: Plan) -> None:
        super().__init__(console, plan.task.epochs)
        self.plan = plan

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to put away."""

    def data(self, splits: Splits, accelerator: Accelerator) -> None:
        """Say what is compared, on what."""
        task, sizes = self.plan.task, splits.sizes.values()
        self.say(f"{task.title}, scale {task.scale}: {counted(len(self.plan.runs()), 'run')} below {self.plan.out}")
        self.say(
            "{:,} training, {:,} validation and {:,} test samples; ".format(*sizes) + f"device {accelerator.device}"
        )
        for note in splits.notes:
            self.say(f"note: {note}")

    def estimate(self, seconds: float, runs: int) -> None:
        """See :class:`Watcher`."""
        sooner = f"; patience {self.plan.task.patience} may end a run sooner" if self.plan.task.patience else ""
        most = f"at most {counted(self.epochs, 'epoch')}"
        self.say(f"about {duration(seconds)} for {counted(runs, 'run')} of {most}{sooner}")
        if seconds > LONG:
            smaller = {"paper": "--scale small or smoke takes", "small": "--scale smoke takes"}
            less = smaller.get(self.plan.task.scale, "fewer --epochs, --seeds or --mechanisms take")
            self.say(f"{less} less; Ctrl-C stops after a step, and the same command continues there")

    def end(self, name: str, record: dict[str, Any]) -> None:
        """See :class:`Watcher`."""
        self.say(f"{self.title}  {outcome(record)}")


class LiveWatcher(PlainWatcher):
    """A bar for the whole comparison, one for the run under way, and above them a line a finished run."""

    def __init__(self, console: Console, plan: Plan) -> None:
        super().__init__(console, plan)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=console, refresh_per_second=4)
        self.all: TaskID = self.bars.add_task("all runs", total=len(plan.runs()))
        self.one: TaskID = self.bars.add_task("reading the data", total=None)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bars off the screen."""
        for bar in (self.all, self.one):
            self.bars.update(bar, visible=False)
        self.bars.stop()

    def begin(self, name: str, number: int, runs: int) -> None:
        """See :class:`Watcher`."""
        super().begin(name, number, runs)
        self.bars.reset(self.one, description=self.title, total=None)

    def progress(self, position: Position, steps: int) -> None:
        """See :class:`Watcher`."""
        self.bars.update(
            self.one,
            description=f"{self.title}  {where(position, self.epochs, steps)}",
            total=self.epochs * steps,
            completed=(position.epoch - 1) * steps + position.step,
        )

    def end(self, name: str, record: dict[str, Any]) -> None:
        """See :class:`Watcher`."""
        super().end(name, record)
        self.bars.advance(self.all)

    def failed(self, name: str, error: DivergedError) -> None:
        """See :class:`Watcher`."""
        super().failed(name, error)
        self.bars.advance(self.all)


def make_watcher(console: Console, plan: Plan) -> PlainWatcher:
    """The watcher that suits the console."""
    return LiveWatcher(console, plan) if console.is_interactive else PlainWatcher(console, plan)


def duration(seconds: float) -> str:
    """A time in the two units that matter.

    >>> duration(8000)
    '2 h 13 min'
    """
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def where(position: Position, epochs: int, steps: int) -> str:
    """Epoch, step and the last validation, in one line."""
    last = position.curve[-1] if position.curve else None
    validated = f"  validation {last['validation_accuracy']:.2f} %, loss {last['validation_loss']:.3f}" if last else ""
    return f"epoch {position.epoch}/{epochs}, step {position.step}/{steps}{validated}"


def outcome(record: dict[str, Any]) -> str:
    """The result of a run in one line."""
    bleu = "" if record.get("test_bleu") is None else f"BLEU {record['test_bleu']:.1f}, "
    scores = f"test {bleu}{record['test_accuracy']:.2f} %, loss {record['test_loss']:.3f}"
    best = f"best epoch {record['best_epoch']} of {record['epochs']}"
    return f"{scores}; {best}; {record['epoch_seconds']:.2f} s/epoch"
