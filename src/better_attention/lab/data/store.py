"""The library's own data home: what lies there, where it came from, and how it gets there.

``HOME/NAME/`` holds a data set in its official layout and ``origin.json``, which says how it came there
and which SHA-256 was seen. Everything that enters is written under another name first and then renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from better_attention.lab.files import digest, remove_leftovers, replacing

from .archives import pack
from .download import Remote, download
from .home import home
from .samples import DataError
from .source import Source

if TYPE_CHECKING:
    import requests

ORIGIN = "origin.json"
_ANY_NAME = re.compile(".*", re.DOTALL)  # every file in the folder of a data set is ours


def fetch(
    source: Source,
    folder: Path | None = None,
    *,
    session: requests.Session | None = None,
    hosts: Collection[str] | None = None,
    progress: Callable[[Remote, int], None] | None = None,
) -> Path:
    """Download the official files of ``source`` into ``folder/NAME``; files already there and right are kept.

    Args:
        source: what to fetch.
        folder: the data home to fill; None: the library's own.
        session: the connection to use, for tests and unusual networks.
        hosts: the hosts that may be asked, also by redirects; None: of each file, the host in its address.
        progress: called with a file and how much of it is there.

    Returns:
        The folder that now holds the data.

    Raises:
        DataError: no digest is known for it, the download fails, or there is no room.
    """
    if source.embedded:
        raise DataError(f"{source.name!r} needs no download: {source.layout}.")
    if not source.remotes:
        raise DataError(
            f"{source.name!r} can only be imported: no published SHA-256 of its files could be cited. Get it "
            f"({source.layout}) and use `better-attention data import {source.name} FROM`."
        )
    target = (folder or home()) / source.name
    with _exclusive(target):
        files = {}
        for remote in source.remotes:
            report = None if progress is None else lambda done, remote=remote: progress(remote, done)
            download(remote, target, session=session, hosts=hosts, progress=report)
            files[remote.name] = remote.sha256
        _record(target, "fetched", files)
    return target


def import_from(source: Source, place: Path, folder: Path | None = None) -> Path:
    """Copy ``source`` from ``place`` into ``folder/NAME``, after reading it completely.

    Args:
        source: what to import.
        place: a folder or file of the official layout; an unpacked archive is packed again.
        folder: the data home to fill; None: the library's own.

    Returns:
        The folder that now holds the data; ``origin.json`` there records each file's SHA-256.

    Raises:
        DataError: ``place`` does not hold the data set, or it is damaged; nothing was changed then.
    """
    if source.locate is None:
        raise DataError(f"{source.name!r} needs no import: {source.layout}.")
    if not place.exists():
        raise DataError(f"{place} does not exist: name the folder or file that holds {source.name} ({source.layout}).")
    sources = source.locate(place) or source.locate(place / source.name)
    if sources is None:
        raise DataError(f"{place} does not hold {source.name}: expected {source.layout}.")
    # Before anything is written: a damaged copy must not take the place of a good one.
    source.load(sources)

    target = (folder or home()) / source.name
    if any(file.parent.resolve() == target.resolve() for file in sources):
        raise DataError(f"{place} is where {source.name} already lies; there is nothing to import.")
    with _exclusive(target):
        files = {}
        for file in sources:
            name = _stored_name(source, file)
            files[name] = _write(target / name, _packer(source, file) if file.is_dir() else _copier(file))
        _record(target, "imported", files)
        # locate() prefers some names to others, so an older copy under another name would be read in place of this one.
        in_place = source.locate(target)
        if in_place != tuple(target / name for name in files):
            others = ", ".join(str(file) for file in in_place or () if file.name not in files)
            raise DataError(f"imported, but {others} lies there too and takes precedence. Remove it.")
    return target


def origin(target: Path) -> Mapping[str, Any] | None:
    """What is recorded of the data in ``target``, ``{"how": ..., "files": {name: sha256}}``; None if nothing is."""
    try:
        record = json.loads((target / ORIGIN).read_text(encoding="utf-8"))
        files = record["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    plain = isinstance(files, dict) and all(
        # These names are removed by a later import: one with a separator in it would reach files outside of the folder.
        isinstance(name, str) and Path(name).name == name and re.fullmatch("[0-9a-f]{64}", str(value))
        for name, value in files.items()
    )
    return record if plain and record.get("how") in ("fetched", "imported") else None


def _stored_name(source: Source, file: Path) -> str:
    """The name in the home: one archive gets the official name, what has several files or no address keeps its own."""
    if len(source.remotes) != 1:
        return file.name
    official = source.remotes[0].name
    if file.is_dir() or not official.endswith(".gz"):
        return official
    with file.open("rb") as stream:
        # By its content, since the name may lie: a file in the xz format begins with the bytes FD 37.
        suffix = ".xz" if stream.read(2) == b"\xfd7" else ".gz"
    return official.removesuffix(".gz") + suffix


def _copier(file: Path) -> Callable[[BinaryIO], object]:
    def copy(target: BinaryIO) -> None:
        with file.open("rb") as stream:
            shutil.copyfileobj(stream, target, 1 << 20)

    return copy


def _packer(source: Source, folder: Path) -> Callable[[BinaryIO], object]:
    if source.members is None:
        raise DataError(f"{folder} is a folder; {source.name} is imported from files ({source.layout}).")
    members = source.members(folder)
    return lambda target: pack(members, target)


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> str:
    """Write a file that is either whole or not there; returns its SHA-256. The caller holds the folder's lock."""
    try:
        with replacing(path) as file:
            fill(file)
        return digest(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. Make room or take another folder with `--data DIR`."
        ) from None


def _record(target: Path, how: str, files: Mapping[str, str]) -> None:
    """Say where the files came from, and remove those of the copy that was there before."""
    before = origin(target)
    text = json.dumps({"how": how, "files": files}, indent=2) + "\n"
    _write(target / ORIGIN, lambda file: file.write(text.encode()))
    # Last, so that the earlier copy stays usable until the new one is complete and recorded.
    for name in before["files"] if before else ():
        if name not in files:
            (target / name).unlink(missing_ok=True)


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """One writer at a time: two downloads into one part would ruin each other's."""
    import filelock

    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise DataError(f"another better-attention is filling {target} now. Wait until it is done.") from None
    except OSError as error:
        raise DataError(f"cannot write to {target}: {error.strerror or error}. Try `--data DIR`.") from None
    try:
        remove_leftovers(target, _ANY_NAME)  # of an import that was killed
        yield
    finally:
        lock.release()
