"""Pictures in the rows of Parquet files, as data sets are published on hubs: a column of files, and one of classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from better_attention.lab.data.archives import MIB
from better_attention.lab.data.own_texts.columns import Columns
from better_attention.lab.data.samples import DataError

_RATIO = 100  # as of archives: pictures are compressed already
_RATIO_FROM = MIB
_ROWS_LIMIT = 1 << 22
_BATCH = 4  # rows that are decoded at a time: each may be a picture of the largest size


@dataclass(frozen=True)
class ParquetPictures:
    """One Parquet file, of which the classes have been read but not the pictures.

    Args:
        path: the file.
        image: its column of pictures.
        classes: the class of each row.
    """

    path: Path
    image: str
    classes: Sequence[str]

    def pictures(self, rows: Mapping[int, int]) -> Iterator[tuple[int, str, bytes]]:
        """For each wanted row, from 0, what it is mapped to, its name for people and the contents of its file.

        Raises:
            DataError: a damaged file, or one that expands more than pictures do.
        """
        limit, total, row = max(_RATIO_FROM, _RATIO * self.path.stat().st_size), 0, 0
        with _opened(self.path) as file:
            for batch in file.iter_batches(batch_size=_BATCH, columns=[self.image]):
                column = batch.column(0)
                for value in column.to_pylist():
                    # The datasets library stores the contents together with a path, other programs the contents alone.
                    data = (value.get("bytes") if isinstance(value, dict) else value) or b""
                    # Counted, because the file's own account of its size may be wrong.
                    total += len(data)
                    if total > limit:
                        raise _expands(self.path)
                    if row in rows:
                        yield rows[row], f"{self.path}, row {row + 1}", data
                    row += 1


def read_parquet(path: Path) -> ParquetPictures:
    """Which columns of a Parquet file hold the pictures and their classes, and the classes.

    Raises:
        DataError: pyarrow is missing, the file is damaged or expands too much, or has no such columns.
    """
    import pyarrow as pa

    with _opened(path) as file:
        schema = file.schema_arrow
        images = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)
                  or (pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0)]  # fmt: skip
        label = Columns().of(schema.names)[1]
        columns = ", ".join(map(repr, schema.names[:20]))
        if len(images) != 1:
            raise DataError(
                f"{path} has {len(images)} columns with pictures; one is needed. Its columns: {columns}. Texts in "
                "Parquet files are read by `better-attention compare text`."
            )
        if label is None:
            raise DataError(f"{path} has no column with the classes. Its columns: {columns}. Call that column 'label'.")
        names = _class_names(schema.metadata or {}, label)
        classes: list[str] = []
        for batch in file.iter_batches(columns=[label]):
            for value in batch.column(0).to_pylist():
                if value is None or (isinstance(value, str) and not value.strip()):
                    raise DataError(f"{path}, row {len(classes) + 1}: no class in column {label!r}. Remove that row.")
                named = names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)
                classes.append(named.strip().replace("/", "\u2215"))  # names of pictures are paths
    return ParquetPictures(path, images[0], classes)


def _class_names(metadata: Mapping[bytes, bytes], label: str) -> list[str]:
    """What the numbers in the column of classes stand for, as the datasets library writes it; none if it does not."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The Parquet file, after its own account of its size was checked."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow. `pip install 'better-attention[parquet]'` brings it; a folder per "
            "class needs nothing."
        ) from None
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            size = path.stat().st_size
            if sum(group.total_byte_size for group in groups) > max(_RATIO_FROM, _RATIO * size):
                raise _expands(path)
            if file.metadata.num_rows > _ROWS_LIMIT:
                raise DataError(f"{path} has {file.metadata.num_rows:,} rows; at most {_ROWS_LIMIT:,} are read.")
            yield file
    except DataError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no Parquet file, or a damaged one ({error}). Write it again.") from None


def _expands(path: Path) -> DataError:
    return DataError(f"{path} expands to more than {_RATIO} times its size, as no file of pictures does.")
