"""The data sets the library knows, as rows of one table, and the one function that reads any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from .download import Remote
from .published import amazon, cifar100, digits, imdb, mnist, translation
from .samples import DataError, Images, NotFetched, Pairs, Texts
from .store import NoHome, home

Files: TypeAlias = tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set comes from and how its official layout is read.

    Args:
        name: its name everywhere: command line, tasks, folder below the data home.
        title: one line for people.
        terms: who made it, and under which terms it may be used.
        layout: the official layout, in words.
        load: reads the files that ``locate`` found.
        locate: the files of the data set at or in a place, None if there are none; raises if they are incomplete.
        remotes: what can be fetched, digests included. Empty: embedded (no ``locate``), or to be imported only.
        members: the files of an unpacked folder by their names in the archive, so that it can be packed again.
    """

    name: str
    title: str
    terms: str
    layout: str
    load: Callable[[Files], Images | Texts | Pairs]
    locate: Callable[[Path], Files | None] | None = None
    remotes: tuple[Remote, ...] = ()
    members: Callable[[Path], Iterator[tuple[str, Path]]] | None = None

    @property
    def embedded(self) -> bool:
        """Whether it needs no files of its own."""
        return self.locate is None


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        source.name: source
        for source in (
            Source(
                name="digits",
                title="1,797 handwritten digits, 8×8, carried by scikit-learn",
                terms="Alpaydin, Kaynak 1998, UCI Machine Learning Repository",
                layout="none: scikit-learn carries it",
                load=lambda files: digits.read(),
            ),
            Source(
                name="mnist",
                title="70,000 handwritten digits, 28×28",
                terms="LeCun, Cortes, Burges; CC BY-SA 3.0",
                layout=mnist.LAYOUT,
                load=mnist.read,
                locate=mnist.locate,
                remotes=mnist.REMOTES,
            ),
            Source(
                name="cifar100",
                title="60,000 photographs of 100 kinds of things, 32×32",
                terms="Krizhevsky 2009; no licence stated, with citation",
                layout=cifar100.LAYOUT,
                load=cifar100.read,
                locate=cifar100.locate,
                remotes=cifar100.REMOTES,
                members=cifar100.members,
            ),
            Source(
                name="imdb",
                title="50,000 movie reviews, positive or negative",
                terms="Maas et al. 2011; academic use, with citation",
                layout=imdb.LAYOUT,
                load=imdb.read,
                locate=imdb.locate,
                remotes=imdb.REMOTES,
                members=imdb.members,
            ),
            Source(
                name="amazon",
                title="product reviews, one to five stars (officially 3,650,000)",
                terms="Zhang, Zhao, LeCun 2015, from McAuley, Leskovec 2013; research use, with citation",
                layout=amazon.LAYOUT,
                load=amazon.read,
                locate=amazon.locate,
            ),
            Source(
                name="translation",
                title="English sentences and their Spanish translations: Anki and Europarl",
                terms="Tatoeba (tatoeba.org), CC BY 2.0 FR; Koehn 2005 (Europarl v7), no known restriction",
                layout=translation.LAYOUT,
                load=translation.read,
                locate=translation.locate,
            ),
        )
    }
)
"""Every data set, by name."""


def source(name: str) -> Source:
    """The row called ``name``.

    Raises:
        DataError: no such data set.
    """
    if name not in SOURCES:
        raise DataError(
            f"unknown data set {name!r}: choose one of {', '.join(SOURCES)}. The tasks imagenet, images and text read "
            "folders and files of yours: `better-attention compare images --data DIR`."
        )
    return SOURCES[name]


def find(source: Source, folder: Path | None = None) -> Files | None:
    """The files of ``source`` in ``folder`` or ``folder/NAME``; None if there are none.

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


def read(name: str, folder: Path | None = None) -> Images | Texts | Pairs:
    """One data set, read and checked completely; never from the network.

    Args:
        name: a key of ``SOURCES``.
        folder: where the user keeps it (the files may lie in ``folder`` or in ``folder/name``); None: the library's own
            data home, where ``better-attention data fetch`` and ``import`` put it.

    Returns:
        :class:`Images`, :class:`Texts` or :class:`Pairs`, the same for the same data on every machine.

    Raises:
        NotFetched: the data is not there; the message says how to get it.
        DataError: unknown name, or files that are damaged, incomplete or of another layout.

    >>> read("digits").train_images.shape
    (1438, 8, 8)
    """
    row = source(name)
    files = find(row, None if folder is None else Path(folder))
    if files is None:
        place = home() / name if folder is None else folder
        fetch = f"`better-attention data fetch {name}` downloads it, " if row.remotes else ""
        raise NotFetched(
            f"data set {name!r} is not in {place}: {fetch}`better-attention data import {name} FROM` copies it from a "
            f"folder of yours, `--data DIR` reads it there. Layout: {row.layout}."
        )
    return row.load(files)
