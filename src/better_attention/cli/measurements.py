"""What the verbs that measure share: folders with earlier measurements, how a run continues them, SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from types import FrameType
from typing import Any

from better_attention.cli import UserError
from better_attention.cli.screen import say


def differing(
    machine: Mapping[str, Any], settings: Mapping[str, Any], machine_now: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """How stored rows were measured differently: machine, versions, commit, settings."""
    from better_attention.bench.machine import differences, identity

    return differences({**identity(machine), **settings}, {**identity(machine_now), **now})


def output(given: Path | None, default: Path, differences: Callable[[Path], list[str]], *, again: bool) -> Path:
    """The folder to write into: never one with rows of other settings, unless ``again`` asks for it.

    Args:
        given: the argument ``--out``.
        default: used without it, with -2, -3, ... appended where it holds rows of other settings.
        differences: how the rows in a folder were measured differently; empty if they were not, or if there are none.

    Raises:
        UserError: ``given`` holds rows of other settings.
    """
    if given is None:
        folders = chain([default], (default.with_name(f"{default.name}-{number}") for number in count(2)))
        # A folder that does not exist has no rows that differ, so that the search ends.
        return next(folder for folder in folders if not differences(folder))
    if not again and (differing_entries := differences(given)):
        raise UserError(
            f"--out {given} holds rows that were measured differently ({'; '.join(differing_entries)}). "
            "Choose another folder, or replace them with --again."
        )
    return given


def say_kept(path: Path, kept: int, planned: int) -> None:
    """Say on stderr how many of the planned rows are in the file already."""
    if kept == planned:
        say(f"{path} is complete: none of its {planned} rows is measured again. To do so: --again, or another --out")
    elif kept:
        say(f"{path} holds {kept} of {planned} rows of the same settings: they are kept and not measured again")


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Treat SIGTERM in the block like Ctrl-C; yields the list of the signals received so far."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield received
        return

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
