"""The movie reviews' layout: three wrappers of one data set, and every way in which it can be wrong."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from better_attention.lab.data.published import imdb
from better_attention.lab.data.samples import DataError, Texts
from better_attention.lab.data.vocabulary import tokens
from helpers.layouts import IMDB, UNREAD, compress, member, tar, write_imdb, write_imdb_folder

WRITERS = {
    "tar.gz": lambda place, reviews: write_imdb(place / "aclImdb_v1.tar.gz", reviews),
    "tar.xz": lambda place, reviews: write_imdb(place / "aclImdb_v1-part.tar.xz", reviews),
    "folder": write_imdb_folder,
}
WRAPPERS = pytest.mark.parametrize("wrapper", WRITERS)


def read(place: Path) -> Texts:
    files = imdb.locate(place)
    assert files is not None
    return imdb.read(files)


@WRAPPERS
def test_what_was_written_is_read(tmp_path: Path, wrapper: str) -> None:
    WRITERS[wrapper](tmp_path, {**UNREAD, **IMDB})
    data = read(tmp_path)
    assert data.train_texts == [
        "Dreadful",
        "I fell asleep",
        "A fine film.<br /><br />Don't miss it!",
        "Superb. Ça c'est du cinéma",
        "Good, if long",
    ]
    assert data.train_labels.tolist() == [0, 0, 1, 1, 1]
    assert data.test_texts == ["No. No! NO", "Dreadful", "Good, if long"]
    assert data.test_labels.tolist() == [0, 0, 1]
    assert data.classes == ("neg", "pos")
    assert data.notes == (
        "2 texts occur in both splits",
        "5 training and 3 test samples, where the official set has 25,000 and 25,000",
    )


def test_the_order_within_the_archive_does_not_matter(tmp_path: Path) -> None:
    names = list(IMDB)
    orders = [names, names[::-1], names[3:] + names[:3]]
    prints = {
        read(write_imdb(tmp_path / f"{i}.tar.gz", {name: IMDB[name] for name in order})).fingerprint()
        for i, order in enumerate(orders)
    }
    prints.add(read(write_imdb(tmp_path / "dotted.tar.gz", prefix="./")).fingerprint())
    assert len(prints) == 1


def test_no_note_on_texts_of_both_splits_where_there_are_none(tmp_path: Path) -> None:
    apart = {name: f"{text} {name}" for name, text in IMDB.items()}
    assert len(read(write_imdb(tmp_path / "a.tar.gz", apart)).notes) == 1


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    assert imdb.locate(tmp_path) is None
    folder = write_imdb_folder(tmp_path)
    assert imdb.locate(tmp_path) == imdb.locate(folder) == (folder,)
    other = write_imdb(tmp_path / "aclImdb_v1-labelled.tar.xz")
    assert imdb.locate(tmp_path) == imdb.locate(other) == (other,)
    write_imdb(tmp_path / "aclImdb_v1-more.tar.gz")
    with pytest.raises(DataError, match=r"several archives .*labelled\.tar\.xz, aclImdb_v1-more\.tar\.gz"):
        imdb.locate(tmp_path)
    official = write_imdb(tmp_path / "aclImdb_v1.tar.gz")
    assert imdb.locate(tmp_path) == (official,)
    (tmp_path / "aclImdb_v1.tar.gz.part").touch()  # an unfinished download is never taken for the data
    official.unlink()
    other.unlink()
    assert imdb.locate(tmp_path) == (tmp_path / "aclImdb_v1-more.tar.gz",)


@WRAPPERS
@pytest.mark.parametrize("missing", ["train/pos", "train/neg", "test/pos", "test/neg"])
def test_a_class_without_reviews(tmp_path: Path, wrapper: str, missing: str) -> None:
    WRITERS[wrapper](tmp_path, {name: text for name, text in IMDB.items() if missing not in name})
    (tmp_path / "aclImdb" / "train" / "pos").mkdir(parents=True, exist_ok=True)
    with pytest.raises(DataError, match=f"has no review aclImdb/{missing}/<index>_<rating>.txt"):
        read(tmp_path)


@WRAPPERS
@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_review(tmp_path: Path, wrapper: str, text: str) -> None:
    WRITERS[wrapper](tmp_path, {**IMDB, "aclImdb/test/neg/3_2.txt": text})
    with pytest.raises(DataError, match=r"aclImdb/test/neg/3_2\.txt is empty"):
        read(tmp_path)


@WRAPPERS
def test_a_review_that_is_not_utf8(tmp_path: Path, wrapper: str) -> None:
    WRITERS[wrapper](tmp_path, {**IMDB, "aclImdb/train/pos/2_10.txt": "Ça va".encode("latin-1")})
    with pytest.raises(DataError, match=r"train/pos/2_10\.txt is not UTF-8 text \(byte 0xc7 at position 0\)"):
        read(tmp_path)


@WRAPPERS
def test_a_review_that_is_far_too_long(tmp_path: Path, wrapper: str) -> None:
    WRITERS[wrapper](tmp_path, {**IMDB, "aclImdb/train/pos/2_10.txt": "so long " * 200_000})
    with pytest.raises(DataError, match=r"2_10\.txt.* has 1,600,000 bytes"):
        read(tmp_path)


def test_a_link_among_the_unpacked_reviews(tmp_path: Path) -> None:
    folder = write_imdb_folder(tmp_path)
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (folder / "train" / "pos" / "77_9.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match=r"77_9\.txt is a link"):
        read(tmp_path)


def test_a_link_in_the_archive(tmp_path: Path) -> None:
    entries = [member(name, text) for name, text in IMDB.items()]
    entries.append(member("aclImdb/train/pos/77_9.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(compress(tar(entries), "gz"))
    with pytest.raises(DataError, match=r"77_9\.txt' is a link"):
        read(tmp_path)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no review"):
        read(write_imdb(tmp_path / "photos.tar.gz", {"photos/a.txt": "x"}))


@pytest.fixture(scope="module")
def reviews(real_data: Path) -> Texts:
    """All 50,000 reviews, which take seconds to read."""
    return read(real_data / "imdb")


@pytest.mark.data
def test_the_real_thing(reviews: Texts) -> None:
    """Sizes and overlap as the data's README says; half of each split is positive."""
    assert len(reviews.train_texts) == len(reviews.test_texts) == 25_000
    assert reviews.train_labels.sum() == reviews.test_labels.sum() == 12_500
    assert reviews.notes == ("123 texts occur in both splits",)
    assert any("<br />" in text for text in reviews.train_texts)


@pytest.mark.data
def test_their_words_are_those_of_published_results(reviews: Texts) -> None:
    foreign = [text for text in reviews.train_texts if not text.isascii()]
    assert len(foreign) > 2_000
    for text in foreign:
        plain = text.lower().replace("<br />", " ").replace("’", "'")
        assert tokens(text) == re.findall(r"\w+(?:'\w+)*", plain)
