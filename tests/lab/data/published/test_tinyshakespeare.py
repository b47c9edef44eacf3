"""Tiny Shakespeare: where it is found, what any other text says of itself, and what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from better_attention.lab.data import store
from better_attention.lab.data.catalogue import read
from better_attention.lab.data.published import SOURCES
from better_attention.lab.data.samples import DataError, NotFetched, RunningText

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


def text(place: Path) -> RunningText:
    found = read("tinyshakespeare", place)
    assert isinstance(found, RunningText)
    return found


@pytest.mark.parametrize("below", ["", "tinyshakespeare"])
def test_in_the_folder_or_below_it_or_the_file_itself(tmp_path: Path, below: str) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    file = tmp_path / below / "input.txt"
    file.write_text(TEXT, "utf-8")
    assert text(tmp_path).text == text(file).text == TEXT
    assert text(tmp_path).departures[0].startswith("another text than Tiny Shakespeare: input.txt, SHA-256 ")


def test_any_text_file_is_read_with_its_line_ends_as_line_feeds(tmp_path: Path) -> None:
    file = tmp_path / "mine.md"
    file.write_bytes(b"\xef\xbb\xbf" + "é one\r\ntwo\rthree\n".encode())
    assert text(file).text == "é one\ntwo\nthree\n"
    (tmp_path / "same").write_text("é one\ntwo\nthree\n", "utf-8")
    assert text(file).fingerprint() == text(tmp_path / "same").fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", r"not UTF-8 text \(byte 0xe9 at position 3\)"),
        *((blank, r"input.txt holds no text: it is empty, or blank. Name a file") for blank in (b"", b" \n")),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "input.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read("tinyshakespeare", tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFetched, match=r"data fetch tinyshakespeare"):
        read("tinyshakespeare", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotFetched):
        read("tinyshakespeare", tmp_path / "pipe")


def test_it_is_imported_into_the_data_home(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT, "utf-8")
    store.import_from(SOURCES["tinyshakespeare"], tmp_path)
    assert (cache / "tinyshakespeare" / "input.txt").read_text("utf-8") == TEXT
    found = read("tinyshakespeare")
    assert isinstance(found, RunningText)
    assert found.text == TEXT


@pytest.mark.data
def test_the_real_text_is_the_published_one(real_data: Path) -> None:
    found = text(real_data)
    assert found.departures == ()
    assert len(found.text) == SOURCES["tinyshakespeare"].remotes[0].size == 1_115_394
