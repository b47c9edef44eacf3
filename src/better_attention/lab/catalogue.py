"""Catalogues: folders in which every file is one entry, such as a task or a published data set."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class Catalogue(Mapping[str, Entry]):
    """The entries of a folder by the names of its files, hyphens for underscores, in alphabetical order.

    A new file is a new entry: there is no list to keep. A file is imported only when its entry is asked for, so that
    the names alone (for help texts and choices) cost no import.

    Args:
        package: dotted name of the folder.
        folders: where its files lie, the package's ``__path__``.
        attribute: name of the entry in each file; "": it is called like the file.
    """

    def __init__(self, package: str, folders: Iterable[str], attribute: str = "") -> None:
        self._package, self._folders, self._attribute = package, folders, attribute

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(self._folders)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __getitem__(self, name: str) -> Entry:
        # Names of files alone: import_module would follow a dotted name to somewhere else.
        if name not in self:
            raise KeyError(name)
        file = name.replace("-", "_")
        module = importlib.import_module(f"{self._package}.{file}")
        entry: Entry = getattr(module, self._attribute or file)
        return entry
