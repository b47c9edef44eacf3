"""One file of labelled texts: which columns hold them, and every row checked, with the line on which it begins."""

from __future__ import annotations

import csv
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from better_attention.lab.data.samples import DataError
from better_attention.text import plural

from .records import (
    DELIMITERS,
    Faults,
    csv_records,
    json_records,
    parquet_columns,
    parquet_records,
    quotes_enclose,
    text_lines,
    whole,
)

TEXT_COLUMNS = (
    *("text", "review", "sentence", "content", "body", "comment", "message", "tweet", "document", "review_text"),
    *("reviewtext", "review_body", "description"),
)
LABEL_COLUMNS = (
    *("label", "class", "stars", "sentiment", "target", "category", "rating", "score", "polarity", "star_rating"),
    *("overall", "labels", "y"),
)
"""What a column may be called, in any case; the first that is there counts."""

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
KINDS = (
    "a .csv, .tsv, .jsonl or .parquet file with a text and a label column (.gz, .bz2, .xz and .zip are read too; "
    "Parquet compresses by itself)"
)

_DECIMAL = re.compile(r"[+-]?[0-9]{1,15}(?:\.[0-9]{0,15})?")
_MISSING = frozenset(("nan", "none", "<na>", "null", "n/a", "na", "nat", "#n/a", "nil", "<null>", "undefined"))
_FIRST = 100  # records among which the columns are looked for
_COMPRESSED = (".gz", ".bz2", ".xz")


_NAMELESS = re.compile(r"\s*(?:unnamed: [0-9]+)?\s*", re.IGNORECASE)
"""What stands for the name of a column without one; pandas reads such a column as ``Unnamed: 0``."""


class NoLabelsError(DataError):
    """A text without a label, or a whole table of them, as a competition's test file is."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold texts and labels: names that the user gave, or "" for the usual ones.

    >>> Columns().of(["id", "Review", "Stars"])
    ('Review', 'Stars')
    """

    text: str = ""
    label: str = ""

    def of(self, names: Sequence[str]) -> tuple[str | None, str | None]:
        """The two columns among ``names``; None for one that is not there."""
        return _find(names, self.text, TEXT_COLUMNS), _find(names, self.label, LABEL_COLUMNS)

    def pick(self, place: str, names: Sequence[str]) -> tuple[str, str]:
        """The two columns among ``names``.

        Raises:
            DataError: one is missing, or not unique; lists the columns that are there.
        """
        text, label = self.of(names)
        some = ", ".join(repr(name[:40]) for name in names[:20]) or "none"
        there = f"It has {some}{', ...' if len(names) > 20 else ''}"
        for kind, column, asked in (("text", text, self.text), ("label", label, self.label)):
            if column is None:
                wanted = f"column {asked!r}" if asked else f"{kind} column"
                first = "" if asked else "; the first line must hold the columns' names"
                fault = NoLabelsError if kind == "label" else DataError
                both = (
                    ". No label column either: name it too, with `--set label_column=NAME`"
                    if kind == "text" and label is None
                    else ""
                )
                raise fault(f"{place} has no {wanted}. {there}: name one with `--set {kind}_column=NAME`{first}{both}.")
            if names.count(column) > 1:
                raise DataError(f"{place} has {names.count(column)} columns {column!r}. {there}: rename all but one.")
        if text == label or text is None or label is None:
            raise DataError(f"{place}: column {text!r} cannot hold the texts and the labels at once. {there}.")
        return text, label


def _find(names: Sequence[str], asked: str, usual: Sequence[str]) -> str | None:
    if asked and asked in names:
        return asked
    # Reversed, so that the first of several equal names is the one that stays.
    folded = {name.strip().casefold(): name for name in reversed(names)}
    return next((folded[name] for name in ((asked.casefold(),) if asked else usual) if name in folded), None)


@dataclass(frozen=True, slots=True)
class Table:
    """One file's rows: its text, its label as text, and the line (of Parquet: the row) on which it begins.

    Of a folder of texts it is the file's name instead, below that folder.

    ``notes``: how the file was read where that is not plain, and what of it was not.
    ``shards``: of a table in several files, the files after the first, each with the number of its first row here.
    """

    path: Path
    unit: str
    columns: tuple[str, str]
    lines: list[int | str]
    texts: list[str]
    labels: list[str]
    shards: tuple[tuple[int, Path], ...] = ()
    notes: list[str] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Where a row is, for messages."""
        path = next((path for first, path in reversed(self.shards) if first <= row), self.path)
        line = self.lines[row]
        return str(path / line) if isinstance(line, str) else f"{path}, {self.unit} {line}"


def format_of(path: Path) -> str | None:
    """``"csv"``, ``"json"`` or ``"parquet"`` by the file's name; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    # Parquet is read from its end, which no compressed stream allows.
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED and suffixes[-2] != ".parquet":
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_table(path: Path, columns: Columns) -> Table:
    """The rows of one file, each with a text and a label.

    Raises:
        DataError: see :func:`better_attention.lab.data.own_texts.read.read`.
    """
    kind = format_of(path)
    if kind is None:
        raise DataError(f"{path} is of no kind that can be read: expected {KINDS}.")
    unit = "row" if kind == "parquet" else "line"
    faults = Faults(unit)
    notes: list[str] = []
    rows = _ROWS[kind](path, columns, faults, notes)
    # The first thing that each reader yields is the names of its two columns.
    names = next(rows, (0, "", ""))[1:]
    table = Table(path, unit, names, [], [], [], notes=notes)
    unlabelled = trimmed = 0
    for line, text, label in rows:
        # Before the checks, whose messages look up the line of the row.
        table.lines.append(line)
        try:
            table.texts.append(_text(text, table, len(table.lines) - 1))
            table.labels.append(_label(label, table, len(table.lines) - 1))
            trimmed += isinstance(label, str) and label != table.labels[-1]
        except DataError as error:
            unlabelled += isinstance(error, NoLabelsError)
            faults.add(line, str(error))
    try:
        faults.check()
    except DataError as error:
        # Where no row has a label the file is a test set without answers, which the caller may leave out.
        raise NoLabelsError(str(error)) if unlabelled == len(table.lines) else error from None
    if trimmed:
        notes.append(f"{path.name}: spaces around {plural(trimmed, 'label')} are cut off")
    if not table.texts:
        raise DataError(f"{path} holds no texts, only the names of its columns: is the file whole?")
    return table


def read_shards(paths: Sequence[Path], columns: Columns) -> Table:
    """The rows of a table that lies in one file or several, one after the other.

    Raises:
        DataError: of a file, or two of them name their columns differently.
    """
    first, *others = (read_table(path, columns) for path in paths)
    shards: list[tuple[int, Path]] = []
    for table in others:
        if (table.columns, table.unit) != (first.columns, first.unit):
            raise DataError(
                f"{first.path} has its texts and labels in {first.columns}, {table.path} in {table.columns}: parts of "
                "one table need the same columns and the same kind of file."
            )
        shards.append((len(first.texts), table.path))
        first.notes.extend(table.notes)
        first.lines.extend(table.lines)
        first.texts.extend(table.texts)
        first.labels.extend(table.labels)
    return replace(first, shards=tuple(shards))


def _csv_rows(path: Path, columns: Columns, faults: Faults, notes: list[str]) -> Iterator[tuple[int, Any, Any]]:
    """The names of the two columns, then line, text and label of each row."""
    with text_lines(path) as source:
        start = list(_until_filled(source))
        delimiter = _delimiter(start[-1] if start else "", columns)
        quoted = True
        if delimiter == "\t":
            # Whether quotes enclose fields shows in the whole file alone, so all of it is read first.
            start.extend(source)
            quoted = quotes_enclose(start)
        if not quoted:
            marked = sum('"' in line for line in start)
            notes.append(f"{path.name}: quotes are read as characters of the texts; {plural(marked, 'line')} hold them")
        records = csv_records(path, itertools.chain(start, source), delimiter, quoted=quoted, faults=faults)
        line, names = next(records, (1, []))
        if not names:
            faults.check()
        text, label = columns.pick(f"{path}, line {line} (separated by {DELIMITERS[delimiter]}s)", names)
        yield line, text, label
        at_text, at_label = names.index(text), names.index(label)
        # A column without a name behind the two may hold the rest of a text that was cut at a separator.
        nameless = [at for at, name in enumerate(names) if at > max(at_text, at_label) and _NAMELESS.fullmatch(name)]
        broken, beyond = [], []
        for line, fields in records:
            if any("\n" in entry for entry in fields):
                broken.append((line, sum(entry.count("\n") for entry in fields) + 1))
            if any(fields[at].strip() for at in nameless):
                beyond.append(line)
            yield line, fields[at_text], fields[at_label]
        if broken:
            longest = max(broken, key=lambda row: row[1])
            notes.append(
                f"{path.name}: {plural(len(broken), 'row')} with line ends between quotes, "
                f"{sum(many for _, many in broken):,} lines together, the longest {longest[1]:,} from line "
                f"{longest[0]:,} on. If these are rows of their own, a quote there is a character: double it, and "
                "enclose its field in quotes"
            )
        if beyond:
            notes.append(
                f"{path.name}: {plural(len(beyond), 'row')} with something in a column without a name, which is not "
                f"read: line {', '.join(map(str, beyond[:10]))}{', ...' if len(beyond) > 10 else ''}"
            )


def _until_filled(source: Iterator[str]) -> Iterator[str]:
    for line in source:
        yield line
        if not line.isspace():
            return


def _delimiter(header: str, columns: Columns) -> str:
    """The separator with which ``header`` has the wanted columns, or else the most columns."""
    # What is too long for a header, or holds a stray carriage return, is for the strict reader to complain of.
    start = header[:100_000].splitlines()[:1]

    def merit(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader(start, delimiter=delimiter), [])
        return sum(column is not None for column in columns.of(names)), len(names)

    # The comma comes first and wins where others are as good.
    return max(DELIMITERS, key=merit)


def _json_rows(path: Path, columns: Columns, faults: Faults, notes: list[str]) -> Iterator[tuple[int, Any, Any]]:
    with text_lines(path) as source:
        records = json_records(path, source, faults)
        start: list[tuple[int, dict[str, Any]]] = []
        for entry in records:  # the first record may lack what the others have
            start.append(entry)
            if None not in columns.of(list(entry[1])) or len(start) == _FIRST:
                break
        if not start:
            return
        names = list(dict.fromkeys(name for _, record in start for name in record))
        text, label = columns.pick(f"{path}, line {start[0][0]}", names)
        yield start[0][0], text, label
        for line, record in itertools.chain(start, records):
            missing = [name for name in (text, label) if name not in record]
            if missing:
                faults.add(line, f"{path}, line {line} has no {missing[0]!r}. Every line needs {text!r} and {label!r}.")
            else:
                yield line, record[text], record[label]


def _parquet_rows(path: Path, columns: Columns, faults: Faults, notes: list[str]) -> Iterator[tuple[int, Any, Any]]:
    text, label = columns.pick(str(path), parquet_columns(path))
    yield 0, text, label
    for row, values in parquet_records(path, (text, label)):
        yield row, *values


_ROWS = {"csv": _csv_rows, "json": _json_rows, "parquet": _parquet_rows}
"""Format -> what gives the names of the two columns, then line (or row), text and label of each record."""


def has_columns(path: Path, columns: Columns) -> bool:
    """Whether a table has a text and a label column; one that cannot be read has none."""
    try:
        return next(_ROWS[format_of(path) or "csv"](path, columns, Faults(), []), None) is not None
    except DataError:
        return False


def near_equal(labels: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of labels that a reader would take for the same: other case, spaces, invisible signs, or number format.

    >>> near_equal(["Cat", "dog", "cat", "0", "0.0", "1"])
    [('0', '0.0'), ('Cat', 'cat')]
    """
    groups: dict[object, list[str]] = {}
    for label in sorted(set(labels)):
        # Case folding can leave the normal form, so it is applied once more.
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
        seen = "".join(sign for sign in folded if unicodedata.category(sign) != "Cf")
        key: object = " ".join(seen.split())
        if _DECIMAL.fullmatch(str(key)):
            key = float(str(key))
        groups.setdefault(key, []).append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def like_missing(labels: Iterable[str]) -> list[str]:
    """The labels that programs write for a missing label.

    >>> like_missing(["good", "nan", "<NA>"])
    ['<NA>', 'nan']
    """
    return sorted(label for label in set(labels) if label.strip().casefold() in _MISSING)


def doubtful(classes: Sequence[str], counts: Mapping[str, int], kind: str) -> tuple[str, ...]:
    """Notes on classes that look like one class, and on those that look like a missing label.

    Args:
        classes: their names.
        counts: class -> how many samples it has.
        kind: what a sample is, ``"text"`` or ``"picture"``.
    """
    notes = []
    alike = near_equal(classes)
    if alike:
        groups = "; ".join(" and ".join(f"{name!a} ({counts[name]:,})" for name in group) for group in alike[:10])
        notes.append(
            f"classes that are nearly the same and are kept apart: {groups}{'; ...' if len(alike) > 10 else ''}. Spell "
            "them alike if they are one class"
        )
    empty = like_missing(classes)
    if empty:
        named = ", ".join(f"{name!r} ({plural(counts[name], kind)})" for name in empty)
        notes.append(f"read as a class, though it may stand for a missing label: {named}")
    return tuple(notes)


def _text(value: object, table: Table, row: int) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{table.place(row)}: the text in column {table.columns[0]!r} is empty. Remove that record.")
    return _plain(value, table, row, "text")


def _label(value: object, table: Table, row: int) -> str:
    """The class's name: numbers without a needless ``.0``, truth values as in JSON."""
    # The last condition is NaN, by which pandas marks a missing value: nothing else differs from itself.
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value):
        raise NoLabelsError(
            f"{table.place(row)}: no label in column {table.columns[1]!r}. Add it, or remove that record."
        )
    # Before int, of which bool is a subclass.
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    name = _plain(value, table, row, "label").strip()
    hidden = next((sign for sign in name if unicodedata.category(sign) == "Cc" and not sign.isspace()), None)
    if hidden:
        raise DataError(
            f"{table.place(row)}: the label {name!a:.40} holds the control character U+{ord(hidden):04X}. "
            "Remove it, or save the file as UTF-8."
        )
    return name


def _plain(value: object, table: Table, row: int, kind: str) -> str:
    """A text that can be written to a file again."""
    if not isinstance(value, str):
        raise DataError(
            f"{table.place(row)}: the {kind} in column {table.columns[kind == 'label']!r} is {value!r:.40} "
            f"({type(value).__name__}); {'a text is' if kind == 'text' else 'texts, numbers and truth values are'} "
            "expected."
        )
    if not whole(value):
        raise DataError(f"{table.place(row)}: the {kind} holds half a character ({value!a:.40}). Correct or remove it.")
    return value
