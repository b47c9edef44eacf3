"""Tables in a .zip archive, as people download them, read from within it.

A table there has the path of the archive and its own name behind it: ``archive.zip/IMDB Dataset.csv``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .archives import Readable, zip_streams
from .samples import DataError

READ = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
"""What a table in an archive may end in: what is read from the beginning to the end."""


def is_zip(place: Path) -> bool:
    """Whether ``place`` is a .zip archive, by its name."""
    return place.suffix.lower() == ".zip" and place.is_file()


def zipped_tables(archive: Path) -> list[Path]:
    """The tables in an archive: those of the uppermost folder that has any; none where there are none.

    Raises:
        DataError: a damaged or unsafe archive.
    """
    names: list[str] = []
    # A pattern that matches no name, so that every member is reported and none is unpacked.
    nothing = re.compile(r"(?!)")
    for _ in zip_streams(archive, nothing, member_limit=0, skipped=names.append):
        pass
    found = [PurePosixPath(name) for name in names if _is_table(PurePosixPath(name))]
    top = min((table.parent for table in found), key=lambda folder: (len(folder.parts), str(folder)), default=None)
    return [archive / table for table in found if table.parent == top]


def _is_table(name: PurePosixPath) -> bool:
    # macOS adds the folder __MACOSX, whose files have the names of the others behind "._" but hold no text.
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return name.suffix.lower() in READ and not hidden


def archive_of(table: Path) -> Path | None:
    """The archive that a table lies in; None if it is a file of its own."""
    return next((folder for folder in table.parents if is_zip(folder)), None)


@contextmanager
def opened(archive: Path, table: Path, limit: int) -> Iterator[Readable]:
    """The contents of a table that :func:`zipped_tables` found.

    Args:
        limit: the most bytes that may come out.

    Raises:
        DataError: a damaged or unsafe archive, or one that has no such table any more.
    """
    name = re.compile(re.escape(table.relative_to(archive).as_posix()))
    for _, stream in zip_streams(archive, name, member_limit=limit):
        yield stream
        return
    raise DataError(f"{archive} holds no {table.relative_to(archive)}.")
