"""Reading a published data set by its name."""

from __future__ import annotations

from pathlib import Path

from .home import NoHome, home
from .published import SOURCES
from .samples import DataError, Images, NotFetched, Pairs, RunningText, Texts
from .source import Files, Source


def source(name: str) -> Source:
    """The row called ``name``.

    Raises:
        DataError: no such data set.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(SOURCES)}.")
    return SOURCES[name]


def find(source: Source, folder: Path | None = None) -> Files | None:
    """The files of ``source`` in ``folder`` or ``folder/NAME``; None if they are not there.

    Args:
        source: a row of ``SOURCES`` that is not embedded.
        folder: a folder, or one of the files; None: the library's own data home.

    Raises:
        DataError: the folder does not exist, or holds only some of the files.
    """
    if source.locate is None:
        return ()
    if folder is not None and not folder.exists():
        raise DataError(f"{folder} does not exist: name the folder that holds the data ({source.layout}).")
    if folder is None:
        try:
            return source.locate(home() / source.name)
        except NoHome:
            return None
    return source.locate(folder / source.name) or source.locate(folder)


def read(name: str, folder: Path | None = None) -> Images | Texts | Pairs | RunningText:
    """One data set, read and checked completely; never from the network.

    Args:
        name: a key of ``SOURCES``.
        folder: where the user keeps it (the files may lie in ``folder`` or in ``folder/name``); None: the library's own
            data home, where ``better-attention data fetch`` and ``import`` put it.

    Returns:
        :class:`Images`, :class:`Texts`, :class:`Pairs` or :class:`RunningText`, the same for the same data on every
        machine.

    Raises:
        NotFetched: the data is not there; the message says how to get it.
        DataError: unknown name, or files that are damaged, incomplete or of another layout.

    >>> read("digits").train_images.shape
    (1438, 8, 8)
    """
    row = source(name)
    files = find(row, None if folder is None else Path(folder))
    if files is None:
        where = home() / name if folder is None else folder
        fetch = f"`better-attention data fetch {name}` downloads it, " if row.remotes else ""
        raise NotFetched(
            f"data set {name!r} is not in {where}: {fetch}`better-attention data import {name} FROM` copies it from a "
            f"folder of yours, `--data DIR` reads it there. Layout: {row.layout}."
        )
    return row.load(files)
