"""The folder that a command writes its results into: it can be written, and what lies there is not somebody else's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from better_attention.lab.files import parse_json, read_regular


def check_output(folder: Path, files: Sequence[str], ours: Callable[[Any], bool], *, known: bool = False) -> None:
    """Refuse a folder before hours of work: one that cannot be written, or with files of these names by others.

    Nothing is made or changed.

    Args:
        folder: may not exist yet.
        files: the names that will be written; first the JSON file by which an earlier result is known.
        ours: whether the value in that JSON file is one that the command writes.
        known: the folder is the command's own for another reason: its runs lie there.

    Raises:
        ValueError: says which file stands in the way, or why nothing can be written.
    """
    check_writable(folder)
    there = [name for name in files if os.path.lexists(folder / name)]
    if there and not known and not _is(folder / files[0], ours):
        raise ValueError(
            f"{folder} holds {', '.join(there)}, but no {files[0]} of better-attention's: that would be overwritten. "
            "Choose another folder with --out, or move the files away."
        )


def check_file(path: Path, option: str, ours: Callable[[bytes], bool]) -> None:
    """Refuse a file to be written that stands there already and is somebody else's, or whose folder is not there.

    Args:
        path: the file.
        option: by which it was named.
        ours: whether content is such as the command writes.

    Raises:
        ValueError: says which.
    """
    if path.is_dir():
        raise ValueError(f"{option} is a file to be written, but {path} is a folder: name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}. Make it first, or name another.")
    if os.path.lexists(path) and not (path.is_file() and ours(path.read_bytes())):
        raise ValueError(
            f"{option} {path}: there is such a file, and this command did not write it: it would be overwritten. "
            "Choose another name, or move it away."
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written.

    Raises:
        ValueError: says why.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        if not above.is_dir():
            kind = "a broken link" if above.is_symlink() and not above.exists() else "a file"
            raise ValueError(f"--out {folder}: {above} is {kind}: name a folder for the results.")
    except OSError as error:
        raise ValueError(f"--out {folder}: {above} cannot be read ({error.strerror}). Choose another folder.") from None
    try:  # a file without a name, gone at once: what the system says it would allow is not always what it does
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
