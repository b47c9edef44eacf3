"""Reading compressed files, tar and zip archives of unknown origin, without trusting them.

Everything is read as a stream and nothing is ever extracted: a member's name is only compared with the
names that are wanted, so that no path of an archive reaches the file system. What is too large, expands
too much, ends early, fails its checksum, or could point outside the archive is refused by name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, Self

from .samples import DataError

MIB = 1 << 20
AGAIN = "Delete it and fetch or copy it again."

_CHUNK = MIB // 4
_RATIO = 100  # text and pictures compress 2 to 10 times; only made-up data reaches a hundred
_RATIO_FROM = MIB  # below this size the ratio says nothing: a few zeros compress as well
_XZ_MEMORY = 256 * MIB  # `xz -9` needs 65 MiB; a forged header asks for gigabytes
_GZIP, _XZ, _BZ2, _ZIP = b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh", b"PK\3\4"

_NAME_LIMIT = 4096  # characters of a member's whole name: the longest path that Linux opens
_DEPTH = 64  # folders above a member
_MEMBERS = 1 << 22  # of one archive
_NAMES_LIMIT = 256 * MIB  # characters of all their names
_HEADER_LIMIT = MIB // 4  # bytes of an extended tar header, which tarfile reads as a whole
_GLOBAL_LIMIT = 4096  # bytes of a header for all members that follow: git writes 52
_GLOBALS = 1000  # entries of all such headers, which tarfile keeps
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_ZIP_END = struct.Struct("<4s4H2LH")  # the record at the end of a zip archive
_ZIP64_LOCATOR, _ZIP64_END = struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")


class Readable(Protocol):
    """What the readers here need of a file."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


class Bounded:
    """A stream that counts what it gives out and stops before that becomes dangerous.

    Args:
        path: the file, for messages.
        stream: its decompressed contents.
        limit: the most bytes that may come out.
        compressed: the file's size in bytes, or None where nothing is decompressed.
    """

    def __init__(self, path: Path, stream: Readable, limit: int, compressed: int | None) -> None:
        self._path, self._stream, self._limit, self.compressed = path, stream, limit, compressed
        self._total = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end, and only where the end is the true one.

        Raises:
            DataError: the file is cut short or damaged, or more comes out than the limits allow.
        """
        try:
            # In pieces, so that little has come out by the time a limit is passed.
            data = self._stream.read(min(size, _CHUNK))
        except EOFError:
            raise DataError(f"{self._path} is cut short: its compressed data has no end. {AGAIN}") from None
        except (OSError, zlib.error, lzma.LZMAError) as error:  # gzip's and bz2's word, and an unreadable disk's
            raise DataError(f"{self._path} is damaged ({error}). {AGAIN}") from None
        self._total += len(data)
        if self._total > self._limit:
            raise DataError(
                f"{self._path} holds more than the {self._limit:,} bytes expected of it at most: it is not the file it "
                f"should be. {AGAIN}"
            )
        if self.compressed and self._total > max(_RATIO_FROM, _RATIO * self.compressed):
            raise DataError(
                f"{self._path} expands to more than {_RATIO} times its size of {self.compressed:,} bytes, as no real "
                f"data does. {AGAIN}"
            )
        return data


class _XzStream:
    """``lzma.LZMAFile`` with a memory limit, which that class does not offer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def read(self, size: int, /) -> bytes:
        while not self._decompressor.eof:
            # It may still hold output that went beyond the size asked for; only then does it want no input.
            hungry = self._decompressor.needs_input
            data = self._file.read(_CHUNK) if hungry else b""
            if hungry and not data:
                raise EOFError
            if out := self._decompressor.decompress(data, size):
                return out
        # The format allows zero bytes as padding behind the stream, and nothing else is accepted.
        if self._decompressor.unused_data.strip(b"\0") or self._file.read(1).strip(b"\0"):
            raise lzma.LZMAError("more data after the end of the xz stream")
        return b""


@contextmanager
def decompressed(path: Path, *, limit: int, plain: bool = False) -> Iterator[Bounded]:
    """The contents of a ``.gz``, ``.bz2`` or ``.xz`` file as a stream; the content decides which it is, not the name.

    Args:
        path: the file.
        limit: the most bytes that may come out.
        plain: whether a file that is not compressed is read as it is; refused otherwise.

    Raises:
        DataError: not a file, empty, a web page, or (without ``plain``) neither gzip, bzip2 nor xz.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = _head(path, file)
        if head.startswith(_GZIP):
            with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                yield Bounded(path, stream, limit, size)
        elif head.startswith(_XZ):
            yield Bounded(path, _XzStream(file), limit, size)
        elif head.startswith(_BZ2):
            with bz2.BZ2File(file) as bzipped:
                yield Bounded(path, bzipped, limit, size)
        elif plain:
            # Nothing is decompressed, so that there is no ratio to keep to.
            yield Bounded(path, file, limit, None)
        elif head.startswith(_ZIP):
            raise DataError(f"{path} is a .zip archive, which is not read here. Unpack it, and name the folder.")
        else:
            raise DataError(f"{path} is neither gzip, bzip2 nor xz: it starts with {head[:8]!r}. {AGAIN}")


def tar_members(
    path: Path, wanted: re.Pattern[str], *, member_limit: int, total_limit: int
) -> Iterator[tuple[re.Match[str], bytes]]:
    """The wanted members of a tar archive as :func:`tar_streams` finds them, each as ``(matched name, contents)``."""
    for match, stream in tar_streams(path, wanted, member_limit=member_limit, total_limit=total_limit):
        yield match, stream.read(-1)


def tar_streams(
    path: Path,
    wanted: re.Pattern[str],
    *,
    member_limit: int,
    total_limit: int,
    plain: bool = False,
    skipped: Callable[[str], object] = lambda name: None,
) -> Iterator[tuple[re.Match[str], Readable]]:
    """The wanted members of a compressed tar archive, in archive order, each as ``(matched name, its contents)``.

    The contents can be read until the next member is asked for.

    Args:
        path: the archive.
        wanted: what a member's whole name must match; others are skipped, though never if they are unsafe.
        member_limit: the most bytes of one wanted member.
        total_limit: the most bytes of the whole archive, decompressed.
        plain: whether an archive that is not compressed is read too.
        skipped: hears the name of every file that is not wanted.

    Raises:
        DataError: a damaged archive, an unsafe or repeated member, or a limit passed.
    """
    seen: set[str] = set()
    census = _Census(path)
    with decompressed(path, limit=total_limit, plain=plain) as stream, _open_tar(path, stream) as tar:
        while (member := _next(path, tar)) is not None:
            # tarfile keeps every header it has read; a hundred thousand of them are 100 MB.
            tar.members.clear()  # type: ignore[attr-defined]
            census.count(member.name)
            # Before the name is compared: an unsafe member spoils the archive even where nobody wants it.
            _check_safe(path, member)
            # An archive of the folder "." has this in front of every name.
            name = member.name.removeprefix("./")
            match = wanted.fullmatch(name) if member.isreg() else None
            if match is None:
                if member.isreg():
                    skipped(name)
                continue
            if member.size > member_limit:
                raise DataError(
                    f"{path}: member {name!r} has {member.size:,} bytes; at most {member_limit:,} are expected. {AGAIN}"
                )
            # In a tar archive a later member replaces an earlier one, and readers differ in which of the two they take.
            if name in seen:
                raise DataError(f"{path}: member {name!r} occurs twice. {AGAIN}")
            seen.add(name)
            yield match, _Member(path, tar.extractfile(member))  # type: ignore[arg-type] # a regular file is never None
        _check_end(path, tar)


class _Member:
    """A member's contents; errors name the archive."""

    def __init__(self, path: Path, stream: Readable) -> None:
        self._path, self._stream = path, stream

    def read(self, size: int, /) -> bytes:
        with _damage_named(self._path):
            return self._stream.read(size)


def zip_members(
    path: Path, wanted: re.Pattern[str], *, member_limit: int, skipped: Callable[[str], object] = lambda name: None
) -> Iterator[tuple[re.Match[str], bytes]]:
    """The wanted members of a ``.zip`` as :func:`zip_streams` finds them, each as ``(matched name, contents)``."""
    for match, stream in zip_streams(path, wanted, member_limit=member_limit, skipped=skipped):
        yield match, stream.read(-1)


def zip_streams(
    path: Path, wanted: re.Pattern[str], *, member_limit: int, skipped: Callable[[str], object] = lambda name: None
) -> Iterator[tuple[re.Match[str], Readable]]:
    """The wanted members of a ``.zip``, in archive order, each as ``(matched name, its contents)``.

    The contents can be read until the next member is asked for. Where no name has a slash, backslashes separate
    folders, as some programs for Windows write them; elsewhere a backslash is a character like any other.

    Args:
        path: the archive.
        wanted: what a member's whole name must match; others are skipped, though never if they are unsafe.
        member_limit: the most bytes of one wanted member.
        skipped: hears the name of every file that is not wanted.

    Raises:
        DataError: a damaged archive, an unsafe, encrypted or repeated member, or a limit passed.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file.")
    with path.open("rb") as file:
        # An empty file or a web page is named as what it is, before zipfile calls it damaged.
        _head(path, file)
        _check_directory(path, file)
        with _damage_named(path, "zip archive"):
            archive = zipfile.ZipFile(file)
        members, census = archive.infolist(), _Census(path)
        for member in members:
            # The name as stored: zipfile cuts its own version of it at a zero byte.
            census.count(member.orig_filename)
            # The upper 16 bits hold the mode of a Unix file.
            link = stat.S_ISLNK(member.external_attr >> 16)
            _refuse_unsafe(path, member.orig_filename, "a link" if link else "")
        if sum(member.compress_size for member in members) > path.stat().st_size:
            raise DataError(f"{path}: its members overlap, so that few bytes stand for many. {AGAIN}")
        windows = not any("/" in member.filename for member in members)
        seen: set[str] = set()
        for member in members:
            name = member.filename.replace("\\", "/") if windows else member.filename
            match = None if member.is_dir() else wanted.fullmatch(name)
            if match is None:
                if not member.is_dir():
                    skipped(name)
                continue
            if name in seen:
                raise DataError(f"{path}: member {name!r} occurs twice. {AGAIN}")
            seen.add(name)
            # Bit 0 marks an encrypted member.
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{path}: member {name!r} is encrypted, or compressed in an unusual way.")
            with _damage_named(path, "zip archive"):
                stream = archive.open(member)
            with stream:
                # What comes out is counted: the sizes in the directory may be forged.
                yield match, _ZipMember(path, Bounded(path, stream, member_limit, member.compress_size))


class _ZipMember:
    """A member's contents, which have to be read in pieces; errors name the archive."""

    def __init__(self, path: Path, stream: Readable) -> None:
        self._path, self._stream = path, stream

    def read(self, size: int, /) -> bytes:
        with _damage_named(self._path, "zip archive"):
            return _everything(self._stream) if size < 0 else self._stream.read(size)


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Refuse a zip archive with too many members before its directory is read, which Python does as a whole.

    The archive's own count may be forged, and Python does not go by it: what counts is how large the directory is, of
    which each member takes 46 bytes and its name. Whatever else is wrong is left to Python to find.
    """
    size = path.stat().st_size
    start = max(0, size - _ZIP_END.size - 0xFFFF)  # a comment of at most 65,535 bytes follows the record
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    directory = 0
    if at >= 0 and len(tail) - at >= _ZIP_END.size:
        # Field 5 is the size of the directory, and so is field 8 of the longer record that large archives have.
        directory = _ZIP_END.unpack_from(tail, at)[5]
        if at >= _ZIP64_LOCATOR.size and tail.startswith(b"PK\6\7", at - _ZIP64_LOCATOR.size):
            file.seek(max(0, start + at - _ZIP64_LOCATOR.size - _ZIP64_END.size))
            record = file.read(_ZIP64_END.size)
            if len(record) == _ZIP64_END.size and record.startswith(b"PK\6\6"):
                directory = max(directory if directory < 0xFFFFFFFF else 0, _ZIP64_END.unpack(record)[8])
    file.seek(0)
    if min(directory, size) > _MEMBERS * 46 + _NAMES_LIMIT:
        raise DataError(
            f"{path} has a directory of {directory:,} bytes: more than {_MEMBERS:,} members, or names of more than "
            f"{_NAMES_LIMIT:,} characters. Unpack it, and name the folder."
        )


def pack(members: Iterable[tuple[str, Path]], target: BinaryIO) -> None:
    """Write ``members`` (name, file) as a ``.tar.gz`` that depends on names and contents, not on dates or owners."""
    with (
        gzip.GzipFile(filename="", fileobj=target, mode="wb", compresslevel=6, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, file in members:
            data = file.read_bytes()
            # TarInfo starts with date 0 and owner 0, whatever the file on this machine has.
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def _everything(stream: Readable) -> bytes:
    return b"".join(iter(lambda: stream.read(_CHUNK), b""))


def _head(path: Path, file: BinaryIO) -> bytes:
    """The first bytes of a file, read without moving on; what is plainly no data is refused."""
    head = file.read(64)
    file.seek(0)
    if not head:
        raise DataError(f"{path} is empty (0 bytes). {AGAIN}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise DataError(
            f"{path} is a web page, not data: a server answered the download with a page instead of the file. {AGAIN}"
        )
    return head


_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError),
    *(ValueError, ArithmeticError, LookupError, struct.error, RecursionError),
)
"""What the standard library raises of damaged or forged archives."""


@contextmanager
def _damage_named(path: Path, kind: str = "tar archive") -> Iterator[None]:
    """Turn whatever reading a damaged or forged archive raises into our error, with the file's name."""
    try:
        yield
    # It is a ValueError, which the next clause would catch and wrap again.
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path} is no {kind}, or a damaged one ({error}). {AGAIN}") from None


class _Header(tarfile.TarInfo):
    """A tar member's header, which is refused where reading on would fill memory before its name is known."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """One block of 512 bytes, as tarfile reads it.

        Raises:
            tarfile.ReadError: the header of a sparse file, or one that announces a very long name.
        """
        header = super().frombuf(buf, encoding, errors)
        limit = _GLOBAL_LIMIT if header.type == tarfile.XGLTYPE else _HEADER_LIMIT
        if header.type in _EXTENDED and header.size > limit:
            raise tarfile.ReadError(f"an extended header of {header.size:,} bytes, at most {limit:,} are read")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"member {header.name[:100]!r} is a link, device or sparse file")
        return header

    def _proc_gnusparse_10(self, *_: object) -> None:
        """Called by tarfile for a sparse file of the latest form, whose map it would read as a whole."""
        raise tarfile.ReadError(f"member {self.name[:100]!r} is a link, device or sparse file")


def _open_tar(path: Path, stream: Bounded) -> tarfile.TarFile:
    with _damage_named(path):
        # As a pipe: tarfile then never seeks, so every byte is read once and counted.
        return tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK // 4, tarinfo=_Header)  # type: ignore[call-overload,no-any-return]


def _next(path: Path, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    with _damage_named(path):
        member = tar.next()
        if len(tar.pax_headers) > _GLOBALS:
            raise tarfile.ReadError(f"more than {_GLOBALS:,} entries in extended headers for all members")
        return member


class _Census:
    """Counts an archive's members and the characters of their names, and refuses what no data set needs.

    Whatever is kept of a member is in proportion to its name; with these bounds an archive can be listed in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._members, self._characters = path, 0, 0

    def count(self, name: str) -> None:
        """Take in one more member.

        Raises:
            DataError: a name that is too long or too deep, or too many of them.
        """
        self._members += 1
        self._characters += len(name)
        if len(name) > _NAME_LIMIT or name.count("/") + name.count("\\") > _DEPTH:
            raise DataError(
                f"{self._path}: member {name[:100]!r} lies below {name.count('/'):,} folders and has a name of "
                f"{len(name):,} characters; at most {_DEPTH} and {_NAME_LIMIT:,} are read. {AGAIN}"
            )
        if self._members > _MEMBERS or self._characters > _NAMES_LIMIT:
            raise DataError(
                f"{self._path} holds more than {_MEMBERS:,} members, or names of more than {_NAMES_LIMIT:,} characters."
                " Unpack it, and name the folder."
            )


def _check_safe(path: Path, member: tarfile.TarInfo) -> None:
    """Refuse a member that is neither a folder nor an ordinary file under an ordinary name."""
    plain = member.isdir() or (member.isreg() and not member.issparse())
    _refuse_unsafe(path, member.name, "" if plain else "a link, device or sparse file")


def _refuse_unsafe(path: Path, name: str, kind: str) -> None:
    """Refuse what no data set needs and an attacker would: links, devices, paths that lead elsewhere.

    Nothing is extracted, so that none of these could do harm here; but an archive with one of them was not made by its
    publisher, and its contents are then worth nothing either. A backslash leads out of the archive as a slash would:
    it separates folders on some systems. Names may hold every character that people put into names of files, spaces
    and joiners of all kinds included; control characters and halves of characters are what they may not hold.
    """
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or ".." in parts or re.match("[A-Za-z]:", name):
        kind = "a path that leads out of the archive"
    elif any(unicodedata.category(character) in ("Cc", "Cs") for character in name) or max(map(len, parts)) > 255:
        kind = "a name that is no file name"
    if kind:
        raise DataError(f"{path}: member {name[:100]!r} is {kind}; archives of data need none. {AGAIN}")


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """Read to the end of the compressed stream, where its checksum is; only padding may be left.

    tarfile ends without a word at the first header that it cannot read; what then follows gives it away.
    """
    while rest := tar.fileobj.read(_CHUNK):
        if rest.strip(b"\0"):
            raise DataError(f"{path} is a damaged tar archive: data follows its end. {AGAIN}")
