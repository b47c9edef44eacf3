"""Writing files whole or not at all, and text of unknown origin made harmless to print."""

from __future__ import annotations

import errno
import os
import tempfile
import unicodedata
from pathlib import Path


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` so that a reader sees the old file or the new one, never a part.

    The bytes go to a new file in the same folder, reach the disk, and take the name ``path`` in one step. Folders that
    are missing are made.

    Raises:
        OSError: it cannot be written, the disk is full for example; names the path and the bytes needed. What stood at
            ``path`` before is still there.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it readable to nobody else
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        way_out = "; free some space and run again" if error.errno in _FULL else ""
        why = f"{error.strerror} (while writing {len(data):,} bytes{way_out})"
        raise OSError(error.errno, why, str(path)) from error


def plain(text: object, limit: int = 2000) -> str:
    """``text`` on its way to a screen, a table or a page: no control character, no odd direction mark, not too long.

    Tabs and line ends become spaces; escape sequences lose their escape character, lone surrogates and characters that
    turn the direction of writing are dropped.

    >>> plain("a\\x1b[31mb\\nc"), plain("x" * 5000, limit=3)
    ('a[31mb c', 'xxx… (5,000 characters)')
    """
    whole = str(text)
    spaced = "".join(" " if c in "\t\n\r\v\f\u2028\u2029" else c for c in whole[:limit])
    short = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cs") and c not in _DIRECTION_MARKS)
    return short if len(whole) <= limit else f"{short}… ({len(whole):,} characters)"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIRECTION_MARKS = frozenset(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]))


def _umask() -> int:
    umask = os.umask(0)  # there is no way to read it but to set it
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    """Make the new name durable too, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
