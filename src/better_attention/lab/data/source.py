"""What the program knows about a published data set: where it comes from, and how its official layout is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .download import Remote
from .samples import Images, Pairs, RunningText, Texts

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
        locate: the files of the data set at or in a folder, None if they are not there; raises if they are incomplete.
        remotes: what can be fetched, digests included. Empty: embedded (no ``locate``), or to be imported only.
        members: the files of an unpacked folder by their names in the archive, so that it can be packed again.
    """

    name: str
    title: str
    terms: str
    layout: str
    load: Callable[[Files], Images | Texts | Pairs | RunningText]
    locate: Callable[[Path], Files | None] | None = None
    remotes: tuple[Remote, ...] = ()
    members: Callable[[Path], Iterator[tuple[str, Path]]] | None = None

    @property
    def embedded(self) -> bool:
        """Whether it needs no files of its own."""
        return self.locate is None
