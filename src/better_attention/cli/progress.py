"""The progress of a comparison on the screen: live bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from better_attention.cli.screen import message
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.training.events import Began, DataRead, Ended, Estimated, Event, Failed, Stopping, Updated
from better_attention.lab.training.progress import Position
from better_attention.text import plural

if TYPE_CHECKING:
    from better_attention.lab.comparison.plan import Plan

PLAIN_SECONDS = 30.0
"""Time between two lines about one run."""
LONG_RUN_SECONDS = 3600.0
"""Above this estimate, something shorter is suggested."""


class ProgressLines:
    """Prints a line when something happens to a run, and one every half minute of a long one.

    It is to be called with every event.

    Args:
        console: where the lines go.
        epochs: most epochs of a run.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.last = ""  # the run that began last
        self.titles: dict[str, str] = {}
        self.said_at: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Began(name=name, number=number, runs=runs):
                self.last = name
                self.titles[name], self.said_at[name] = f"[{number}/{runs}] {name}", time.monotonic()
            case Updated(position=position, steps=steps, name=name):
                self.show_position(name or self.last, position, steps)
            case Failed(name=name, error=error):
                self.say(f"{self.titles.get(name, name)}  FAILED  {error}")
            case Stopping():
                self.say("stopping after this step; press Ctrl-C again to stop immediately")
            case _:
                pass

    def say(self, line: str) -> None:
        """Print one line; a line end in a name does not begin another."""
        # Names of files and classes may hold brackets, which rich would take for styles.
        self.console.print(message(line), markup=False, soft_wrap=True)

    def show_position(self, name: str, position: Position, steps: int) -> None:
        """Print where a run in progress stands, unless that was done a moment ago."""
        if time.monotonic() - self.said_at.get(name, 0.0) >= PLAIN_SECONDS:
            self.said_at[name] = time.monotonic()
            self.say(f"{self.titles.get(name, name)}  {where(position, self.epochs, steps)}")


class PlainProgress(ProgressLines):
    """Also prints the data, the estimated time and each result of a comparison."""

    def __init__(self, console: Console, plan: Plan) -> None:
        super().__init__(console, plan.task.epochs)
        self.plan = plan

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """There is nothing to close."""

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case DataRead():
                self.show_data(event)
            case Estimated(seconds=seconds, runs=runs):
                self.show_estimate(seconds, runs)
            case Ended(name=name, record=record):
                self.say(f"{self.titles.get(name, name)}  {outcome(record)}")
            case _:
                super().__call__(event)

    def show_data(self, event: DataRead) -> None:
        """Print what is compared, and on what."""
        task, sizes = self.plan.task, event.splits.sizes.values()
        self.say(f"{task.title}, scale {task.scale}: {plural(len(self.plan.jobs()), 'run')} below {self.plan.out}")
        samples = "{:,} training, {:,} validation and {:,} test samples".format(*sizes)
        self.say(f"{samples}; device {event.device}")
        for note in event.splits.notes:
            self.say(f"note: {note}")

    def show_estimate(self, seconds: float, runs: int) -> None:
        """Print how long the comparison takes, and what would take less."""
        sooner = f"; patience {self.plan.task.patience} may end a run sooner" if self.plan.task.patience else ""
        most = f"at most {plural(self.epochs, 'epoch')}"
        self.say(f"about {duration(seconds)} for {plural(runs, 'run')} of {most}{sooner}")
        # Told before the first run, when changing one's mind costs nothing.
        if seconds > LONG_RUN_SECONDS:
            smaller = {"paper": "--scale small or smoke takes", "small": "--scale smoke takes"}
            less = smaller.get(self.plan.task.scale, "fewer --epochs, --seeds or --mechanisms take")
            self.say(f"{less} less; Ctrl-C stops after a step, and the same command continues there")


class LiveProgress(PlainProgress):
    """A bar for the whole comparison, one for each run in progress, and above them one line per finished run."""

    def __init__(self, console: Console, plan: Plan) -> None:
        super().__init__(console, plan)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=console, refresh_per_second=4)
        self.all: TaskID = self.bars.add_task("all runs", total=len(plan.jobs()))
        self.ones: dict[str, TaskID] = {"": self.bars.add_task("reading the data", total=None)}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the bars from the screen."""
        for bar in (self.all, *self.ones.values()):
            self.bars.update(bar, visible=False)
        self.bars.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        super().__call__(event)
        match event:
            case Began(name=name):
                self.end_bar("")
                self.end_bar(name)  # of an attempt whose worker was lost
                # Without a total the bar only moves to and fro, until the first update brings the number of steps.
                self.ones[name] = self.bars.add_task(self.titles[name], total=None)
            case Ended(name=name) | Failed(name=name):
                self.end_bar(name)
                self.bars.advance(self.all)
            case _:
                pass

    def end_bar(self, name: str) -> None:
        """Remove the bar of a run, if it has one."""
        if name in self.ones:
            self.bars.remove_task(self.ones.pop(name))

    def show_position(self, name: str, position: Position, steps: int) -> None:
        """Move the bar of a run in progress."""
        if name not in self.ones:
            return
        self.bars.update(
            self.ones[name],
            description=f"{self.titles.get(name, name)}  {where(position, self.epochs, steps)}",
            total=self.epochs * steps,
            completed=(position.epoch - 1) * steps + position.step,
        )


def make_progress(console: Console, plan: Plan) -> PlainProgress:
    """The display that suits the console."""
    return LiveProgress(console, plan) if console.is_interactive else PlainProgress(console, plan)


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


def outcome(record: RunRecord) -> str:
    """The result of a run in one line."""
    bleu = "" if record.test_bleu is None else f"BLEU {record.test_bleu:.1f}, "
    bits = record.test_bits_per_character
    text = "" if bits is None else f"{bits:.3f} bits per character, "
    scores = f"test {text}{bleu}{record.test_accuracy:.2f} %, loss {record.test_loss:.3f}"
    best = f"best epoch {record.best_epoch} of {record.epochs}"
    return f"{scores}; {best}; {record.epoch_seconds:.2f} s/epoch{memory(record)}"


def memory(record: RunRecord) -> str:
    """The peak memory of each process of a run, where there were several."""
    peaks = record.values.get("peak_memory_bytes")
    if not isinstance(peaks, list) or not all(isinstance(peak, int) for peak in peaks):
        return ""
    return f"; peak memory of its processes {', '.join(f'{peak / 2**20:,.0f}' for peak in peaks)} MiB"
