"""Records out of files that anybody may have written, each with the line it begins on: CSV, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from better_attention.errors import counted

from .archives import MIB, Readable, decompressed
from .containers import DataError

DELIMITERS: Mapping[str, str] = {",": "comma", ";": "semicolon", "\t": "tab"}

_LIMIT = 4096 * MIB  # bytes of a file, decompressed: all of it will lie in memory
_FIELD = 64 * MIB  # characters of one field; Python's own limit, 131,072, cuts off long documents
_CHUNK = MIB // 4


@contextmanager
def text_lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a UTF-8 text file, which may be compressed (gzip, bzip2, xz); see :func:`lines`.

    Raises:
        DataError: no such file, an empty one, or one that holds more than 4 GiB.
    """
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


def csv_records(path: Path | str, source: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file: line on which it begins, and fields. Quoted fields may hold anything, line ends too.

    Args:
        path: what the messages call it.
        source: its lines, line ends kept.
        delimiter: a key of ``DELIMITERS``.

    Raises:
        DataError: wrong quoting, or a record of another number of fields than the first; says on which line.

    >>> list(csv_records("a.csv", ["text,label\\n", '"two\\n', 'lines",1\\n', "one,2\\n"]))
    [(1, ['text', 'label']), (2, ['two\\nlines', '1']), (4, ['one', '2'])]
    """
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    width = first = 0
    with _long_fields():
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = "a carriage return outside quotes" if "new-line" in str(error) else error
                raise DataError(
                    f"{path}: the record that begins on line {line} is no CSV ({why}). Put a field that holds a "
                    f'{DELIMITERS[delimiter]}, a quote or a line end between quotes ("...") and double the quotes '
                    'within it ("").'
                ) from None
            if not fields:  # an empty line
                continue
            width, first = width or len(fields), first or line
            if len(fields) != width:
                raise DataError(
                    f"{path}, line {line} has {counted(len(fields), 'field')}, line {first} has {width} (separated by "
                    f"{DELIMITERS[delimiter]}s). Put a field that holds a {DELIMITERS[delimiter]} between quotes."
                )
            yield line, fields


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def json_records(path: Path | str, source: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file with one JSON object a line: line and object. Empty lines are skipped.

    Raises:
        DataError: a line is not JSON, or no object; says which.

    >>> list(json_records("a.jsonl", ['{"text": "fine", "stars": 4}\\n']))
    [(1, {'text': 'fine', 'stars': 4})]
    """
    for number, line in enumerate(source, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            where = f" in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{path}, line {number} is not JSON{where} ({getattr(error, 'msg', error)}). Write one object a line, "
                'such as {"text": "...", "label": "..."}.'
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f'{path}, line {number} is JSON, but no object. Write one a line, such as {{"text": "...", "label": '
                '"..."}.'
            )
        yield number, record


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
    with _parquet(path) as file:
        groups = range(file.metadata.num_row_groups)
        size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        if size > _LIMIT:
            raise DataError(f"{path} holds {size:,} bytes; at most {_LIMIT:,} are read into memory. Take a part of it.")
        number = 0
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
            values = [batch.column(name).to_pylist() for name in columns]
            for row in zip(*values, strict=True):
                number += 1
                yield number, row


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
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
        with pq.ParquetFile(path) as file:
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
