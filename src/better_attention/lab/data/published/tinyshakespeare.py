"""Tiny Shakespeare: a million characters of Shakespeare's plays, one running text.

Source: A. Karpathy, char-rnn (2015), data/tinyshakespeare/input.txt; the plays are in the public domain. The SHA-256 of
the file is the one that Lux.jl's NanoGPT example registers. Any other UTF-8 text is read in the same way, and every
result says that it is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from better_attention.lab.data.download import Remote
from better_attention.lab.data.samples import DataError, RunningText
from better_attention.lab.data.source import Source
from better_attention.lab.files import read_regular

FILE = "input.txt"
REMOTES = (
    Remote(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
        "data/tinyshakespeare/input.txt",
        name=FILE,
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
)
LAYOUT = f"{FILE} in DIR or DIR/tinyshakespeare; or any UTF-8 text, by its file's name"


def locate(place: Path) -> tuple[Path, ...] | None:
    """The text at or in ``place``; None if there is none."""
    if place.is_file():
        return (place,)
    return (place / FILE,) if (place / FILE).is_file() else None


def read(files: Sequence[Path]) -> RunningText:
    """The text in the file that :func:`locate` found, line ends as line feeds.

    Raises:
        DataError: it is empty, too large, or no UTF-8.
        OSError: it cannot be read.
    """
    (path,) = files
    try:
        content = read_regular(path)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {content[error.start]:#04x} at position {error.start:,}). Convert it to "
            "UTF-8."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read as a text: {error}") from None
    if not text.strip():
        raise DataError(f"{path} holds no text: it is empty, or blank. Name a file with a text to learn from.")
    found = hashlib.sha256(content).hexdigest()
    other = f"another text than Tiny Shakespeare: {path.name}, SHA-256 {found[:12]}..., {len(content):,} bytes"
    return RunningText(
        name="tinyshakespeare",
        text=text.replace("\r\n", "\n").replace("\r", "\n"),
        departures=() if found == REMOTES[0].sha256 else (other,),
    )


SOURCE = Source(
    name="tinyshakespeare",
    title="1,115,394 characters of Shakespeare's plays, one running text",
    terms="Karpathy 2015 (char-rnn); the plays are in the public domain",
    layout=LAYOUT,
    load=read,
    locate=locate,
    remotes=REMOTES,
)
