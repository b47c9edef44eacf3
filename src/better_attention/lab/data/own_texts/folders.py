"""Labelled texts as a folder of files for each class, with or without a folder for each part above them.

The files are called .txt, or have no ending, as in newsgroups and mailboxes: ``20news-bydate-train/sci.med/58045``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from better_attention.lab.data.archives import MIB
from better_attention.lab.data.samples import DataError
from better_attention.text import plural

from .columns import Table
from .records import Faults

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
FILE = "file"
"""The unit of a table whose records are files."""

_LIMIT = 64 * MIB  # bytes of one text
_TOTAL = 4096 * MIB


def class_folders(place: Path) -> dict[str, Table]:
    """The texts of ``place/CLASS/*`` or ``place/PART/CLASS/*``; empty if there are no such files.

    A part's folder may have a name that ends in it, as ``20news-bydate-test`` does. A folder that holds nothing but the
    folder of such a set, as an unpacked archive does, stands for that one. Files of other kinds and hidden ones are
    not read; a note of the table counts them.

    Raises:
        DataError: a text is empty, longer than 64 MiB, no regular file, or called .txt and not UTF-8; all such files
            are named at once.
    """
    if not place.is_dir():
        return {}
    folders = [folder for folder in sorted(place.iterdir()) if _visible(folder) and folder.is_dir()]
    parts = _part_folders(folders)
    if "train" in parts and _classes_below(parts["train"]):
        return {part: _read(folder) for part, folder in parts.items()}
    if sum(bool(_texts(folder)) for folder in folders) > 1:
        return {"train": _read(place)}
    return class_folders(folders[0]) if len(folders) == 1 else {}


def _part_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Part -> the folder that is called like it; where none is called train, the one whose name ends like it."""
    exact = {part: folder for part, names in PARTS.items() for folder in folders if folder.name.casefold() in names}
    if "train" in exact:
        return exact
    ends = [(re.split("[-_ ]", folder.name.casefold())[-1], folder) for folder in folders]
    found = {part: [folder for end, folder in ends if end in names] for part, names in PARTS.items()}
    return {part: claims[0] for part, claims in found.items() if len(claims) == 1}  # of several, all are classes


def _classes_below(folder: Path) -> bool:
    """Whether there are texts in folders below this one."""
    return any(_texts(below) for below in folder.iterdir() if below.is_dir())


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__MACOSX"))


def _texts(folder: Path) -> list[Path]:
    """The .txt files in a folder; without one, the files without an ending."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in (".txt", "") and _visible(file)]
    named = [file for file in files if file.suffix]
    return sorted(named or [file for file in files if not file.is_dir()])


def _read(place: Path) -> Table:
    table = Table(place, FILE, ("text", "folder"), [], [], [])
    faults = Faults(FILE)
    total = 0
    others: list[str] = []
    latin: list[str] = []
    for entry in sorted(place.iterdir()):
        if not entry.is_dir() or not _visible(entry):
            others += [entry.name] * (not entry.is_dir())
            continue
        files = _texts(entry)
        read = set(files)
        others += [f"{entry.name}/{file.name}" for file in sorted(entry.iterdir()) if file not in read]
        for file in files:
            name = f"{entry.name}/{file.name}"
            try:
                text, unicode = _text(file)
            except DataError as error:
                faults.add(name, str(error))
                continue
            latin += [name] * (not unicode)
            total += len(text)
            if total > _TOTAL:
                raise DataError(
                    f"{place} holds more than {_TOTAL:,} characters, which is too much to read into memory."
                )
            table.lines.append(name)
            table.texts.append(text)
            table.labels.append(entry.name)
    faults.check()
    if others:
        listed = f"{', '.join(others[:10])}{', ...' if len(others) > 10 else ''}"
        table.notes.append(
            f"{place.name}: not read, since no text in the folder of a class: {len(others):,} ({listed})"
        )
    if latin:
        table.notes.append(
            f"{place.name}: {len(latin):,} of {plural(len(table.texts), 'file')} not UTF-8 and read as Latin-1, the "
            f"first {latin[0]}. If they are in another encoding, save them as UTF-8"
        )
    return table


def _text(file: Path) -> tuple[str, bool]:
    """The text in a file, and whether it is UTF-8, as it has to be where it is called .txt."""
    if not file.is_file():
        raise DataError(f"{file} is no regular file. Remove it.")
    if file.stat().st_size > _LIMIT:
        raise DataError(f"{file} has {file.stat().st_size:,} bytes; a text has at most {_LIMIT:,}.")
    data = file.read_bytes()
    # Text in UTF-16 and binary files have such bytes, and as Latin-1 they would pass for text.
    if b"\0" in data:
        raise DataError(f"{file} is no text: it holds a byte 0. Remove it, or save it as UTF-8.")
    unicode = True
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if file.suffix:
            raise DataError(
                f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start}). Save it "
                "as UTF-8."
            ) from None
        text, unicode = data.decode("latin-1"), False  # older than UTF-8: every byte is a character
    if not text.strip():
        raise DataError(f"{file} is empty. Remove it.")
    return text, unicode
