"""Trained models against each other on this CPU: time of a call, memory of a process, size of the file."""

from __future__ import annotations

import multiprocessing
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from better_attention.bench.edge.contenders import Call, Contender
from better_attention.bench.machine import extra_memory
from better_attention.bench.runner import Spread, no_garbage_collection
from better_attention.lab import csv_json
from better_attention.lab.runs import manifest
from better_attention.lab.timing import alternate

FILES = ("models.json", "models.csv")
FEWEST_CALLS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to measure.

    Args:
        batch_size: samples of a call.
        rounds: turns of every contender.
        seconds: about how long a turn takes; at least three calls.
    """

    batch_size: int = 1
    rounds: int = 5
    seconds: float = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """One model in one runtime.

    Args:
        model, runtime: which.
        median, p90: seconds of a call, over the calls of all rounds; None: not timed, see ``reason``.
        times_as_fast: time of the first row's call over its own, by the medians of the same rounds.
        calls: how many were timed.
        memory_bytes: by which reading the model and calling it raise the resident memory of a fresh process; None
            where the system does not say.
        file_bytes: of the weights, or of the ONNX file.
        reason: why it was not timed.
    """

    model: str
    runtime: str
    median: float | None = None
    p90: float | None = None
    times_as_fast: Spread | None = None
    calls: int = 0
    memory_bytes: int | None = None
    file_bytes: int = 0
    reason: str = ""


def measure(
    contenders: Sequence[Contender], settings: Settings, say: Callable[[str], None] = lambda line: None
) -> tuple[list[Row], bool]:
    """Memory of each contender, then the time of all of them in alternation.

    Returns:
        One row for each contender, and whether all rounds were run: Ctrl-C ends them, and what was timed counts.
    """
    rows = [Row(c.name, c.runtime, file_bytes=c.file_bytes, reason=c.reason) for c in contenders]
    calls: dict[int, Call] = {}
    for number, contender in enumerate(contenders):
        if contender.reason:
            continue
        say(f"[{number + 1}/{len(contenders)}] memory of {contender.name}, {contender.runtime}")
        try:
            rows[number] = replace(rows[number], memory_bytes=memory_of(contender))
            calls[number] = contender.load()
        except (ValueError, ImportError, OSError) as error:
            rows[number] = replace(rows[number], reason=" ".join(str(error).split()))
    seconds: dict[int, list[list[float]]] = {number: [] for number in calls}
    complete = True
    try:
        say(f"timing {len(calls)} of {len(rows)} in {settings.rounds} rounds")
        with no_garbage_collection():
            for _, number in alternate(list(calls), settings.rounds):
                seconds[number].append(turn(calls[number], settings.seconds))
    except KeyboardInterrupt:
        complete = False
    return summarised(rows, seconds), complete


def turn(call: Call, seconds: float) -> list[float]:
    """Seconds of each call of a turn, after one that is not timed: caches and threads are then its own."""
    call()
    found: list[float] = []
    began = perf_counter()
    while len(found) < FEWEST_CALLS or perf_counter() - began < seconds:
        start = perf_counter()
        call()
        found.append(perf_counter() - start)
    return found


def summarised(rows: Sequence[Row], seconds: Mapping[int, Sequence[Sequence[float]]]) -> list[Row]:
    """The rows with what was timed.

    Args:
        rows: of all contenders.
        seconds: number of a row -> for each round, the seconds of its calls.
    """
    medians = {number: [statistics.median(calls) for calls in turns] for number, turns in seconds.items()}
    # Ratios are against the first contender that could be timed.
    base = next((medians[number] for number in sorted(medians) if medians[number]), [])
    found = list(rows)
    for number, turns in seconds.items():
        every = [second for calls in turns for second in calls]
        # After Ctrl-C the last round may lack some of the contenders.
        ratios = [theirs / mine for theirs, mine in zip(base, medians[number], strict=False)]
        if every:
            spread = Spread.of(every)
            speed = Spread.of(ratios)
            timed = {"median": spread.median, "p90": spread.high, "times_as_fast": speed, "calls": len(every)}
            found[number] = replace(rows[number], **timed)  # type: ignore[arg-type]
        else:
            found[number] = replace(rows[number], reason="interrupted")
    return found


def memory_of(contender: Contender) -> int | None:
    """Bytes by which reading and calling a model raise the resident memory of a process that has imported everything.

    Raises:
        ValueError: the model cannot be read or called there.
    """
    # Not forked: such a process has all the memory of this one from its beginning.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, contender), daemon=True)
    process.start()
    # The process then has the only other end, so that its death ends the wait for an answer.
    there.close()
    try:
        answer: int | str | None = here.recv()
    except EOFError:
        raise ValueError(
            f"the process that read {contender.path} ended without an answer, for lack of memory?"
        ) from None
    finally:
        process.kill()
        process.join()
        here.close()
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def _answer(connection: Connection, contender: Contender) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this process
    torch.set_num_threads(contender.threads)

    def read_and_call() -> None:
        call = contender.load()
        call()
        call()

    try:
        read_and_call()  # imports what it needs
        connection.send(extra_memory(read_and_call))
    except Exception as error:  # those of ONNX Runtime have no class in common
        connection.send(str(error))


@dataclass(frozen=True, slots=True)
class Report:
    """A run of ``better-attention edge --models``.

    Args:
        machine: as :func:`better_attention.bench.machine.describe` gives it.
        settings: what was asked for.
        rows: what was found.
        complete: False if it was interrupted.
    """

    machine: Mapping[str, Any]
    settings: Settings
    rows: Sequence[Row]
    complete: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "machine": dict(self.machine),
            "settings": asdict(self.settings),
            "complete": self.complete,
            "models": [asdict(row) for row in self.rows],
        }


def is_report(value: object) -> bool:
    """Whether the value in a JSON file is a ``models.json``."""
    return isinstance(value, Mapping) and "models" in value and "machine" in value


def write(report: Report, folder: Path) -> list[Path]:
    """:data:`FILES` in ``folder``; returns the paths."""
    paths = [folder / name for name in FILES]
    folder.mkdir(parents=True, exist_ok=True)
    # It would be wrong until both files are written.
    manifest.remove(folder, FILES)
    csv_json.write_json(paths[0], report.as_dict())
    flat = [_flat(row) for row in report.rows]
    csv_json.write_csv(paths[1], list(flat[0]), (row.values() for row in flat))
    manifest.add(folder, FILES)
    return paths


def _flat(row: Row) -> dict[str, Any]:
    values = asdict(row)
    speed = values.pop("times_as_fast") or dict.fromkeys(("median", "low", "high"))
    return values | {f"times_as_fast_{key}": value for key, value in speed.items()}
