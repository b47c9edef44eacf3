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

from better_attention.lab.data.archives import MIB, Readable, tar_streams, zip_streams
from better_attention.lab.data.samples import DataError

from .cache import remembered
from .decode import FILE_LIMIT, SUFFIXES, UNREAD
from .labels import TABLE
from .parquet import ParquetPictures, read_parquet

SPLITS = {"train": "train", **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"), "test": "test"}
"""Name of a folder, or end of an archive's name -> the split it holds."""

_ARCHIVE = re.compile(rf"(.+?)(?:-({'|'.join(SPLITS)}))?\.(?:tar|tar\.gz|tgz|tar\.xz|txz|tar\.bz2|zip)")


def _named(suffixes: Sequence[str]) -> re.Pattern[str]:
    """Members of an archive that end like this, hidden ones left out."""
    kinds = "|".join(map(re.escape, suffixes))
    return re.compile(rf"(?:(?!__MACOSX/|\.)[^/]+/)*(?!\.)[^/]+(?:{kinds})", re.IGNORECASE)


_PICTURE, _OTHER = _named(SUFFIXES), _named(UNREAD)
_READ = _named((*SUFFIXES, ".csv", ".tsv", ".txt"))
_TOTAL_LIMIT = 1 << 40  # bytes of an archive; ImageNet's have 138 GB
_NAME_FILES = ("classes.tsv", "words.txt")
_NAME_LIMIT = 16 * MIB
_TABLES = 16  # files with names or labels that are kept


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
        tables: Parquet files, by what comes after the class in the names of their pictures, with the number of the row.
        texts: name -> contents of the files that may name or label classes, in the two upper levels.
    """

    place: Path
    names: Sequence[str]
    folders: frozenset[str]
    stamp: str
    archives: Mapping[Path, tuple[str, str]]
    unread: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, ParquetPictures] = field(default_factory=dict)

    def contents(self, rows: Mapping[str, int]) -> Iterator[tuple[int, str, bytes | Path]]:
        """Row, name for people and file (or its contents) of the pictures whose names ``rows`` holds.

        Raises:
            DataError: a damaged archive.
        """
        for table, parquet in self.tables.items():
            wanted = {int(name.rpartition("-")[2]): row for name, row in rows.items() if _table_of(name) == table}
            yield from parquet.pictures(wanted) if wanted else ()
        if not self.archives and not self.tables:
            for name in sorted(rows):
                yield rows[name], str(self.place / name), self.place / name
        for archive, (off, on) in self.archives.items():
            waiting = {name: row for name, row in rows.items() if name.startswith(on)}
            for member, stream in _members(archive) if waiting else ():
                row = waiting.pop(on + member.removeprefix(off), None)
                if row is not None:
                    yield row, f"{archive}: {member}", stream.read(-1)
                # What follows in the archive need not be decompressed.
                if not waiting:
                    break

    def called(self) -> list[str]:
        """The lines of the file that names the classes; none if there is no such file."""
        for name in _NAME_FILES:
            file = (self.place if self.place.is_dir() else self.place.parent) / name
            if file.is_file() and file.stat().st_size <= _NAME_LIMIT:
                return file.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((self.texts[name].splitlines() for name in _NAME_FILES if name in self.texts), [])


def grow(place: Path) -> PictureTree:
    """The pictures at ``place``: an archive, a folder that holds archives by split, or a folder.

    Raises:
        DataError: there is nothing of the kind.
    """
    parquet = _parquet_files(place)
    if parquet:
        return _of_parquet(place, parquet)
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


def _parquet_files(place: Path) -> list[Path]:
    """The Parquet files at ``place``: itself, or those in the folder or its data/, if it holds nothing but them."""
    if place.suffix.lower() == ".parquet":
        return [place] if place.is_file() else []
    for folder in (place, place / "data"):
        if not folder.is_dir():
            return []
        files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
        parquet = [file for file in files if file.suffix.lower() == ".parquet" and file.is_file()]
        if parquet and not any(file.is_dir() and file.name != "data" for file in files):
            return parquet
    return []


def _of_parquet(place: Path, files: Sequence[Path]) -> PictureTree:
    """A tree of the pictures in Parquet files: ``SPLIT/CLASS/FILE-ROW``, or without splits if there is one only."""
    tops = [_split_of(file) for file in files]
    if len(set(tops)) > 1 and None in tops:
        named = ", ".join(file.name for file in files[:10])
        raise DataError(f"{place} holds {named}: name each for its split, as in train-*.parquet and test-*.parquet.")
    several = len(set(tops)) > 1
    names: list[str] = []
    stamps: list[str] = []
    tables: dict[str, ParquetPictures] = {}
    for file, top in zip(files, tops, strict=True):
        about = file.stat()
        # The time of the last change of the inode, too: tools that copy files often restore only that of the contents.
        stamps.append(f"{file.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}")
        tables[file.stem] = parquet = read_parquet(file)
        base = f"{top}/" if several else ""
        names += [f"{base}{class_name}/{file.stem}-{row:08}" for row, class_name in enumerate(parquet.classes)]
    return PictureTree(place, sorted(names), frozenset(), "\n".join(stamps), {}, tables=tables)


def _split_of(file: Path) -> str | None:
    """The split that a Parquet file is named for, as in ``train-00000-of-00002.parquet``."""
    first = re.split(r"[-_.]", file.stem.lower())[0]
    return first if first in SPLITS else None


def _table_of(name: str) -> str:
    """The Parquet file that holds a picture, as :func:`_of_parquet` names it."""
    return name.rpartition("/")[2].rpartition("-")[0]


def archives(place: Path) -> list[Path]:
    """The archives in a folder, whatever they hold."""
    return [file for file in sorted(place.iterdir()) if _ARCHIVE.fullmatch(file.name)] if place.is_dir() else []


def _archives(place: Path) -> dict[Path, str]:
    """The archives in a folder that hold a split each -> the split's folder."""
    named = [(file, match) for file in archives(place) if (match := _ARCHIVE.fullmatch(file.name)) and match[2]]
    sets = {match[1] for _, match in named}
    if len(sets) > 1:
        raise DataError(f"{place} holds archives of several data sets ({', '.join(sorted(sets))}). Keep one.")
    splits = [SPLITS[match[2]] for _, match in named]
    if named and ("train" not in splits or len(set(splits)) < len(splits)):
        raise DataError(
            f"{place} holds {', '.join(file.name for file, _ in named)}: one archive NAME-train.tar.* is needed, "
            "and at most one a split beside it."
        )
    return {file: match[2] for file, match in named}


def _of_archives(place: Path, archives: Mapping[Path, str]) -> PictureTree:
    """A tree of archives; each lies in the folder of its split, unless its members say so themselves."""
    stamps, names, folds = [], [], {}
    texts: dict[str, str] = {}
    unread: Counter[str] = Counter()
    for archive, split in archives.items():
        about = archive.stat()
        stamp = f"{archive.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        # The number goes up when more is listed, so that lists of earlier versions are not used.
        key = hashlib.sha256(f"4 members {stamp}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
        # Listing a compressed archive means decompressing it, hence the list is kept.
        listed = remembered(key, partial(_listed, archive))
        members = [str(name) for name in listed["pictures"]]
        unread.update({str(kind): int(number) for kind, number in listed["unread"].items()})
        off = _shared_root(members, split)
        folds[archive] = (off, f"{split}/" if split else "")
        names += [folds[archive][1] + member.removeprefix(off) for member in members]
        for member, text in listed["texts"].items():
            name = folds[archive][1] + str(member).removeprefix(off)
            if str(member).startswith(off) and name.count("/") <= 1:
                texts[name] = str(text)
        stamps.append(stamp)
    folders = {
        "/".join(parts[:depth]) for parts in (name.split("/", 2) for name in names) for depth in range(1, len(parts))
    }
    return PictureTree(place, sorted(names), frozenset(folders), "\n".join(stamps), folds, unread, texts)


def _shared_root(members: Sequence[str], split: str) -> str:
    """The folders above the classes that all members share: ``photos/``, ``train/``; "" if they share none."""
    root = ""
    while members:
        first = members[0][len(root) :].partition("/")[0]
        below = f"{root}{first}/"
        inside = all(name.startswith(below) and "/" in name[len(below) :] for name in members)
        # train/ is a split, and no folder above the classes.
        if not inside or (first == "train" and not split):
            break
        root = below
        if first == split:
            break
    return root


def _members(
    archive: Path, wanted: re.Pattern[str] = _PICTURE, skipped: Callable[[str], object] = lambda name: None
) -> Iterator[tuple[str, Readable]]:
    """Name and contents of every wanted member of an archive; ``skipped`` hears of other files."""
    if archive.suffix == ".zip":
        streams = zip_streams(archive, wanted, member_limit=FILE_LIMIT, skipped=skipped)
    else:
        limits = {"member_limit": FILE_LIMIT, "total_limit": _TOTAL_LIMIT}
        streams = tar_streams(archive, wanted, **limits, plain=True, skipped=skipped)
    for match, stream in streams:
        yield match[0], stream


def _listed(archive: Path) -> dict[str, object]:
    """``"pictures"``, their names; ``"unread"``, ending -> how many pictures of a kind not read; and ``"texts"``."""
    unread: Counter[str] = Counter()

    def skipped(name: str) -> None:
        if _OTHER.fullmatch(name):
            unread[_suffix(name)] += 1

    names: list[str] = []
    texts: dict[str, str] = {}
    for name, stream in _members(archive, _READ, skipped):
        if _PICTURE.fullmatch(name):
            names.append(name)
        elif _is_table(name) and len(texts) < _TABLES and (text := _text(stream)) is not None:
            texts[name] = text
    return {"pictures": names, "unread": dict(unread), "texts": texts}


def _is_table(name: str) -> bool:
    """Whether a file may name or label classes."""
    file_name = name.rpartition("/")[2]
    return file_name in _NAME_FILES or TABLE.fullmatch(file_name) is not None


def _text(stream: Readable) -> str | None:
    """The text in a file; None if it is too large to be a table of classes."""
    data = b""
    while more := stream.read(MIB):
        data += more
        if len(data) > _NAME_LIMIT:
            return None
    return data.decode("utf-8", "replace")


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _of_folder(place: Path) -> PictureTree:
    """Every picture below a folder; links are followed, though never in a circle, and hidden files left out."""
    names: list[str] = []
    texts: dict[str, str] = {}
    unread: Counter[str] = Counter()
    folders: set[str] = set()
    digest = hashlib.sha256(str(place.resolve()).encode("utf-8", "surrogateescape"))
    waiting: list[tuple[str, Path, frozenset[tuple[int, int]]]] = [("", place, frozenset())]
    while waiting:
        prefix, folder, above = waiting.pop()
        about = folder.stat()
        identity = (about.st_dev, about.st_ino)
        # A folder that is its own ancestor came by a link, and following it would never end.
        if identity in above:
            continue
        with os.scandir(folder) as entries:
            # Sorted, because a file system lists names in any order and the digest depends on it.
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    waiting.append((f"{name}/", Path(entry.path), above | {identity}))
                    if name.count("/") < 2:
                        folders.add(name)
                elif entry.name.lower().endswith(UNREAD):
                    unread[_suffix(name)] += 1
                elif entry.name.lower().endswith(SUFFIXES):
                    names.append(name)
                    digest.update(_stamp(entry).encode("utf-8", "surrogateescape"))
                elif name.count("/") <= 1 and len(texts) < _TABLES and _is_table(name) and entry.is_file():
                    digest.update(_stamp(entry).encode("utf-8", "surrogateescape"))  # it decides the order of pictures
                    with Path(entry.path).open("rb") as file:
                        text = _text(file)
                    if text is not None:
                        texts[name] = text
    return PictureTree(place, sorted(names), frozenset(folders), digest.hexdigest(), {}, unread, texts)


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
