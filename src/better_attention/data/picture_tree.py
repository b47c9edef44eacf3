"""The picture files below a folder or in archives, by name, and their contents."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from .archives import MIB, tar_streams, zip_streams
from .containers import DataError
from .image_cache import remembered
from .picture import FILE_LIMIT, SUFFIXES, UNREAD

SPLITS = {"train": "train", **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"), "test": "test"}
"""Name of a folder, or end of an archive's name -> the split it holds."""

_ARCHIVE = re.compile(rf"(.+?)(?:-({'|'.join(SPLITS)}))?\.(?:tar|tar\.gz|tgz|tar\.xz|txz|tar\.bz2|zip)")


def _named(suffixes: Sequence[str]) -> re.Pattern[str]:
    """Members of an archive that end like this, hidden ones left out."""
    kinds = "|".join(map(re.escape, suffixes))
    return re.compile(rf"(?:(?!__MACOSX/|\.)[^/]+/)*(?!\.)[^/]+(?:{kinds})", re.IGNORECASE)


_PICTURE, _OTHER = _named(SUFFIXES), _named(UNREAD)
_TOTAL_LIMIT = 1 << 40  # bytes of an archive; ImageNet's have 138 GB
_NAME_FILES = ("classes.tsv", "words.txt")
_NAME_LIMIT = 16 * MIB


@dataclass(frozen=True, eq=False)
class PictureTree:
    """Names of pictures, as if all lay below one folder.

    Args:
        place: the folder, or the folder of the archives, or the archive.
        names: of the pictures, with ``/``, sorted.
        folders: of the two upper levels, those without a picture included.
        stamp: changes whenever a picture was added, removed or replaced.
        archives: archive -> what to take from the front of a member's name, and what to put there instead.
        unread: how a name ends -> how many pictures of such a kind there are, which is not read.
    """

    place: Path
    names: Sequence[str]
    folders: frozenset[str]
    stamp: str
    archives: Mapping[Path, tuple[str, str]]
    unread: Mapping[str, int] = field(default_factory=dict)

    def contents(self, rows: Mapping[str, int]) -> Iterator[tuple[int, str, bytes | Path]]:
        """Row, name for people and file (or its contents) of the pictures whose names ``rows`` holds.

        Raises:
            DataError: a damaged archive.
        """
        if not self.archives:
            for name in sorted(rows):
                yield rows[name], str(self.place / name), self.place / name
        for archive, (off, on) in self.archives.items():
            waiting = {name: row for name, row in rows.items() if name.startswith(on)}
            for member, data in _members(archive, read=True) if waiting else ():
                row = waiting.pop(on + member.removeprefix(off), None)
                if row is not None:
                    yield row, f"{archive}: {member}", data
                if not waiting:
                    break

    def called(self) -> list[str]:
        """The lines of the file that names the classes; none if there is no such file."""
        for name in _NAME_FILES:
            file = (self.place if self.place.is_dir() else self.place.parent) / name
            if file.is_file() and file.stat().st_size <= _NAME_LIMIT:
                return file.read_text(encoding="utf-8", errors="replace").splitlines()
        return []


def grow(place: Path) -> PictureTree:
    """The pictures at ``place``: an archive, a folder that holds archives by split, or a folder.

    Raises:
        DataError: there is nothing of the kind.
    """
    if place.is_file():
        if not _ARCHIVE.fullmatch(place.name):
            raise DataError(f"{place} is no folder and no archive (.tar, .tar.gz, .tar.xz, .zip) of pictures.")
        return _of_archives(place, {place: ""})
    if not place.is_dir():
        raise DataError(f"{place} does not exist: name the folder with the pictures.")
    if not (place / "train").is_dir():
        by_split = _archives(place)
        if by_split:
            return _of_archives(place, by_split)
    return _of_folder(place)


def archives(place: Path) -> list[Path]:
    """The archives in a folder, whatever they hold."""
    return [file for file in sorted(place.iterdir()) if _ARCHIVE.fullmatch(file.name)] if place.is_dir() else []


def _archives(place: Path) -> dict[Path, str]:
    """The archives in a folder that hold a split each -> the split's folder."""
    found = [(file, match) for file in archives(place) if (match := _ARCHIVE.fullmatch(file.name)) and match[2]]
    sets = {match[1] for _, match in found}
    if len(sets) > 1:
        raise DataError(f"{place} holds archives of several data sets ({', '.join(sorted(sets))}). Keep one.")
    splits = [SPLITS[match[2]] for _, match in found]
    if found and ("train" not in splits or len(set(splits)) < len(splits)):
        raise DataError(
            f"{place} holds {', '.join(file.name for file, _ in found)}: one archive NAME-train.tar.* is needed, "
            "and at most one a split beside it."
        )
    return {file: match[2] for file, match in found}


def _of_archives(place: Path, archives: Mapping[Path, str]) -> PictureTree:
    """A tree of archives; each lies in the folder of its split, unless its members say so themselves."""
    stamps, names, folds = [], [], {}
    unread: Counter[str] = Counter()
    for archive, split in archives.items():
        about = archive.stat()
        stamp = f"{archive.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        key = hashlib.sha256(f"3 members {stamp}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
        listed = remembered(key, partial(_listed, archive))
        members = [str(name) for name in listed["pictures"]]
        unread.update({str(kind): int(number) for kind, number in listed["unread"].items()})
        off = _shared_root(members, split)
        folds[archive] = (off, f"{split}/" if split else "")
        names += [folds[archive][1] + member.removeprefix(off) for member in members]
        stamps.append(stamp)
    folders = {
        "/".join(parts[:depth]) for parts in (name.split("/", 2) for name in names) for depth in range(1, len(parts))
    }
    return PictureTree(place, sorted(names), frozenset(folders), "\n".join(stamps), folds, unread)


def _shared_root(members: Sequence[str], split: str) -> str:
    """The folders above the classes that all members share: ``photos/``, ``train/``; "" if there are none."""
    root = ""
    while members:
        first = members[0][len(root) :].partition("/")[0]
        below = f"{root}{first}/"
        inside = all(name.startswith(below) and "/" in name[len(below) :] for name in members)
        if not inside or (first == "train" and not split):
            break
        root = below
        if first == split:
            break
    return root


def _members(
    archive: Path, *, read: bool = False, skipped: Callable[[str], object] = lambda name: None
) -> Iterator[tuple[str, bytes]]:
    """Name and, where it is to be read, content of every picture in an archive; ``skipped`` hears of other files."""
    if archive.suffix == ".zip":
        streams = zip_streams(archive, _PICTURE, member_limit=FILE_LIMIT, skipped=skipped)
    else:
        limits = {"member_limit": FILE_LIMIT, "total_limit": _TOTAL_LIMIT}
        streams = tar_streams(archive, _PICTURE, **limits, plain=True, skipped=skipped)
    for match, stream in streams:
        yield match[0], stream.read(-1) if read else b""


def _listed(archive: Path) -> dict[str, object]:
    """``"pictures"``, their names, and ``"unread"``, how a name ends -> how many there are of a kind not read."""
    unread: Counter[str] = Counter()

    def skipped(name: str) -> None:
        if _OTHER.fullmatch(name):
            unread[_suffix(name)] += 1

    names = [name for name, _ in _members(archive, skipped=skipped)]
    return {"pictures": names, "unread": dict(unread)}


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _of_folder(place: Path) -> PictureTree:
    """Every picture below a folder; links are followed, though never in a circle, and hidden files left out."""
    names: list[str] = []
    unread: Counter[str] = Counter()
    folders: set[str] = set()
    digest = hashlib.sha256(str(place.resolve()).encode("utf-8", "surrogateescape"))
    waiting: list[tuple[str, Path, frozenset[tuple[int, int]]]] = [("", place, frozenset())]
    while waiting:
        prefix, folder, above = waiting.pop()
        about = folder.stat()
        own = (about.st_dev, about.st_ino)
        if own in above:
            continue
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    waiting.append((f"{name}/", Path(entry.path), above | {own}))
                    if name.count("/") < 2:
                        folders.add(name)
                elif entry.name.lower().endswith(UNREAD):
                    unread[_suffix(name)] += 1
                elif entry.name.lower().endswith(SUFFIXES):
                    names.append(name)
                    digest.update(_stamp(entry).encode("utf-8", "surrogateescape"))
    return PictureTree(place, sorted(names), frozenset(folders), digest.hexdigest(), {}, unread)


def _stamp(entry: os.DirEntry[str]) -> str:
    try:
        about = entry.stat()
    except OSError as error:
        raise DataError(
            f"{entry.path} cannot be read ({error.strerror}): a link that leads nowhere? Remove it."
        ) from None
    if not stat.S_ISREG(about.st_mode):
        raise DataError(f"{entry.path} is no regular file. Remove it.")
    return f"{entry.path}\0{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}\0"
