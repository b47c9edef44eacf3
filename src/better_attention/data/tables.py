"""The user's own labelled texts: a CSV, JSON lines or Parquet file, or a folder with one for each part.

Whatever is wrong with them is said before anything is trained, with the file and the line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .containers import DataError, Int64, Texts
from .labelled import KINDS, Columns, Table, format_of, read_shards
from .partition import HELD_OUT, majority, partition, repeats, text_key

FEWEST = 10  # different texts of a class: fewer leave nothing to validate and test with
PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
LAYOUT = f"{KINDS}, or a folder with train, validation and test files of these kinds"
SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)")
"""The name of one of several files that are one table together, as in train-00000-of-00002.parquet."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read(place: Path, text_column: str = "", label_column: str = "") -> Texts:
    """The texts of ``place``, with a validation split.

    One file is cut by hash of the text into 80, 10 and 10 % of each class, texts of the same words on one side. A
    folder's own parts are kept; one that is missing is cut from its training file in the same way.

    Args:
        place: a file, or a folder that holds one or has a training file and others.
        text_column, label_column: the columns' names; "": one of the usual names.

    Raises:
        DataError: nothing there, a missing column, an empty text, a missing label, one class only, a class with too
            few texts, or a file that is damaged; names file and line.
    """
    columns = Columns(text_column, label_column)
    tables = {part: read_shards(paths, columns) for part, paths in locate(place).items()}
    train = tables["train"]
    keys = [text_key(text) for text in train.texts]
    classes = classes_of(train, keys)
    texts = {part: table.texts for part, table in tables.items()}
    labels = {part: numbered(table, classes) for part, table in tables.items()}
    missing = [part for part in HELD_OUT if part not in tables]
    if missing:
        for part, rows in partition(keys, train.labels, missing).items():
            texts[part], labels[part] = [train.texts[row] for row in rows], numbered(train, classes)[rows]
    return Texts(
        name="text",
        train_texts=texts["train"],
        train_labels=labels["train"],
        test_texts=texts["test"],
        test_labels=labels["test"],
        classes=classes,
        notes=(
            *_origin(train, missing),
            *repeats(keys, train.labels),
            *_overlap(tables, keys),
            majority(labels["test"].tolist(), classes),
        ),
        validation_texts=texts["validation"],
        validation_labels=labels["validation"],
    )


def locate(place: Path) -> dict[str, list[Path]]:
    """The file of each part in ``place``, or its shards; one file alone is the training part.

    Raises:
        DataError: nothing there that can be read, two files for one part, or a shard is missing.
    """
    if place.is_file():
        return {"train": [place]}
    if not place.is_dir():
        raise DataError(f"{place} does not exist: name your texts, {LAYOUT}.")
    files = [file for file in place.iterdir() if format_of(file) and file.is_file()]
    files.sort(key=lambda file: natural(file.name))
    if not files and (place / "data").is_dir():  # as data sets are published
        return locate(place / "data")
    found: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.lower().split(".")[0]
        shard = SHARD.fullmatch(stem)
        name = shard[1] if shard else stem
        part = next((part for part, names in PARTS.items() if name in names), None)
        if part:
            found.setdefault(part, []).append(file)
    for part, parts in found.items():
        check_shards(place, part, parts)
    if "train" in found:
        return found
    if len(files) == 1 and not found:
        return {"train": files}
    names = ", ".join(file.name for file in files[:10]) or "nothing of the kind"
    raise DataError(f"{place} has no training file such as train.csv, but {names}. Expected {LAYOUT}.")


def check_shards(place: Path, part: str, files: Sequence[Path]) -> None:
    """Make sure that the files of a part are one file, or all shards of one table.

    Raises:
        DataError: two tables, or a shard that is missing.
    """
    shards = [SHARD.fullmatch(file.name.split(".")[0]) for file in files]
    if len({(shard[1], shard[3]) if shard else file.name for file, shard in zip(files, shards, strict=True)}) > 1:
        raise DataError(f"{place} has two {part} files, {files[0].name} and {files[1].name}. Remove one.")
    numbers = [int(shard[2]) for shard in shards if shard]
    count = next((int(shard[3]) for shard in shards if shard), 0)
    if numbers != list(range(count)):
        lost = next((number for number in range(count) if number not in numbers), count)
        raise DataError(
            f"{place}: of the {count} {part} files, number {lost} (counted from 0) is missing or there twice. "
            f"There are {', '.join(file.name for file in files[:10])}."
        )


def natural(name: str) -> tuple[Any, ...]:
    """A key that sorts numbers by value, and before words; numbers within words by value too.

    >>> sorted(["10", "9", "-1", "0.5", "b10", "b9", "A"], key=natural)
    ['-1', '0.5', '9', '10', 'A', 'b9', 'b10']
    """
    if _NUMBER.fullmatch(name):
        return 0, (float(name),), name
    pieces = re.split("([0-9]{1,18})", name.casefold())  # words and numbers in turn
    return 1, tuple(int(piece) if odd % 2 else piece for odd, piece in enumerate(pieces)), name


def classes_of(table: Table, keys: Sequence[bytes]) -> tuple[str, ...]:
    """The classes of a training table, sorted naturally.

    Raises:
        DataError: there is one only, or one of fewer than ten different texts.
    """
    different: dict[bytes, str] = {}
    for key, label in zip(keys, table.labels, strict=True):
        different[key] = min(label, different.get(key, label))  # as partition() counts them
    counts = Counter(different.values())
    classes = sorted(dict.fromkeys(table.labels), key=natural)
    if len(classes) == 1:
        raise DataError(
            f"{table.path}: every label in column {table.columns[1]!r} is {classes[0]!r}; there is nothing to learn. "
            "The file is incomplete, or another column holds the labels: name it with `--set label_column=NAME`."
        )
    for name in classes:
        if counts[name] < FEWEST:
            raise DataError(
                f"{table.place(table.labels.index(name))}: class {name!r} has too few texts of its own ({counts[name]} "
                f"different ones, at least {FEWEST} are needed; column {table.columns[1]!r} holds {len(classes)} "
                "classes). Add some, join it with another class, or remove it; if these are no classes, name the "
                "column with `--set label_column=NAME`."
            )
    return tuple(classes)


def numbered(table: Table, classes: Sequence[str]) -> Int64:
    """The labels as indices into ``classes``.

    Raises:
        DataError: a class that is not among them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for row, label in enumerate(table.labels):
        if label not in numbers:
            raise DataError(
                f"{table.place(row)}: class {label!r} does not occur in the training file "
                f"({', '.join(repr(name) for name in classes[:10])}{', ...' if len(classes) > 10 else ''})."
            )
    return np.array([numbers[label] for label in table.labels], dtype=np.int64)


def _origin(train: Table, missing: Sequence[str]) -> tuple[str, ...]:
    text, label = train.columns
    notes = [f"texts from column {text!r}, classes from column {label!r} of {train.path.name}"]
    if missing:
        notes.append(
            f"a tenth of {train.path.name} each for {' and '.join(missing)}, chosen by hash of the text within each "
            "class; texts of the same words are on one side"
        )
    return tuple(notes)


def _overlap(tables: Mapping[str, Table], keys: Sequence[bytes]) -> tuple[str, ...]:
    """Notes on held-out texts that the training file holds too."""
    known = set(keys)
    shared = {
        part: sum(text_key(text) in known for text in table.texts) for part, table in tables.items() if part != "train"
    }
    return tuple(
        f"{count:,} of {len(tables[part].texts):,} {part} texts occur in the training file too"
        for part, count in shared.items()
        if count
    )
