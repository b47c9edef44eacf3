"""Protection of other files: an output folder must be writable and must not hold results of another program."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from better_attention.lab.files import parse_json, read_regular


def check_output(folder: Path, files: Sequence[str], ours: Callable[[Any], bool], *, known: bool = False) -> None:
    """Refuse an output folder before hours of work if it cannot be written, or holds files that would be overwritten.

    Nothing is created or changed.

    Args:
        folder: may not exist yet.
        files: the names that will be written; first the JSON file by which an earlier result is recognised.
        ours: whether the value in that JSON file is one that the command writes.
        known: the folder belongs to the command for another reason: it holds its runs.

    Raises:
        ValueError: names the files in the way, or says why nothing can be written.
    """
    check_writable(folder)
    there = [name for name in files if os.path.lexists(folder / name)]
    if there and not known and not _is(folder / files[0], ours):
        raise ValueError(
            f"{folder} holds {', '.join(there)}, but no {files[0]} of better-attention: refusing to overwrite. "
            "Choose another folder with --out, or move the files elsewhere."
        )


def check_file(path: Path, option: str, ours: Callable[[bytes], bool]) -> None:
    """Refuse an output file that already exists and was written by another program, or whose folder does not exist.

    Args:
        path: the file.
        option: the option that named it.
        ours: whether some content is of the kind that the command writes.

    Raises:
        ValueError: says which of these it is.
    """
    if path.is_dir():
        raise ValueError(f"{option} expects a file, but {path} is a folder: name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: folder {path.parent} does not exist. Create it first, or name another.")
    if os.path.lexists(path) and not (path.is_file() and ours(path.read_bytes())):
        raise ValueError(
            f"{option} {path}: this file already exists and was not written by better-attention; refusing to overwrite "
            "it. Choose another name, or move it elsewhere."
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be created or written.

    Raises:
        ValueError: says why.
    """
    # The nearest folder that exists decides, since the ones below it would be created within it.
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        if not above.is_dir():
            kind = "a broken link" if above.is_symlink() and not above.exists() else "a file"
            raise ValueError(f"--out {folder}: {above} is {kind}: name a folder for the results.")
    except OSError as error:
        raise ValueError(f"--out {folder}: {above} cannot be read ({error.strerror}). Choose another folder.") from None
    try:  # with a temporary file: the permissions that a system reports are not always those that it applies
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {folder}: nothing can be written in {above} ({error.strerror}). Choose another folder."
        ) from None


def _is(path: Path, ours: Callable[[Any], bool]) -> bool:
    try:
        return ours(parse_json(read_regular(path)))
    except (OSError, ValueError):
        return False
