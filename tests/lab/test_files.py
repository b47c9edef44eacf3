"""Files that are there whole or not at all, and text that cannot do harm."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from better_attention.lab.files import plain, write_atomic


def test_text_is_written_as_utf8_and_folders_are_made(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "x.txt", "ℓ × d\n")
    assert (tmp_path / "a" / "b" / "x.txt").read_bytes() == "ℓ × d\n".encode()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "results.csv"
    write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        order.append("fsync")
        fsync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        order.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomic(tmp_path / "x", b"bytes")
    assert order[:2] == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "x", "")
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)


def test_a_long_name_still_has_room_for_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    write_atomic(path, "whole")
    assert path.read_text() == "whole"


@given(st.text(max_size=60))
def test_plain_text_has_no_control_character_and_encodes(text: str) -> None:
    found = plain(text)
    found.encode("utf-8")
    assert not [c for c in found if unicodedata.category(c) in ("Cc", "Cs")]


@given(st.text(st.characters(categories=("L", "N", "P", "S")), max_size=60))
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert plain(text) == text


def test_what_plain_takes_out() -> None:
    assert plain("a\x1b[2Jb\x07") == "a[2Jb"  # an escape sequence without its escape is only text
    assert plain("line\r\none\ttab\u2028two") == "line  one tab two"
    assert plain("user\u202egnp.exe\u2066\u200f") == "usergnp.exe"  # would read backwards
    assert plain("\ud800lone") == "lone"


def test_a_megabyte_is_cut() -> None:
    assert plain("x" * 1_000_000) == "x" * 2000 + "… (1,000,000 characters)"
    assert plain("x" * 2000) == "x" * 2000


FULL_DISK = """
import resource, signal, sys
from better_attention.lab.files import write_atomic

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write itself then fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(sys.argv[1], b"x" * 100_000)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE there")
def test_a_full_disk_is_named_and_costs_nothing_old(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, "old")
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "100,000 bytes" in child.stdout
    assert str(path) in child.stdout
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
