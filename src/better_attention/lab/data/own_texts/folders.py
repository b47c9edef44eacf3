"""Labelled texts as a folder of .txt files for each class, with or without a folder for each part above them."""

from __future__ import annotations

from pathlib import Path

from better_attention.lab.data.archives import MIB
from better_attention.lab.data.samples import DataError

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
    """The texts of ``place/CLASS/*.txt`` or ``place/PART/CLASS/*.txt``; empty if there are no such files.

    A folder that holds nothing but the folder of such a set, as an unpacked archive does, stands for that one.
    Files of other kinds and hidden ones are not read; a note of the table counts them.

    Raises:
        DataError: a text is empty, not UTF-8, longer than 64 MiB, or no regular file; all such files are named at once.
    """
    if not place.is_dir():
        return {}
    folders = [folder for folder in sorted(place.iterdir()) if _visible(folder) and folder.is_dir()]
    parts = {part: folder for part, names in PARTS.items() for folder in folders if folder.name.casefold() in names}
    if "train" in parts and any(_texts(folder) for folder in parts["train"].iterdir() if folder.is_dir()):
        return {part: _read(folder) for part, folder in parts.items()}
    if sum(bool(_texts(folder)) for folder in folders) > 1:
        return {"train": _read(place)}
    return class_folders(folders[0]) if len(folders) == 1 else {}


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__MACOSX"))


def _texts(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".txt" and _visible(file))


def _read(place: Path) -> Table:
    table = Table(place, FILE, ("text", "folder"), [], [], [])
    faults = Faults(FILE)
    total = 0
    others: list[str] = []
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
                text = _text(file)
            except DataError as error:
                faults.add(name, str(error))
                continue
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
            f"{place.name}: not read, since no .txt in the folder of a class: {len(others):,} ({listed})"
        )
    return table


def _text(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"{file} is no regular file. Remove it.")
    if file.stat().st_size > _LIMIT:
        raise DataError(f"{file} has {file.stat().st_size:,} bytes; a text has at most {_LIMIT:,}.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start}). Save it as "
            "UTF-8."
        ) from None
    if not text.strip():
        raise DataError(f"{file} is empty. Remove it.")
    return text
