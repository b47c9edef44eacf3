"""Decoded pictures on the disk: a set of pictures is decoded once, and mapped into memory from then on.

``HOME/pictures/KEY.npy`` holds the pixels of one set at one size, ``KEY.json`` what else took long to find out. Both
appear whole or not at all, and may be deleted at any time: they are made again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from better_attention.lab.data.home import NoHome, home
from better_attention.lab.data.samples import DataError, UInt8
from better_attention.lab.files import remove_leftovers, replacing

from .decode import quiet, read_picture

IN_MEMORY = 2 << 30
"""Bytes up to which the pixels are read into memory; larger sets stay on the disk and are mapped."""

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""What the system says where no file can be made, whatever room there is."""

_BATCH = 256  # pictures that are in flight at a time
_TOLD = 10  # bad pictures that one message names

LEAVE_OUT = "`--set damaged=leave-out` leaves out and counts what cannot be read"
"""What a message about damaged pictures advises to do."""

Contents = Iterable[tuple[int, str, bytes | Path]]
"""Row, name and file or file's contents of every picture, in any order."""


class NotWritable(DataError):  # noqa: N818 - smaller sets do without
    """The folder of the decoded pictures may not be written."""


def folder() -> Path:
    """Where decoded pictures lie.

    Raises:
        NoHome: the user has no folder for them.
    """
    return home() / "pictures"


def held() -> tuple[int, int]:
    """How many decoded sets lie there, and their bytes."""
    try:
        sizes = [path.stat().st_size for path in folder().glob("*.npy")]
    except NoHome:
        return 0, 0
    return len(sizes), sum(sizes)


def clear() -> tuple[int, int]:
    """Remove every decoded set; returns how many there were, and their bytes."""
    removed = held()
    for path in (*folder().glob("*.npy"), *folder().glob("*.json")):
        path.unlink(missing_ok=True)
    return removed


def decoded(
    key: str,
    rows: int,
    contents: Callable[[], Contents],
    size: int,
    channels: int,
    in_memory: int = IN_MEMORY,
) -> UInt8:
    """The pixels of a set of pictures, from the cache, or decoded now, on all cores.

    Threads do it, not processes: Pillow decodes and scales outside Python's lock, and nothing has to be imported again
    by a process of its own.

    Args:
        key: names the set, its order, ``size`` and ``channels``: equal keys, equal pixels.
        rows: how many pictures there are.
        contents: gives them, each row once.
        size, channels: see :func:`~better_attention.lab.data.own_pictures.decode.read_picture`.
        in_memory: bytes up to which the pixels are read into memory.

    Returns:
        uint8 ``(rows, size, size)`` or ``(rows, size, size, 3)``; above ``in_memory`` bytes a view of the file, whose
        pages are read as they are needed. Writing to it changes memory alone.

    Raises:
        DataError: pictures that cannot be decoded, all of them named up to ten; no room on the disk; a folder that
            may not be written, or none at all, for more than ``in_memory`` bytes.
    """
    shape = (rows, size, size) if channels == 1 else (rows, size, size, channels)
    try:
        path = folder() / f"{key}.npy"
        array = _mapped(path, shape)
        if array is None:
            with _alone(path, f".{path.name}.lock"):
                array = _mapped(path, shape)  # another process may have made it while this one waited
                if array is None:
                    _write(path, shape, contents())
                    array = np.lib.format.open_memmap(path, mode="c")
    except (NoHome, NotWritable):
        if int(np.prod(shape)) > in_memory:
            raise
        pixels = np.empty(shape, np.uint8)  # decoded again every time, but decoded
        for row, picture in _pictures(shape, contents()):
            pixels[row] = picture
        return pixels
    return np.array(array) if array.nbytes <= in_memory else array


def remembered(key: str, find: Callable[[], Any]) -> Any:
    """What ``find`` gives, a plain JSON value, from the cache if it was asked under ``key`` before."""
    try:
        path = folder() / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8"))
    except NoHome:
        return find()
    except (OSError, ValueError, RecursionError):
        value = find()
    with suppress(NotWritable), _alone(path, ".json.lock"), replacing(path) as file:
        file.write(json.dumps(value).encode())
    return value


def _mapped(path: Path, shape: tuple[int, ...]) -> UInt8 | None:
    """The cached array, copied where it is written to; None if it is missing or has another shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


def _write(path: Path, shape: tuple[int, ...], contents: Contents) -> None:
    """Decode all pictures into a new file. Written, not mapped: a full disk is then an error and not a crash."""
    each = int(np.prod(shape[1:]))
    # Before decoding, which may take many minutes.
    free = shutil.disk_usage(path.parent).free
    if each * shape[0] > free:
        raise DataError(
            f"the decoded pictures take {each * shape[0]:,} bytes; {path.parent} has {free:,} free. Make room, take a "
            "smaller picture size, or let XDG_CACHE_HOME name another disk."
        )
    with replacing(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for row, picture in _pictures(shape, contents):
            # Pictures come in the order of an archive, which is not that of the rows.
            file.seek(start + row * each)
            file.write(picture.tobytes())


def _pictures(shape: tuple[int, ...], contents: Contents) -> Iterator[tuple[int, UInt8]]:
    """Row and pixels of every picture, decoded on all cores.

    Raises:
        DataError: at the end, pictures that cannot be decoded, or too few of them.
    """
    size, channels = shape[1], 3 if len(shape) == 4 else 1
    bad: list[str] = []
    done = 0
    for row, picture in _attempts(contents, size, channels):
        if isinstance(picture, DataError):
            bad.append(str(picture))
            continue
        done += 1
        yield row, picture
    if bad:
        rest = f"\n... and {len(bad) - _TOLD:,} more." if len(bad) > _TOLD else ""
        raise DataError("\n".join(bad[:_TOLD]) + rest + f" To do without {'them' if bad[1:] else 'it'}: {LEAVE_OUT}.")
    if done != shape[0]:
        raise DataError(f"{shape[0] - done:,} pictures were gone before they were read: the data changed. Try again.")


def unreadable(contents: Contents, size: int, channels: int) -> list[tuple[int, str]]:
    """Row and what is wrong of every picture that cannot be decoded, by row."""
    attempts = _attempts(contents, size, channels)
    return sorted((row, str(picture)) for row, picture in attempts if isinstance(picture, DataError))


def _attempts(contents: Contents, size: int, channels: int) -> Iterator[tuple[int, UInt8 | DataError]]:
    """Row and pixels of every picture, or what is wrong with it, decoded on all cores."""
    with ThreadPoolExecutor(_workers()) as pool, quiet():
        waiting = _readable(contents)
        # Batches bound the number of undecoded files that lie in memory at once.
        while batch := list(islice(waiting, _BATCH)):
            pictures = pool.map(lambda entry: _attempt(entry[1], entry[2], size, channels), batch)
            for (row, _, _), picture in zip(batch, pictures, strict=True):
                yield row, picture


def _readable(contents: Contents) -> Iterator[tuple[int, str, bytes | Path]]:
    """The contents; what cannot be read of the user's files is no fault of the cache."""
    try:
        yield from contents
    except OSError as error:
        raise DataError(f"{error.filename or 'a picture'} cannot be read ({error.strerror or error}).") from None


def _attempt(name: str, source: bytes | Path, size: int, channels: int) -> UInt8 | DataError:
    """A picture, or what is wrong with it: a set with one bad picture often has more, and all are to be named."""
    try:
        return read_picture(name, source, size, channels)
    except DataError as error:
        return error


def _workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _alone(path: Path, lock: str) -> Iterator[None]:
    """One process at a time makes ``path``, others wait; what the disk says becomes an error with a way out.

    Raises:
        NotWritable: the folder is not writable.
        DataError: no room, for example.
    """
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(lock)):
            remove_leftovers(path.parent, re.compile(re.escape(path.name)))  # of a process that was killed
            yield
    except OSError as error:
        kind = NotWritable if error.errno in _REFUSED else DataError
        raise kind(
            f"cannot write {path}: {error.strerror or error}. Make room, or let XDG_CACHE_HOME name another disk."
        ) from None
