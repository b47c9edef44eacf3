"""One process at a time in the folder of a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(folder: Path, patience: float = 0.5) -> Iterator[None]:
    """Hold the folder of a run, or of a comparison, for this process; the system lets go of it when the process ends.

    Args:
        folder: made if it is not there.
        patience: seconds for which to try; a listing holds a run for a moment, see :func:`holder`.

    Raises:
        ValueError: another process holds it for longer.
    """
    end = time.monotonic() + patience
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="ascii") as file:
        while True:
            try:
                _lock(file.fileno())
                break
            except OSError:
                if time.monotonic() > end:
                    raise ValueError(taken(folder, _signature(file))) from None
                time.sleep(0.05)
        with suppress(OSError):  # a full disk: the lock holds without its signature
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()}".encode("ascii"))
        yield


def taken(folder: Path, writer: str) -> str:
    """What is said to whoever wants the folder that ``writer`` holds."""
    way_out = "Wait until it ends, stop it, or choose another --out."
    return f"{folder} is being written by another process ({writer}). {way_out}"


def holder(folder: Path) -> str | None:
    """The process that holds the folder of a run, as it signed itself; None if nobody does."""
    try:
        with (folder / ".lock").open("r+", encoding="ascii") as file:
            try:
                _lock(file.fileno())
            except OSError:
                return _signature(file)
    except OSError:  # no such file, or one that cannot be written: on a medium that is only read
        return None
    return None


def _signature(file: TextIO) -> str:
    file.seek(0)
    return file.read(64).strip() or "number unknown"


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 2**30, os.SEEK_SET)  # beyond the text, which others may read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
