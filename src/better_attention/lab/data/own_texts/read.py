"""The user's own labelled texts: a CSV, JSON lines or Parquet file, or a folder with one for each part.

Whatever is wrong with them is said before anything is trained, with the file and the line.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from better_attention.lab.data.samples import DataError, Int64, Texts
from better_attention.lab.data.vocabulary import tokens
from better_attention.lab.data.zipped_tables import READ, is_zip, zipped_tables
from better_attention.text import plural

from .columns import KINDS, Columns, NoLabelsError, Table, doubtful, format_of, has_columns, near_equal, read_shards
from .folders import FILE, PARTS, class_folders
from .records import Faults
from .split import HELD_OUT, partition, repeats, text_key

FEWEST = 10  # different texts of a class: fewer leave nothing to validate and test with
SAMPLED = 1_000  # texts whose words are measured
LAYOUT = (
    f"{KINDS}, a folder with train, validation and test files of these kinds, or one with a folder for each class of "
    "texts, .txt files or files without an ending"
)
SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)(?:-[0-9a-f]{16})?")
"""The name of one of several files that are one table together, as in train-00000-of-00002.parquet."""

_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Letters of Thai, Lao, Burmese, Khmer, Japanese and Chinese, which put no spaces between words."""

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
    tables, left_out = _tables(place, columns)
    train = tables["train"]
    # Computed once: the split and the notes on repeated and shared texts all need them.
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
            *left_out,
            *(note for table in tables.values() for note in table.notes),
            *doubtful(classes, Counter(train.labels), "text"),
            *repeats(keys, train.labels),
            *_readable(train.texts, keys),
            *_overlap(tables, keys),
        ),
        validation_texts=texts["validation"],
        validation_labels=labels["validation"],
    )


def _tables(place: Path, columns: Columns) -> tuple[dict[str, Table], tuple[str, ...]]:
    """The table of each part of ``place``, and notes on the files that are not read."""
    if place.is_dir() and not _has_tables(place, columns) and (folders := class_folders(place)):
        return folders, ()
    parts = locate(place)
    tables: dict[str, Table] = {}
    notes: list[str] = []
    for part, paths in parts.items():
        try:
            tables[part] = read_shards(paths, columns)
        except NoLabelsError:
            # Nothing can be learned without labels; a test file without them, as competitions have, can be spared.
            if part == "train":
                raise
            named = ", ".join(path.name for path in paths[:10])
            notes.append(f"{named} is left out: it has no labels, without which nothing can be measured")
    used = {path for paths in parts.values() for path in paths}
    if place not in used:
        others = [file.name for file in table_files(next(iter(used)).parent) if file not in used]
        if others:
            notes.append(
                f"not read: {', '.join(others[:10])}{', ...' if len(others) > 10 else ''} beside "
                f"{', '.join(sorted(path.name for path in used)[:3])}"
            )
    return tables, tuple(notes)


def _has_tables(place: Path, columns: Columns) -> bool:
    """Whether the tables in a folder are its texts, and not about folders of classes beside them."""
    files = table_files(place)
    parts = _by_part(files)
    return "train" in parts or (len(files) == 1 and not parts and has_columns(files[0], columns))


def table_files(place: Path) -> list[Path]:
    """The tables in a folder, or in a .zip archive that is named or is all there is in its folder; sorted naturally."""
    if is_zip(place):
        found = zipped_tables(place)
    elif place.is_dir():
        found = [file for file in place.iterdir() if format_of(file) and file.is_file()]
        archives = [] if found else [file for file in place.iterdir() if is_zip(file)]
        found = found or (zipped_tables(archives[0]) if len(archives) == 1 else [])
    else:
        return []
    return sorted(found, key=lambda file: natural(file.name))


def _by_part(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Part -> the files that are called like it."""
    found: dict[str, list[Path]] = {}
    for file in files:
        name = shard_of(file)[0]
        part = next((part for part, names in PARTS.items() if name in names), None)
        if part:
            found.setdefault(part, []).append(file)
    return found


def locate(place: Path) -> dict[str, list[Path]]:
    """The file of each part in ``place``, or its shards; one file alone is the training part.

    Raises:
        DataError: nothing there that can be read, two files for one part, or a shard is missing.
    """
    if place.is_file() and not is_zip(place):
        return {"train": [place]}
    if not place.exists():
        raise DataError(f"{place} does not exist: name your texts, {LAYOUT}.")
    files = table_files(place)
    files_of = _by_part(files)
    if not files_of and (place / "data").is_dir():  # as data sets are published
        return locate(place / "data")
    for part, parts in files_of.items():
        check_shards(place, part, parts)
    if "train" in files_of:
        return files_of
    if len(files) == 1 and not files_of:
        return {"train": files}
    raise DataError(_nothing_to_train_with(place, files))


def _nothing_to_train_with(place: Path, files: Sequence[Path]) -> str:
    """What to do about a folder or an archive with these tables, none of which is the training part."""
    others = ", ".join(file.name for file in files[:10])
    told = f"{place} has no training file such as train.csv{f', but {others}' if others else ''}. Expected {LAYOUT}."
    if is_zip(place):
        return f"{told} Tables in an archive end in {', '.join(READ)}; of anything else unpack it, and name the folder."
    if files:
        return f"{told} If one of these files is your data, name it: `--data {shlex.quote(str(files[0]))}`."
    return told


def shard_of(file: Path) -> tuple[str, int, int]:
    """The name of the table that a file belongs to, the file's number, and how many there are; 0 and 0 if it is whole.

    >>> shard_of(Path("Train-00001-of-00002.parquet"))
    ('train', 1, 2)
    """
    stem = file.name.lower().split(".")[0]
    shard = SHARD.fullmatch(stem)
    return (shard[1], int(shard[2]), int(shard[3])) if shard else (stem, 0, 0)


def check_shards(place: Path, part: str, files: Sequence[Path]) -> None:
    """Make sure that the files of a part are one file, or all shards of one table.

    Raises:
        DataError: two tables, or not each shard once.
    """
    shards = [shard_of(file) for file in files]
    if len({(name, count) for name, _, count in shards}) > 1 or (shards[0][2] == 0 and len(files) > 1):
        raise DataError(f"{place} has two {part} files, {files[0].name} and {files[1].name}. Remove one.")
    numbers, count = [number for _, number, _ in shards], shards[0][2]
    # table_files() has sorted them by number, so a complete set counts up from 0.
    if numbers != list(range(max(1, count))):
        raise DataError(
            f"{place}: a {part} table in {count} files needs each of the numbers 0 to {count - 1} once; there are "
            f"{', '.join(file.name for file in files[:10])}."
        )


def natural(name: str) -> tuple[Any, ...]:
    """A key that sorts numbers by value, and before words; numbers within words by value too.

    >>> sorted(["10", "9", "-1", "0.5", "b10", "b9", "A"], key=natural)
    ['-1', '0.5', '9', '10', 'A', 'b9', 'b10']
    """
    if _NUMBER.fullmatch(name):
        return 0, (float(name),), name
    # In pieces of 18 digits, because Python refuses to read a number of thousands.
    pieces = re.split("([0-9]{1,18})", name.casefold())  # words and numbers alternate
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
    few = [name for name in classes if counts[name] < FEWEST]
    if few:
        listed = ", ".join(f"{name!r} ({counts[name]})" for name in few[1:11])
        alike = [" and ".join(map(ascii, group)) for group in near_equal(classes) if set(group) & set(few)]
        hint = f" Nearly the same are {'; '.join(alike[:10])}: spell them alike." if alike else ""
        more = f", of which too few have also {listed}{', ...' if len(few) > 11 else ''}" if listed else ""
        folders = table.unit == FILE
        holds = f"{table.path.name} holds" if folders else f"column {table.columns[1]!r} holds"
        other = "" if folders else "; if these are no classes, name the column with `--set label_column=NAME`"
        raise DataError(
            f"{table.place(table.labels.index(few[0]))}: class {few[0]!r} has too few texts of its own "
            f"({counts[few[0]]} different ones, at least {FEWEST} are needed; {holds} {len(classes)} classes{more}). "
            f"Add some, join it with another class, or remove it{other}.{hint}"
        )
    return tuple(classes)


def numbered(table: Table, classes: Sequence[str]) -> Int64:
    """The labels as indices into ``classes``.

    Raises:
        DataError: a class that is not among them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    faults = Faults(table.unit)
    for row, label in enumerate(table.labels):
        if label not in numbers:
            known = f"{', '.join(map(repr, classes[:10]))}{', ...' if len(classes) > 10 else ''}"
            faults.add(
                table.lines[row],
                f"{table.place(row)}: class {label!r} does not occur in the training file ({known}). Remove that "
                "record; if no record of this file has a label, take the file out of the folder.",
            )
    faults.check()
    return np.array([numbers[label] for label in table.labels], dtype=np.int64)


def _origin(train: Table, missing: Sequence[str]) -> tuple[str, ...]:
    text, label = train.columns
    if train.unit == FILE:
        name, origin = train.path.name, f"texts from the files of {train.path}, classes from its folders"
    else:
        name = train.path.name + (f" and {len(train.shards)} more" if train.shards else "")
        origin = f"texts from column {text!r}, classes from column {label!r} of {name}"
    notes = [origin]
    if missing:
        notes.append(
            f"a tenth of {name} each for {' and '.join(missing)}, chosen by hash of the text within each "
            "class; texts of the same words are on one side"
        )
    return tuple(notes)


def _readable(texts: Sequence[str], keys: Sequence[bytes]) -> tuple[str, ...]:
    """Notes on texts of which a model that reads words gets little."""
    notes = []
    empty = keys.count(text_key(""))
    if empty:
        notes.append(f"{empty:,} of {plural(len(texts), 'text')} without a word, only signs: nothing is read of them")
    words = [word for text in texts[:SAMPLED] for word in tokens(text)]
    whole = "".join(words)
    if words and len(_UNSPACED.findall(whole)) > len(whole) / 3 and len(whole) / len(words) > 3:
        notes.append(
            f"words have {len(whole) / len(words):.0f} letters on average: a word is what stands between spaces, and "
            "the script of these texts has none. Put spaces between words, or there is little to learn from"
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
