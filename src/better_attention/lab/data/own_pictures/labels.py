"""Classes that a table beside the pictures gives, such as ``val_annotations.txt`` or ``labels.csv``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from better_attention.lab.data.own_texts.columns import Columns
from better_attention.lab.data.own_texts.records import quotes_enclose
from better_attention.lab.data.samples import DataError
from better_attention.text import plural

TABLE = re.compile(
    r"(?:.*[_-])?(?:labels?|annotations?|metadata|train|training|test|val|valid|validation|dev)\.(?:csv|tsv|txt)",
    re.IGNORECASE,
)
"""Names of files that may say which picture is of which class."""

KINDS = "a table such as labels.csv, with a column of the pictures' names and one called label"

_COLUMNS = 50  # of a table, that may hold the names
_FIELD = 1 << 16


@dataclass(frozen=True, slots=True)
class Labels:
    """What a table says.

    Args:
        table: its name.
        classes: name of a picture -> its class.
        missing: rows that name no picture.
    """

    table: str
    classes: Mapping[str, str]
    missing: int

    @property
    def note(self) -> str:
        """Where the classes come from, for a report."""
        lost = f"; {plural(self.missing, 'row')} of it without a picture" if self.missing else ""
        return f"classes are from {self.table}{lost}"


def read_labels(table: str, text: str, pictures: Sequence[str]) -> Labels | None:
    """The classes of pictures by the column of a table that names them; None if no column does.

    Args:
        table: its name, for messages.
        text: its contents: separated by commas, semicolons or tabs, with or without names of the columns.
        pictures: their names, with ``/``; a table may leave off the folders and the ending.

    Raises:
        DataError: it is unclear which column holds the classes, or a picture has two.

    >>> read_labels("labels.csv", "id,label\\n1,cat\\n2,dog\\n", ["photos/1.png", "photos/2.png"]).classes
    {'photos/1.png': 'cat', 'photos/2.png': 'dog'}
    """
    rows = _rows(text)
    known = _spellings(pictures)
    width = min(max(map(len, rows), default=0), _COLUMNS)
    hits = [len({row[column] for row in rows if column < len(row)} & known.keys()) for column in range(width)]
    # A column that names fewer than half of the pictures counts as a match by chance.
    if not hits or not max(hits) or 2 * max(hits) < len(pictures):
        return None
    at = hits.index(max(hits))
    header = rows[0] if len(rows[0]) > at and rows[0][at] not in known else None
    label = _label_column(table, header, at, width)
    classes: dict[str, str] = {}
    missing = 0
    for row in rows[header is not None :]:
        name = known.get(row[at]) if len(row) > at else None
        value = row[label] if len(row) > label else ""
        if name is None:
            missing += 1
        elif value and classes.setdefault(name, value) != value:
            raise DataError(
                f"{table} gives the picture {row[at]!r} two classes, {classes[name]!r} and {value!r}. Keep one."
            )
    return Labels(table, classes, missing) if classes else None


def _rows(text: str) -> list[list[str]]:
    """The fields of the rows, spaces around them cut off."""
    lines = [line for line in io.StringIO(text.removeprefix("\ufeff")) if not line.isspace()]
    start = lines[0] if lines else ""
    delimiter = max("\t,;", key=start[:_FIELD].count)
    quoting: Any = csv.QUOTE_MINIMAL if delimiter != "\t" or quotes_enclose(lines) else csv.QUOTE_NONE
    try:
        return [[field.strip() for field in row] for row in csv.reader(lines, delimiter=delimiter, quoting=quoting)]
    except csv.Error:
        # It is no table then, and the next file is asked.
        return []


def _spellings(pictures: Sequence[str]) -> dict[str, str]:
    """How a table may name a picture -> the picture; what could mean two of them means none."""
    names: dict[str, str | None] = {}
    for name in pictures:
        path = PurePosixPath(name)
        below = {name, path.name, *("/".join(path.parts[start:]) for start in range(1, len(path.parts)))}
        for spelling in below | {one.removesuffix(path.suffix) for one in below} | {f"./{one}" for one in below}:
            names[spelling] = name if spelling not in names else None
    return {spelling: name for spelling, name in names.items() if name is not None}


def _label_column(table: str, header: Sequence[str] | None, at: int, width: int) -> int:
    """The column with the classes: by its name, or beside the pictures' names where that leaves no doubt.

    Raises:
        DataError: it leaves one.
    """
    if header is not None:
        label = Columns().of(header)[1]
        if label is not None and header.index(label) != at:
            return header.index(label)
    if width == 2 or (header is None and at + 1 < width):  # as in val_annotations.txt: name, class, box
        return 1 - at if width == 2 else at + 1
    some = ", ".join(repr(name[:40]) for name in (header or ())[:20]) or f"{plural(width, 'column')} without names"
    raise DataError(f"{table} does not say which column holds the classes: it has {some}. Call that column 'label'.")
