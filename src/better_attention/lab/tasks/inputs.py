"""New inputs for a finished model, by what a user calls them: texts, text files, standard input, picture files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

StandardInput = Callable[[], bytes]
"""Reads all of standard input; asked only where a user names it."""

_PATH_LIKE = re.compile(r"\S*/\S*|\S+\.[A-Za-z]{1,5}")  # a text like this was meant as a path, if no file is there


@dataclass(frozen=True)
class NamedInput:
    """One input as :meth:`Task.encode` reads it, what to call it, and its true class where that is known."""

    title: str
    value: Any
    truth: str | None = None


def read_texts(names: Sequence[str], standard_input: StandardInput) -> list[NamedInput]:
    """The texts that ``names`` stand for: each a file with one text, ``-`` for the lines of standard input, or a text.

    Raises:
        ValueError: a file that does not exist or is not UTF-8 text, or nothing to read.
    """
    texts: list[str] = []
    for number, name in enumerate(names, start=1):
        texts += _lines(standard_input()) if name == "-" else [_text(name, number)]
    return [NamedInput(text, text) for text in texts]


def _lines(content: bytes) -> list[str]:
    try:
        # splitlines() would also cut at other separators, such as U+2028, within a text.
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error}). Convert it first.") from None
    texts = [line.rstrip("\r") for line in lines if line.strip()]
    if not texts:
        raise ValueError("standard input holds no text: write one text per line.")
    return texts


def _text(name: str, number: int) -> str:
    from better_attention.lab.data.own_texts.columns import FORMATS

    try:
        is_file, is_folder = Path(name).is_file(), bool(name) and Path(name).is_dir()
    except (OSError, ValueError):  # a text may be too long for a file name, or hold characters that none can have
        is_file = is_folder = False
    if is_folder:
        raise ValueError(f"{name} is a folder: name the text files in it.")
    if not is_file and _PATH_LIKE.fullmatch(name):
        raise ValueError(f"{name}: there is no such file. If it is a text, pipe it to standard input and pass '-'.")
    if is_file and Path(name).suffix.lower() in FORMATS:
        raise ValueError(
            f"{name} is a table and would be read as one text: pipe one text per line to standard input and pass '-'."
        )
    try:
        text = Path(name).read_text("utf-8") if is_file else name
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}). Convert it first.") from None
    if not text.strip():
        raise ValueError(f"input {number}, {name!r}, holds no text.")
    return text


def picture_file(name: str, number: int) -> Path:
    """The file that input ``number`` names.

    Raises:
        ValueError: it cannot be a file of pictures.
        FileNotFoundError: there is no such file.
    """
    path = Path(name)
    if not name or name == "-":
        raise ValueError(f"input {number}, {name!r}: expected the path of an image file.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the pictures in it.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    if not path.is_file():
        raise ValueError(f"{path} is not an image file.")
    return path


def read_array(path: Path, channels: int) -> list[NamedInput]:
    """The picture, or the pictures one by one, in a ``.npy`` file.

    Args:
        path: of the file.
        channels: 1 where a picture is (H, W), 3 where it is (H, W, 3).

    Raises:
        ValueError: it holds no array of numbers.
    """
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a forged header then takes no memory
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array of numbers ({error}).") from None
    if array.ndim == (3 if channels == 1 else 4):
        return [NamedInput(f"{path}[{row}]", picture) for row, picture in enumerate(array)]
    return [NamedInput(str(path), array)]


def read_picture_of(path: Path, side: int, channels: int, *, task: str, resize: bool) -> NDArray[np.uint8]:
    """The pixels of a picture file as a viewer shows it, 0 ... 255.

    Args:
        path: of the file.
        side, channels: of the pictures that task ``task`` reads.
        resize: scale a picture of another size on its shorter side, and take the middle square.

    Raises:
        ValueError: a damaged file or another kind of file, or a picture of another size without ``resize``.
    """
    from better_attention.lab.data.own_pictures.decode import quiet, read_picture, sides
    from better_attention.lab.data.samples import DataError

    try:
        with quiet():
            width, height = sides(path.name, path)
            if resize or (width, height) == (side, side):
                return read_picture(path.name, path, side, channels)
    except DataError as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from None
    raise ValueError(
        f"{path} has {width}x{height} pixels; task {task!r} reads {side}x{side}. Resize it, or add --resize."
    )
