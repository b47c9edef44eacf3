"""Records out of files that anybody may have written, each with the line it begins on: CSV, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from better_attention.lab.data.archives import MIB, Readable, decompressed
from better_attention.lab.data.samples import DataError
from better_attention.lab.data.zipped_tables import archive_of, opened
from better_attention.text import plural

DELIMITERS: Mapping[str, str] = {",": "comma", ";": "semicolon", "\t": "tab"}

_LIMIT = 4096 * MIB  # bytes of a file, decompressed: all of it will lie in memory
_FIELD = 64 * MIB  # characters of one field; Python's own limit, 131,072, cuts off long documents
_CHUNK = MIB // 4
_BATCH = 1024  # rows of a Parquet file that are decoded at once
_ROW = 64  # bytes that a row takes in memory at least, whatever it holds
_CONVINCING = 10  # records within quotes per line that is not a record: such quotes enclose no field
_ENCLOSED = re.compile(r'"(?:[^"]|"")*+"')


@dataclass
class Faults:
    """What is wrong with the records of one file, so that all of it is said at once.

    Args:
        unit: what a record's number counts, ``"line"`` or ``"row"``; ``"file"``: records are files, and have names.
    """

    unit: str = "line"
    found: list[tuple[Any, str]] = field(default_factory=list)

    def add(self, number: int | str, message: str) -> None:
        """Note what is wrong with record ``number``, or the file of that name."""
        self.found.append((number, message))

    def check(self) -> None:
        """Raise if anything was noted: the first message, the next ten numbers, and how many there are.

        Raises:
            DataError: at least one record is faulty.
        """
        if not self.found:
            return
        (_, message), *others = sorted(self.found, key=lambda fault: fault[0])
        if others:
            numbers = ", ".join(str(number) for number, _ in others[:10]) + (", ..." if len(others) > 10 else "")
            message += f" Likewise {plural(len(others), f'more {self.unit}')}: {numbers}."
        raise DataError(message)


@contextmanager
def text_lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a UTF-8 text file, which may be compressed (gzip, bzip2, xz) or in a .zip; see :func:`lines`.

    Raises:
        DataError: no such file, an empty one, or one that holds more than 4 GiB.
    """
    archive = archive_of(path)
    if archive is not None:
        with opened(archive, path, _LIMIT) as member:
            yield lines(path, member)
    else:
        with decompressed(path, limit=_LIMIT, plain=True) as stream:
            yield lines(path, stream)


def lines(path: Path | str, stream: Readable) -> Iterator[str]:
    """The lines of ``stream``, line ends kept, a byte order mark at the beginning dropped.

    Args:
        path: what the messages call it.
        stream: UTF-8 text.

    Raises:
        DataError: a line is not UTF-8; says which.
    """
    # A binary file is cut at line feeds alone; splitlines() would also cut at separators within a text.
    for number, data in enumerate(io.BufferedReader(_Raw(stream), _CHUNK), start=1):
        line = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not UTF-8 text (byte {line[error.start]:#04x} at position {error.start}). "
                "Save the file as UTF-8."
            ) from None
        yield text


class _Raw(io.RawIOBase):
    """A :class:`Readable` in the form that Python's buffered files want, which cut lines quickly."""

    def __init__(self, stream: Readable) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` as far as one read goes."""
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def csv_records(
    path: Path | str,
    source: Iterable[str],
    delimiter: str = ",",
    *,
    quoted: bool = True,
    faults: Faults | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file: line on which it begins, and fields. Quoted fields may hold anything, line ends too.

    Empty fields beyond those of the first record are dropped: spreadsheets write them.

    Args:
        path: what the messages call it.
        source: its lines, line ends kept.
        delimiter: a key of ``DELIMITERS``.
        quoted: whether quotes enclose fields; otherwise they are characters like others.
        faults: takes what is wrong with a record, which is then left out; None: it is raised.

    Raises:
        DataError: wrong quoting, or a record of another number of fields than the first; says on which line.

    >>> list(csv_records("a.csv", ["text,label\\n", '"two\\n', 'lines",1\\n', "one,2\\n"]))
    [(1, ['text', 'label']), (2, ['two\\nlines', '1']), (4, ['one', '2'])]
    """
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    # strict: otherwise a misplaced quote is read leniently, and the records up to the next one become one field.
    reader = csv.reader(source, delimiter=delimiter, strict=True, quoting=quoting)
    width = first = 0
    with _long_fields():
        while True:
            # Noted before reading, because a quoted field may take the reader over several lines.
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = "a carriage return outside quotes" if "new-line" in str(error) else error
                message = (
                    f"{path}: the record that begins on line {line} is no CSV ({why}). Put a field that holds a "
                    f'{DELIMITERS[delimiter]}, a quote or a line end between quotes ("...") and double the quotes '
                    'within it ("").'
                )
                if faults is None:
                    raise DataError(message) from None
                faults.add(line, message)  # where the next record begins is unknown
                return
            if not fields:  # an empty line
                continue
            width, first = width or len(fields), first or line
            if len(fields) > width and not any(map(str.strip, fields[width:])):
                del fields[width:]
            if len(fields) != width:
                message = (
                    f"{path}, line {line} has {plural(len(fields), 'field')}, line {first} has {width} (separated by "
                    f"{DELIMITERS[delimiter]}s). "
                )
                message += (
                    f"Put a field that holds a {DELIMITERS[delimiter]} between quotes."
                    if quoted
                    else f"Remove the record, or correct its {DELIMITERS[delimiter]}s; quotes are characters here."
                )
                if faults is None:
                    raise DataError(message)
                faults.add(line, message)
                continue
            yield line, fields


def quotes_enclose(lines: Sequence[str]) -> bool:
    """Whether quotes enclose the fields of a tab-separated file, rather than being characters of its texts.

    They are characters (GLUE, Common Voice) if a field has quotes that do not enclose it, and each line is a record by
    itself, divided and ended as the first is: one quote of an utterance may open on one line and close on another, and
    a reader of CSV would take the records between for one field. A few lines that are no records change nothing where
    many more would disappear so.

    >>> quotes_enclose(['text\\tlabel\\n', '"so\\t1\\n', 'good"\\t2\\n'])
    False
    >>> quotes_enclose(['text\\tlabel\\n', '"so ""good"" it is"\\t1\\n'])
    True
    """
    width = others = swallowed = 0
    ending = ""
    enclosed, inside = True, False
    for line in lines:
        fields = line.rstrip("\r\n").split("\t")
        if fields == [""]:
            continue
        width, ending = width or len(fields), ending or line[len(line.rstrip("\r\n")) :]
        record = len(fields) >= width and not any(map(str.strip, fields[width:]))
        record = record and (line.endswith(ending) or line is lines[-1])
        before = inside
        for entry in fields:
            if '"' not in entry or (not inside and _ENCLOSED.fullmatch(entry)):
                continue
            enclosed = False
            if inside or entry.startswith('"'):
                # An odd number of quotes opens a field or closes it.
                inside ^= entry.count('"') % 2 == 1
        others += not record
        swallowed += before and inside and record
    return enclosed or (others > 0 and swallowed <= _CONVINCING * others)


@contextmanager
def _long_fields() -> Iterator[None]:
    # A setting of the whole process, so it is set back.
    before = csv.field_size_limit(_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def json_records(
    path: Path | str, source: Iterable[str], faults: Faults | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file with one JSON object a line: line and object. Empty lines are skipped.

    Args:
        path: what the messages call it.
        source: its lines.
        faults: takes what is wrong with a line, which is then left out; None: it is raised.

    Raises:
        DataError: a line is not JSON, or no object; says which.

    >>> list(json_records("a.jsonl", ['{"text": "fine", "stars": 4}\\n']))
    [(1, {'text': 'fine', 'stars': 4})]
    """
    for number, line in enumerate(source, start=1):
        if line.isspace():
            continue
        record: Any = None
        message = ""
        try:
            record = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            where = f" in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            message = (
                f"{path}, line {number} is not JSON{where} ({getattr(error, 'msg', error)}). Write one object a line, "
                'such as {"text": "...", "label": "..."}.'
            )
        if not message and not isinstance(record, dict):
            message = (
                f'{path}, line {number} is JSON, but no object. Write one a line, such as {{"text": "...", "label": '
                '"..."}.'
            )
        if not message:
            yield number, record
        elif faults is None:
            raise DataError(message)
        else:
            faults.add(number, message)


def parquet_columns(path: Path) -> list[str]:
    """The names of a Parquet file's columns.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The rows of a Parquet file: number, from 1, and the values of ``columns``.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or it holds more than 4 GiB.
    """
    with _parquet(path, columns) as file:
        groups = range(file.metadata.num_row_groups)
        # What the file says of itself, before anything is decompressed. It may say less than it holds, hence the count
        # below.
        size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        if size > _LIMIT:
            raise DataError(f"{path} holds {size:,} bytes; at most {_LIMIT:,} are read into memory. Take a part of it.")
        rows = file.metadata.num_rows
        if rows * _ROW > _LIMIT:
            raise DataError(f"{path} holds {rows:,} rows; at most {_LIMIT // _ROW:,} are read. Take a part of it.")
        number = total = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(dict.fromkeys(columns))):
            values = []
            for name in columns:
                column = batch.column(name)
                total += _expanded(column)
                if total > _LIMIT:
                    raise DataError(
                        f"{path} expands to more than {_LIMIT:,} bytes, from row {number + 1:,} on. Take a part of it."
                    )
                values.append(_plain_values(column))
            for row in zip(*values, strict=True):
                number += 1
                yield number, row


def _expanded(column: Any) -> int:
    """Bytes of a column's values, each plural as often as it occurs."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    if not pa.types.is_string(column.type.value_type):
        return int(column.indices.nbytes)
    lengths = pc.binary_length(column.dictionary)
    return int(pc.sum(pc.cast(lengths.take(column.indices), pa.int64())).as_py() or 0)


def _plain_values(column: Any) -> list[Any]:
    """A column's values as Python objects; equal values of a dictionary are one object."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    values = column.dictionary.to_pylist()
    return [None if index is None else values[index] for index in column.indices.to_pylist()]


@contextmanager
def _parquet(path: Path, shared: Sequence[str] = ()) -> Iterator[Any]:
    """The open file. Texts of the columns ``shared`` stay in dictionaries: a short file may repeat a long text."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow. `pip install 'better-attention[parquet]'` brings it; CSV and JSON "
            "lines need nothing."
        ) from None
    if not path.is_file():
        raise DataError(f"{path} is not a file.")
    try:
        with pq.ParquetFile(path, read_dictionary=list(dict.fromkeys(shared)) or None) as file:
            yield file
    except DataError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no Parquet file, or a damaged one ({error}). Write it again.") from None


def whole(text: str) -> bool:
    """Whether ``text`` can be written to a file: JSON's ``\\ud83d`` alone is half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
