"""Compressed files and tar archives by strangers: whole, broken, forged."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from better_attention.lab.data.archives import MIB, decompressed, pack, tar_members
from better_attention.lab.data.samples import DataError
from helpers.layouts import compress, member, tar

WANTED = re.compile(r"good/[a-z0-9_]+\.txt")
BOTH = pytest.mark.parametrize("suffix", ["gz", "xz"])


def contents(path: Path, *, limit: int = MIB, plain: bool = False) -> bytes:
    with decompressed(path, limit=limit, plain=plain) as stream:
        parts = iter(lambda: stream.read(1000), b"")
        return b"".join(parts)


def members(path: Path, *, member_limit: int = 1000, total_limit: int = MIB) -> dict[str, bytes]:
    found = tar_members(path, WANTED, member_limit=member_limit, total_limit=total_limit)
    return {match[0]: data for match, data in found}


def archive(path: Path, *entries: tuple[tarfile.TarInfo, bytes], suffix: str = "gz") -> Path:
    path.write_bytes(compress(tar(entries), suffix))
    return path


@BOTH
@pytest.mark.parametrize("name", ["a.gz", "a.xz", "a.bin"])
def test_the_compression_is_told_by_content_not_by_name(tmp_path: Path, suffix: str, name: str) -> None:
    (tmp_path / name).write_bytes(compress(b"hello" * 999, suffix))
    assert contents(tmp_path / name) == b"hello" * 999


def test_plain_files_only_where_they_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00\x01 plain")
    assert contents(tmp_path / "a", plain=True) == b"\x00\x01 plain"
    with pytest.raises(DataError, match=r"a is neither gzip, bzip2 nor xz: it starts with b'\\x00\\x01 plain'"):
        contents(tmp_path / "a")


@BOTH
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = compress(bytes(range(200)), suffix)
    path = tmp_path / f"cut.{suffix}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=re.escape(str(path))):
            contents(path)
    path.write_bytes(whole)
    assert contents(path) == bytes(range(200))


@BOTH
def test_a_wrong_checksum_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = bytearray(compress(b"text " * 50, suffix))
    at = len(whole) - 8 if suffix == "gz" else len(whole) - 40  # gzip's CRC-32; a byte of the xz check or index
    whole[at] ^= 1
    path = tmp_path / "bad"
    path.write_bytes(whole)
    with pytest.raises(DataError, match="is damaged"):
        contents(path)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n <html><body>404", b'<?xml version="1.0"?>'])
@pytest.mark.parametrize("plain", [True, False])
def test_a_web_page_saved_under_the_name_of_the_data(tmp_path: Path, page: bytes, plain: bool) -> None:
    (tmp_path / "train.gz").write_bytes(page)
    with pytest.raises(DataError, match=r"train\.gz is a web page, not data.*fetch or copy it again"):
        contents(tmp_path / "train.gz", plain=plain)


def test_no_file_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        contents(tmp_path / "missing")
    with pytest.raises(DataError, match="is not a file"):
        contents(tmp_path)
    (tmp_path / "empty.gz").touch()
    with pytest.raises(DataError, match=r"empty\.gz is empty \(0 bytes\)"):
        contents(tmp_path / "empty.gz", plain=True)


@BOTH
def test_a_bomb_is_left_before_it_has_gone_off(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(compress(bytes(16 * MIB), suffix))
    seen: list[int] = []
    with decompressed(path, limit=1 << 40) as stream, pytest.raises(DataError, match="expands to more than 100 times"):
        seen.extend(len(data) for data in iter(lambda: stream.read(1 << 30), b""))
    assert 0 < sum(seen) < 101 * path.stat().st_size + MIB


@BOTH
def test_a_file_larger_than_allowed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "long").write_bytes(compress(bytes(1001), suffix))
    assert len(contents(tmp_path / "long", limit=1001)) == 1001
    with pytest.raises(DataError, match="holds more than the 1,000 bytes"):
        contents(tmp_path / "long", limit=1000)


def test_an_xz_header_that_asks_for_gigabytes_of_memory(tmp_path: Path) -> None:
    forged = bytearray(lzma.compress(b"small"))
    header = slice(12, 12 + (forged[12] + 1) * 4)  # the first block's; its last four bytes are its CRC-32
    filters = forged.index(
        b"\x21\x01", header.start, header.stop
    )  # LZMA2, one byte of properties: the dictionary's size
    forged[filters + 2] = 38  # 2 GiB
    forged[header.stop - 4 : header.stop] = zlib.crc32(forged[header.start : header.stop - 4]).to_bytes(4, "little")
    (tmp_path / "greedy.xz").write_bytes(forged)
    with pytest.raises(DataError, match=r"damaged.*[Mm]emory"):
        contents(tmp_path / "greedy.xz")


def test_what_follows_an_xz_stream(tmp_path: Path) -> None:
    one = lzma.compress(b"one")
    (tmp_path / "padded").write_bytes(one + bytes(8))
    assert contents(tmp_path / "padded") == b"one"
    (tmp_path / "two").write_bytes(one + lzma.compress(b"two"))
    with pytest.raises(DataError, match="more data after the end"):
        contents(tmp_path / "two")


@BOTH
def test_wanted_members_are_read_and_others_skipped(tmp_path: Path, suffix: str) -> None:
    path = archive(
        tmp_path / "a",
        member("good", type=tarfile.DIRTYPE),
        member("good/a.txt", "first"),
        member("bad/a.txt", "skipped"),
        member("./good/b_2.txt", b"\xff" * 513),
        member("good/c.txt.orig", "skipped"),
        member("good/d.txt", type=tarfile.DIRTYPE),
        member("good/empty.txt"),
        member("x" * 200 + "/" + "y" * 200, "a long name, but a name"),
        suffix=suffix,
    )
    assert members(path) == {"good/a.txt": b"first", "good/b_2.txt": b"\xff" * 513, "good/empty.txt": b""}


UNSAFE = {
    "absolute": [member("/good/a.txt", "x")],
    "absolute, elsewhere": [member("/etc/passwd", "x")],
    "two slashes": [member("//server/share", "x")],
    "parent": [member("../good/a.txt", "x")],
    "parent within": [member("good/../../a.txt", "x")],
    "parent at the end": [member("good/..", type=tarfile.DIRTYPE)],
    "backslash": [member("good\\..\\a.txt", "x")],
    "UNC": [member("\\\\server\\share", "x")],
    "drive": [member("C:/good/a.txt", "x")],
    "drive, relative": [member("c:a.txt", "x")],
    "symbolic link": [member("good/a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "symbolic link within": [member("other", type=tarfile.SYMTYPE, linkname="good")],
    "hard link": [member("good/a.txt", type=tarfile.LNKTYPE, linkname="good/b.txt")],
    "file through a link": [member("good", type=tarfile.SYMTYPE, linkname="/var"), member("good/a.txt", "x")],
    "character device": [member("good/a.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5)],
    "block device": [member("good/a.txt", type=tarfile.BLKTYPE)],
    "pipe": [member("good/a.txt", type=tarfile.FIFOTYPE)],
    "line break": [member("good/a\n.txt", "x")],
    "escape sequence": [member("good/\x1b[31m.txt", "x")],
    "not UTF-8": [member("good/\udcff.txt", "x")],
    "long part": [member("good/" + "a" * 256, "x")],
    "NUL": [member("plain", "x", pax_headers={"path": "good/a\0.txt"})],
    "twice": [member("good/a.txt", "x"), member("good/a.txt", "x")],
    "twice, by another spelling": [member("good/a.txt", "x"), member("./good/a.txt", "y")],
}


@BOTH
@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_member_condemns_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, suffix: str
) -> None:
    path = archive(tmp_path / "a.tar", member("good/first.txt", "x"), *UNSAFE[case], suffix=suffix)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"a\.tar: member '.*' (is|occurs)") as caught:
        members(path)
    assert str(caught.value).isprintable()  # a name must not write to the terminal
    assert list(tmp_path.rglob("*")) == [path]  # nothing came out


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    forged = member("good/a.txt", "x", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999999"})
    with pytest.raises(DataError, match="link, device or sparse file"):
        members(archive(tmp_path / "a", forged))


def test_limits_of_members_and_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "a", member("other", bytes(5000)), member("good/a.txt", "x" * 1001))
    assert len(members(path, member_limit=1001)["good/a.txt"]) == 1001
    with pytest.raises(DataError, match=r"member 'good/a\.txt' has 1,001 bytes; at most 1,000"):
        members(path)
    with pytest.raises(DataError, match="holds more than the 6,000 bytes"):
        members(path, member_limit=1001, total_limit=6000)


PEAK = """
import re, sys, tracemalloc
from pathlib import Path
from better_attention.lab.data.archives import MIB, tar_members
tracemalloc.start()
wanted = re.compile("good/.*")
assert len(list(tar_members(Path(sys.argv[1]), wanted, member_limit=1000, total_limit=10 * MIB))) == 1
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_number_of_members(tmp_path: Path) -> None:
    path = archive(tmp_path / "a", *(member(f"skipped/{number}") for number in range(2000)), member("good/a.txt", "x"))
    # In a process of its own: the threads that other tests have left count here as well.
    words = [sys.executable, "-c", PEAK, str(path)]
    assert int(subprocess.run(words, capture_output=True, check=True, timeout=120).stdout) < MIB


def test_a_member_that_promises_more_than_there_is(tmp_path: Path) -> None:
    data = bytearray(tar([member("good/a.txt", "x" * 600)]))
    for cut in (513, 1000, 1024, 1100):
        (tmp_path / "a").write_bytes(gzip.compress(bytes(data[:cut])))
        with pytest.raises(DataError, match="is no tar archive, or a damaged one"):
            members(tmp_path / "a")


def test_a_broken_header_does_not_pass_for_the_end(tmp_path: Path) -> None:
    data = bytearray(
        tar([member("good/a.txt", "first"), member("good/b.txt", "second"), member("good/c.txt", "third")])
    )
    data[1024 + 148] ^= 1  # the second header's checksum
    (tmp_path / "a").write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(DataError, match="data follows its end"):
        members(tmp_path / "a")


def test_something_compressed_that_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"just text" * 999))
    with pytest.raises(DataError, match=r"a\.tar\.gz is no tar archive"):
        members(tmp_path / "a.tar.gz")


def test_a_chain_of_long_name_headers_does_not_exhaust_the_stack(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    chain = (header.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 3000
    (tmp_path / "a").write_bytes(gzip.compress(chain + bytes(1024), 1))
    with pytest.raises(DataError):
        members(tmp_path / "a")


_SEED = tar(
    [
        member("good/a.txt", "first"),
        member("good/long.txt", "x" * 700, pax_headers={"comment": "so that the extended headers are exercised"}),
        member("n" * 120, "skipped"),
    ]
)


def members_unless_refused(path: Path) -> dict[str, bytes] | None:
    """The members, or None for a refusal; any other exception is a failure of the test."""
    try:
        return members(path)
    except DataError:
        return None


@settings(max_examples=100)
@given(edits=st.lists(st.tuples(st.integers(0, len(_SEED) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_edited_archives_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(_SEED)
    for at, value in edits:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "edited.tar.gz"
    path.write_bytes(gzip.compress(bytes(data), 1))
    found = members_unless_refused(path)
    assert found is None or all(WANTED.fullmatch(name) for name in found)


@settings(max_examples=100)
@given(
    st.sampled_from(["gz", "xz"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_edited_compressed_bytes_are_refused_or_make_no_difference(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(compress(_SEED, suffix))
    for at, change in edits:
        data[at % len(data)] ^= change
    path = tmp_path_factory.getbasetemp() / "edited"
    path.write_bytes(data)
    # An edit of gzip's time stamp, say, is not refused: what is read is still what was written.
    assert members_unless_refused(path) in (None, {"good/a.txt": b"first", "good/long.txt": b"x" * 700})


def test_packing_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    file = tmp_path / "source.txt"
    file.write_text("a text", encoding="utf-8")
    packed = []
    for mode in (0o600, 0o644):
        file.chmod(mode)
        stream = io.BytesIO()
        pack([("good/a.txt", file), ("good/b.txt", file)], stream)
        packed.append(stream.getvalue())
    assert packed[0] == packed[1]
    assert packed[0][4:8] == bytes(4)  # gzip's time stamp
    (tmp_path / "a").write_bytes(packed[0])
    assert members(tmp_path / "a") == {"good/a.txt": b"a text", "good/b.txt": b"a text"}
