"""One process at a time in the folder of a run.

The lock is the system's own (``flock``, on Windows ``msvcrt.locking``) on the file ``.lock``: it ends with the process.
Some network file systems have no such locks. There a marker file, ``.lock.held``, takes its place: it holds the number
of its process and the name of the machine. One that a crash left behind is removed by the next process on the same
machine; on another machine it has to be deleted by hand, which the message says.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import filelock

from better_attention.lab.files import remove_leftovers

MARKER = ".lock.held"
TURN = 120.0  # seconds to wait for another process that writes its results into the same folder
NO_LOCKS = frozenset([errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL])
"""What a file system answers that has no locks."""


@contextmanager
def locked(folder: Path, patience: float = 0.5) -> Iterator[None]:
    """Hold the folder of a run, or of a comparison, for this process; what an earlier crash left there is removed.

    Args:
        folder: made if it is not there.
        patience: seconds for which to try; a listing holds a run for a moment, see :func:`holder`.

    Raises:
        ValueError: another process holds it for longer.
        OSError: the folder cannot be written or locked.
    """
    end = time.monotonic() + patience
    folder.mkdir(parents=True, exist_ok=True)
    with _open(folder, os.O_CREAT) as file, ExitStack() as held:
        while not (acquired := _acquire(folder, file, held)):
            if time.monotonic() > end:
                hint = "" if acquired is False else f" If it no longer runs, delete {folder / MARKER}."
                raise ValueError(taken(folder, _signature(file)) + hint)
            time.sleep(0.05)
        with suppress(OSError):  # a full disk: the lock holds without its signature
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()}".encode("ascii"))
        remove_leftovers(folder)
        yield


def taken(folder: Path, writer: str) -> str:
    """What is said to whoever wants the folder that ``writer`` holds."""
    way_out = "Wait until it ends, stop it, or choose another --out."
    return f"{folder} is being written by another process ({writer}). {way_out}"


def holder(folder: Path) -> str | None:
    """The process that holds the folder of a run, as it signed itself; None if nobody does."""
    try:
        with _open(folder) as file, ExitStack() as held:
            return None if _acquire(folder, file, held) else _signature(file)
    except OSError:  # no such file, or one that cannot be written: on a medium that is only read
        return None


def _open(folder: Path, flags: int = 0) -> IO[bytes]:
    """The lock file, as it is: through a link, signing it would destroy what the link points to."""
    path = folder / ".lock"
    flags |= os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file: delete it and run again", str(path))
    return os.fdopen(handle, "r+b", buffering=0)


def _acquire(folder: Path, file: IO[bytes], held: ExitStack) -> bool | None:
    """Take the lock until ``held`` ends; False if another process has it, None if one has the marker in its place.

    Raises:
        OSError: any reason but these.
    """
    try:
        _lock(file.fileno())
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, f"{error.strerror} (while locking it)", str(folder / ".lock")) from None
    else:
        return True
    marker = filelock.SoftFileLock(folder / MARKER, timeout=0)
    try:
        held.enter_context(marker)
    except filelock.Timeout:
        return None
    return True


def _signature(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(64).decode("ascii", "replace").strip() or "number unknown"


if sys.platform == "win32":
    import msvcrt

    HELD = frozenset([errno.EACCES, errno.EDEADLK])

    def _lock(handle: int) -> None:
        os.lseek(handle, 2**30, os.SEEK_SET)  # beyond the text, which others may read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    HELD = frozenset([errno.EWOULDBLOCK, errno.EAGAIN])

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
