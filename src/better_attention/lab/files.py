"""Files that are written whole or not at all, files that may be damaged, and text of unknown origin made printable."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_TEXT = 2**28
"""Bytes of the largest JSON file that is read."""

WRITTEN = re.compile(
    r"(?:config|assets|result|results|diverged|ladder|checkpoint-\d{6})\.json|metrics\.jsonl"
    r"|(?:model|checkpoint-\d{6})\.safetensors|(?:results|curves|ladder)\.csv|(?:report|ladder)\.html|manifest\.sha256"
)
"""Names of the files of a run, a comparison and a ladder."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the name ``path`` in one step if the block ends without an error.

    A reader sees the old file or the new one, never a part. The bytes go to a file in the same folder and reach the
    disk before the name does. A crash may leave that file behind; :func:`remove_leftovers` recognises it.

    Args:
        path: the file; its folder exists.

    Raises:
        OSError: it cannot be written. The previous file at ``path`` is still there.
    """
    # In the same folder, because a rename replaces a file in one step only within one file system. The name is cut,
    # because most file systems allow 255 bytes.
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            # Without it a file system may store the new name before the bytes, and a power failure leaves an empty
            # file.
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it readable to nobody else
        temporary.replace(path)
        sync_folder(path.parent)
    # Ctrl-C must not leave the temporary file behind either.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, content: bytes | str, *, make_folder: bool = True) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` as :func:`replacing` does.

    Args:
        path: the file.
        content: all of it.
        make_folder: create the folder of ``path`` if it does not exist; otherwise that is an error.

    Raises:
        OSError: it cannot be written, the disk is full for example; names the path and the bytes needed. The previous
            file at ``path`` is still there.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        way_out = "; free some space and run again" if error.errno in _FULL else ""
        why = f"{error.strerror} (while writing {len(data):,} bytes{way_out})"
        raise OSError(error.errno, why, str(path)) from error


def remove_leftovers(folder: Path, names: re.Pattern[str] = WRITTEN) -> None:
    """Remove the files ``.NAME.XXXXXXXX.tmp`` that a crash within :func:`replacing` left behind.

    Call it only while no other process can be writing one of these files, that is, while holding the folder's lock.

    Args:
        folder: where they lie; subfolders are not searched.
        names: pattern of the names of the files that are written there.
    """
    with os.scandir(folder) as entries:
        # Collected first: whether a scan lists files of a folder that changes meanwhile is undefined.
        left = [entry for entry in entries if (m := _TEMPORARY.fullmatch(entry.name)) and names.fullmatch(m[1])]
    for entry in left:
        if entry.is_file(follow_symlinks=False):
            Path(entry.path).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system lets a folder be opened."""
    # Windows cannot open a folder.
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; refuse everything that would block or never end.

    Raises:
        ValueError: a FIFO, a device, a socket or a directory.
        OSError: it does not exist or cannot be read.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode):  # before opening it, because opening some devices has an effect
        raise ValueError(f"{path} is {_kind(mode)}, not a regular file.")
    # O_NONBLOCK: without it, opening a FIFO waits for somebody who writes to it.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):  # replaced in between
        os.close(handle)
        raise ValueError(f"{path} is {_kind(mode)}, not a regular file.")
    return BufferedReader(FileIO(handle, "rb"))


def read_regular(path: Path, limit: int = LARGEST_TEXT) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: see :func:`open_regular`; or the file has more than ``limit`` bytes.
        OSError: it does not exist or cannot be read.
    """
    with open_regular(path) as file:
        # One byte beyond the limit shows that the file is too large, however it has grown since it was opened.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes.")
    return content


def same_file(file: BinaryIO, path: Path) -> bool:
    """Whether the open ``file`` is the one that has the name ``path`` now: not deleted, moved or replaced since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def digest(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal.

    Raises:
        ValueError, OSError: see :func:`open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON document, parsed strictly: every number is finite and every integer fits 64 bits.

    Raises:
        ValueError: not JSON, a number out of range, or nested too deeply.
    """
    try:
        # Python's parser would accept NaN and Infinity and turn 1e400 into infinity.
        return json.loads(content, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plain(text: object, limit: int = 2000) -> str:
    """``text`` in a form that is safe to show on a screen, in a table or on a page.

    Tabs and line ends become spaces. Control characters (also the one that begins an escape sequence), unpaired
    surrogates and characters that change the direction of writing are dropped. Long text is cut.

    >>> plain("a\\x1b[31mb\\nc"), plain("x" * 5000, limit=3)
    ('a[31mb c', 'xxx… (5,000 characters)')
    """
    whole = str(text)
    spaced = "".join(" " if c in "\t\n\r\v\f\u2028\u2029" else c for c in whole[:limit])
    short = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cs") and c not in _DIRECTION_MARKS)
    return short if len(whole) <= limit else f"{short}… ({len(whole):,} characters)"


_TEMPORARY = re.compile(r"\.(.{1,64})\.[a-z0-9_]{8}\.tmp", flags=re.DOTALL)  # as tempfile.mkstemp names it
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIRECTION_MARKS = frozenset(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]))


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _integer(text: str) -> int:
    # 20 characters hold every 64-bit integer. int() of a longer text takes time that grows with its square.
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"{text[:40]} is an integer beyond 64 bits")
    return value


def _umask() -> int:
    umask = os.umask(0)  # there is no way to read it but to set it
    os.umask(umask)
    return umask
