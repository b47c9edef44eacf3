"""The data home: what enters it, what is refused, and what is said of it afterwards."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from better_attention.lab.data import store
from better_attention.lab.data.catalogue import read
from better_attention.lab.data.home import home
from better_attention.lab.data.published import SOURCES
from better_attention.lab.data.samples import DataError, NotFetched
from better_attention.lab.data.source import Source
from helpers import publisher as site
from helpers.layouts import IMDB, mnist_arrays, write_imdb, write_imdb_folder, write_mnist
from helpers.publisher import HOST, Publisher

MNIST, IMDB_SOURCE = SOURCES["mnist"], SOURCES["imdb"]


def visible(folder: Path) -> set[str]:
    """What lies in a folder, the lock aside."""
    return {file.name for file in folder.iterdir() if file.name != ".lock"} if folder.exists() else set()


def small(folder: Path) -> tuple[Source, dict[str, bytes]]:
    """MNIST's row with four small files in place of the official ones, and the files."""
    contents = {file.name: file.read_bytes() for file in write_mnist(folder).iterdir()}
    remotes = tuple(site.remote(contents[remote.name], name=remote.name) for remote in MNIST.remotes)
    return replace(MNIST, remotes=remotes), contents


def serve(publisher: Publisher, source: Source, contents: dict[str, bytes]) -> None:
    publisher.answers = [site.serves(contents[remote.name]) for remote in source.remotes]


def test_where_home_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home() == tmp_path / "cache" / "better-attention" / "data"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert home() == tmp_path / "me" / ".cache" / "better-attention" / "data"


def test_fetch_brings_all_files_and_they_can_be_read(publisher: Publisher, cache: Path, tmp_path: Path) -> None:
    source, contents = small(tmp_path / "published")
    serve(publisher, source, contents)
    seen = []
    with publisher.session() as session:
        target = store.fetch(
            source, session=session, hosts={HOST}, progress=lambda remote, done: seen.append((remote.name, done))
        )
    assert target == cache / "mnist"
    assert {file.name: file.read_bytes() for file in target.iterdir() if file.suffix == ".gz"} == contents
    assert store.origin(target) == {
        "how": "fetched",
        "files": {remote.name: remote.sha256 for remote in source.remotes},
    }
    assert {(remote.name, remote.size) for remote in source.remotes} <= set(seen)
    assert read("mnist").fingerprint() == read("mnist", tmp_path / "published").fingerprint()


def test_fetch_goes_on_with_the_files_that_are_missing(publisher: Publisher, cache: Path, tmp_path: Path) -> None:
    source, contents = small(tmp_path / "published")
    serve(publisher, source, contents)
    publisher.answers[2] = site.refuses(404)
    with publisher.session() as session:
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: the server answers 404"):
            store.fetch(source, session=session, hosts={HOST})
        assert store.origin(cache / "mnist") is None
        with pytest.raises(NotFetched, match="lacks t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"):
            read("mnist")
        publisher.answers = [site.serves(contents[remote.name]) for remote in source.remotes[2:]]
        store.fetch(source, session=session, hosts={HOST})
    assert len(publisher.requests) == 5
    assert read("mnist").notes


def test_what_cannot_be_fetched_says_why(cache: Path) -> None:
    with pytest.raises(DataError, match=r"'digits' needs no download: scikit-learn carries it\.$"):
        store.fetch(SOURCES["digits"])
    with pytest.raises(
        DataError, match=r"'mnist' can only be imported: no published SHA-256 .* data import mnist FROM"
    ):
        store.fetch(replace(MNIST, remotes=()))
    assert not cache.exists()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("below", ["", "mnist"])
def test_import_copies_files_byte_for_byte(cache: Path, tmp_path: Path, compress: bool, below: str) -> None:
    place = write_mnist(tmp_path / "mine" / below, compress=compress)
    assert store.import_from(MNIST, tmp_path / "mine") == cache / "mnist"
    files = {file.name: file.read_bytes() for file in place.iterdir()}
    assert visible(cache / "mnist") == {*files, "origin.json"}
    for name, data in files.items():
        assert (cache / "mnist" / name).read_bytes() == data
    assert store.origin(cache / "mnist") == {
        "how": "imported",
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    assert read("mnist").fingerprint() == read("mnist", place).fingerprint()


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("aclImdb_v1.tar.gz", "aclImdb_v1.tar.gz"),
        ("aclImdb_v1-labelled.tar.xz", "aclImdb_v1.tar.xz"),
        ("reviews.tgz", "aclImdb_v1.tar.gz"),
        ("aclImdb_v1.tar", "aclImdb_v1.tar.xz"),
    ],
)
def test_an_archive_of_any_name_gets_the_official_one(cache: Path, tmp_path: Path, name: str, stored: str) -> None:
    archive = write_imdb(tmp_path / name)
    store.import_from(IMDB_SOURCE, archive)
    assert visible(cache / "imdb") == {stored, "origin.json"}
    assert (cache / "imdb" / stored).read_bytes() == archive.read_bytes()
    assert read("imdb").fingerprint() == read("imdb", archive).fingerprint()


def test_an_unpacked_folder_is_packed_again(cache: Path, tmp_path: Path) -> None:
    folder = write_imdb_folder(tmp_path)
    store.import_from(IMDB_SOURCE, tmp_path)
    assert visible(cache / "imdb") == {"aclImdb_v1.tar.gz", "origin.json"}
    assert read("imdb").fingerprint() == read("imdb", folder).fingerprint()


def test_a_second_import_takes_the_place_of_the_first(cache: Path, tmp_path: Path) -> None:
    store.import_from(IMDB_SOURCE, write_imdb(tmp_path / "a.tar.gz"))
    newer = write_imdb(tmp_path / "b.tar.xz", {**IMDB, "aclImdb/test/pos/9_9.txt": "one more"})
    store.import_from(IMDB_SOURCE, newer)
    assert visible(cache / "imdb") == {"aclImdb_v1.tar.xz", "origin.json"}
    assert read("imdb").fingerprint() == read("imdb", newer).fingerprint()


def test_who_reads_meanwhile_sees_the_old_file_or_the_new_one_never_a_mixture(cache: Path, tmp_path: Path) -> None:
    old = write_imdb(tmp_path / "a.tar.gz").read_bytes()
    store.import_from(IMDB_SOURCE, tmp_path / "a.tar.gz")
    with (cache / "imdb" / "aclImdb_v1.tar.gz").open("rb") as reader:
        store.import_from(IMDB_SOURCE, write_imdb(tmp_path / "b.tar.gz", {**IMDB, "aclImdb/test/pos/9_9.txt": "more"}))
        assert reader.read() == old


def test_a_file_of_the_users_own_is_not_removed_but_named(cache: Path, tmp_path: Path) -> None:
    own = write_imdb(cache / "imdb" / "aclImdb_v1.tar.gz")
    with pytest.raises(DataError, match=r"imdb/aclImdb_v1\.tar\.gz lies there too and takes precedence"):
        store.import_from(IMDB_SOURCE, write_imdb(tmp_path / "b.tar.xz"))
    assert own.exists()


def test_what_is_damaged_does_not_enter_and_harms_nothing(cache: Path, tmp_path: Path) -> None:
    good = write_mnist(tmp_path / "good")
    store.import_from(MNIST, good)
    before = read("mnist").fingerprint()
    bad = write_mnist(tmp_path / "bad", {name: 255 - array for name, array in mnist_arrays().items()})
    with pytest.raises(DataError, match="label 0 is 255"):
        store.import_from(MNIST, bad)
    cut = write_mnist(tmp_path / "cut") / "t10k-labels-idx1-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is cut short"):
        store.import_from(MNIST, tmp_path / "cut")
    assert read("mnist").fingerprint() == before


def test_places_that_do_not_hold_the_data(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty does not hold mnist: expected the four files"):
        store.import_from(MNIST, tmp_path / "empty")
    with pytest.raises(DataError, match="nowhere does not exist"):
        store.import_from(MNIST, tmp_path / "nowhere")
    with pytest.raises(DataError, match="'digits' needs no import"):
        store.import_from(SOURCES["digits"], tmp_path)
    store.import_from(MNIST, write_mnist(tmp_path / "good"))
    with pytest.raises(DataError, match="is where mnist already lies"):
        store.import_from(MNIST, cache)
    assert not (cache / "imdb").exists()


def test_a_copy_that_fails_half_way_leaves_the_old_data(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.import_from(IMDB_SOURCE, write_imdb(tmp_path / "a.tar.gz"))
    before = {file.name: file.read_bytes() for file in (cache / "imdb").iterdir()}
    other = write_imdb(tmp_path / "b.tar.gz", {**IMDB, "aclImdb/test/pos/9_9.txt": "one more"})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*aclImdb_v1\.tar\.gz: No space left on device"):
        store.import_from(IMDB_SOURCE, other)
    assert {file.name: file.read_bytes() for file in (cache / "imdb").iterdir()} == before


def test_what_a_killed_import_left_is_cleared(cache: Path, tmp_path: Path) -> None:
    (cache / "imdb").mkdir(parents=True)
    (cache / "imdb" / ".aclImdb_v1.tar.gz.a1b2c3d4.tmp").write_bytes(b"half a f")
    assert SOURCES["imdb"].locate is not None
    assert SOURCES["imdb"].locate(cache / "imdb") is None
    store.import_from(IMDB_SOURCE, write_imdb(tmp_path / "a.tar.gz"))
    assert visible(cache / "imdb") == {"aclImdb_v1.tar.gz", "origin.json"}
    assert not list((cache / "imdb").glob(".*.tmp"))


def test_one_at_a_time(cache: Path, tmp_path: Path) -> None:
    archive = write_imdb(tmp_path / "a.tar.gz")
    (cache / "imdb").mkdir(parents=True)
    with (
        filelock.FileLock(cache / "imdb" / ".lock"),
        pytest.raises(DataError, match="another better-attention is filling"),
    ):
        store.import_from(IMDB_SOURCE, archive)
    store.import_from(IMDB_SOURCE, archive)


def test_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*file/imdb"):
        store.import_from(IMDB_SOURCE, write_imdb(tmp_path / "a.tar.gz"), tmp_path / "file")


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "3",
        '{"how": "fetched"}',
        '{"how": "stolen", "files": {}}',
        '{"how": "fetched", "files": ["a"]}',
        json.dumps({"how": "fetched", "files": {"../../precious": "0" * 64}}),
        json.dumps({"how": "fetched", "files": {"precious": "0"}}),
        "[" * 100_000,
    ],
)
def test_a_forged_record_is_ignored(cache: Path, tmp_path: Path, record: str) -> None:
    """A record says which files an import may remove; it must not be talked into removing others."""
    precious = tmp_path / "cache" / "better-attention" / "precious"
    (cache / "imdb").mkdir(parents=True)
    precious.touch()
    (cache / "imdb" / "precious").touch()
    (cache / "imdb" / "origin.json").write_text(record, encoding="utf-8")
    assert store.origin(cache / "imdb") is None
    store.import_from(IMDB_SOURCE, write_imdb(tmp_path / "a.tar.gz"))
    assert precious.exists()
    assert (cache / "imdb" / "precious").exists()
