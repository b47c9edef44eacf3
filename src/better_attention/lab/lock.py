"""One writer at a time in the folder of a run or of a comparison.

The lock is the operating system's own (:func:`filelock.lock_descriptor`) on the file ``.lock``: it ends with the
process that holds it, so a crash leaves no stale lock. The holder signs the file, so that others can say who it is.
Some network file systems have no such locks. There a marker file, ``.lock.held``, takes its place
(:class:`filelock.SoftFileLock`). It names its process and its machine; a marker that a crash left behind is removed by
the next process on the same machine. On another machine it has to be deleted by hand, which the message says.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import filelock

from better_attention.lab.files import remove_leftovers

MARKER = ".lock.held"
RESULTS_LOCK_SECONDS = 120.0
"""How long to wait for another process that writes its results into the same folder."""
NO_LOCKS = frozenset([errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL])
"""Error numbers of file systems that have no locks."""


@contextmanager
def locked(folder: Path, patience: float = 0.5) -> Iterator[None]:
    """Hold a folder for this process while the block runs, and remove what an earlier crash left in it.

    Args:
        folder: the folder of a run or of a comparison; created if it does not exist.
        patience: seconds for which to try. A listing holds the lock of a run for a moment, see :func:`holder`.

    Raises:
        ValueError: another process holds the folder for longer than ``patience``.
        OSError: the folder cannot be written or locked.
    """
    end = time.monotonic() + patience
    folder.mkdir(parents=True, exist_ok=True)
    with _open(folder, os.O_CREAT) as file, ExitStack() as held:
        while not (acquired := _acquire(folder, file, held)):
            if time.monotonic() > end:
                # None means that the marker file is in the way, which a crash on another machine may have left behind.
                hint = "" if acquired is False else f" If it no longer runs, delete {folder / MARKER}."
                raise ValueError(in_use_message(folder, _signature(file)) + hint)
            time.sleep(0.05)
        # Written into the file and not by replacing it, because the lock is on this very file.
        with suppress(OSError):  # on a full disk the lock holds without its signature
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()}".encode("ascii"))
        # With the lock held, what lies there can only be of a process that has ended.
        remove_leftovers(folder)
        yield


def in_use_message(folder: Path, writer: str) -> str:
    """The message for a command that needs a folder which the process ``writer`` holds."""
    way_out = "Wait until it ends, stop it, or choose another --out."
    return f"{folder} is being written by another process ({writer}). {way_out}"


def holder(folder: Path) -> str | None:
    """The process that holds a folder, as it signed the lock file; None if no process does."""
    try:
        with _open(folder) as file, ExitStack() as held:
            return None if _acquire(folder, file, held) else _signature(file)
    except OSError:  # there is no lock file, or it lies on a medium that cannot be written
        return None


def _open(folder: Path, flags: int = 0) -> IO[bytes]:
    """Open the lock file itself, never the target of a link: writing the signature there would destroy it."""
    path = folder / ".lock"
    flags |= os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file: delete it and run again", str(path))
    # Unbuffered, since the signature is written past this object, by its descriptor.
    return os.fdopen(handle, "r+b", buffering=0)


def _acquire(folder: Path, file: IO[bytes], held: ExitStack) -> bool | None:
    """Take the lock until ``held`` closes; False if another process has it, None if one has the marker instead.

    Raises:
        OSError: the file cannot be locked for any other reason.
    """
    try:
        return filelock.lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, f"{error.strerror} (while locking it)", str(folder / ".lock")) from None
    try:
        held.enter_context(filelock.SoftFileLock(folder / MARKER, timeout=0))
    except filelock.Timeout:
        return None
    return True


def _signature(file: IO[bytes]) -> str:
    """The text by which the holder of the lock identifies itself."""
    text = ""
    with suppress(OSError):  # on Windows the system does not let others read what is locked
        file.seek(0)
        text = file.read(64).decode("ascii", "replace").strip()
    return text or "number unknown"
