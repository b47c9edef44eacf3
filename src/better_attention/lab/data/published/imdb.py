"""The Large Movie Review Dataset: 50,000 reviews, half of them positive.

Source: A. L. Maas, R. E. Daly, P. T. Pham, D. Huang, A. Y. Ng, C. Potts, "Learning Word Vectors for
Sentiment Analysis", ACL 2011; for academic use, with citation. Each review is one file,
``aclImdb/{train,test}/{pos,neg}/<index>_<rating>.txt``; the unlabelled reviews, vocabularies and
bags of words of the official archive are not read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from better_attention.lab.data.archives import AGAIN, MIB, tar_members
from better_attention.lab.data.download import Remote
from better_attention.lab.data.own_texts.columns import format_of
from better_attention.lab.data.samples import DataError, Texts, overlap_notes, size_notes
from better_attention.lab.data.source import Source
from better_attention.lab.data.zipped_tables import is_zip, zipped_tables

# Size and SHA-256: github.com/tensorflow/datasets, tensorflow_datasets/datasets/imdb_reviews/checksums.tsv
# at commit 90b66237ad09c9e5b9b1bc61b646db7b1fb0713c, which lists the same address with http.
REMOTES = (
    Remote(
        url="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        name="aclImdb_v1.tar.gz",
        size=84_125_825,
        sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    ),
)
OFFICIAL = (25_000, 25_000)
CLASSES = ("neg", "pos")
LAYOUT = "aclImdb_v1*.tar.gz or .tar.xz, or the unpacked folder aclImdb/"

_REVIEW = re.compile(r"aclImdb/(train|test)/(neg|pos)/([0-9]{1,9})_([0-9]{1,2})\.txt")
_REVIEW_LIMIT = MIB  # bytes; the longest official review has about 14,000
_TOTAL_LIMIT = 512 * MIB  # the official archive holds about 300 MiB


def locate(place: Path) -> tuple[Path, ...] | None:
    """The archive or unpacked folder at or in ``place``, or None. The official archive comes first.

    Raises:
        DataError: several archives, none of them the official one, or the reviews as a table.
    """
    if place.is_file():
        _no_table(place)
        return (place,)
    if (place / REMOTES[0].name).is_file():
        return (place / REMOTES[0].name,)
    archives = sorted(f for f in place.glob("aclImdb_v1*.tar.*") if f.is_file() and f.suffix in (".gz", ".xz"))
    if len(archives) > 1:
        raise DataError(
            f"{place} holds several archives of the reviews ({', '.join(f.name for f in archives)}). Name the one to "
            "read, or remove the others."
        )
    if archives:
        return (archives[0],)
    for folder in (place / "aclImdb", place):
        if (folder / "train" / "pos").is_dir():
            return (folder,)
    for file in sorted(place.glob("*")):
        if file.is_file() and any("imdb" in name.casefold() for name in (file.name, *_tables_in(file))):
            _no_table(file)
    return None


def _tables_in(file: Path) -> list[str]:
    """The names of the tables in a .zip archive, as Kaggle hands them out; of another file, or a damaged one, none."""
    try:
        return [table.name for table in zipped_tables(file)] if is_zip(file) else []
    except DataError:
        return []


def _no_table(file: Path) -> None:
    """Refer users who have the reviews as one table to the command that reads tables.

    Raises:
        DataError: ``file`` is a table, or an archive of one.
    """
    tables = _tables_in(file)
    if format_of(file) or tables:
        what = f"holds the table {tables[0]}" if tables else "is a table"
        raise DataError(
            f"{file} {what}, not the reviews as they were published ({LAYOUT}), whose split into training and test it "
            f"does not keep. Read it as texts of your own: `better-attention compare text --data "
            f"{shlex.quote(str(file))}`."
        )


def read(files: Sequence[Path]) -> Texts:
    """The labelled reviews of one archive or one unpacked ``aclImdb`` folder.

    Returns:
        Raw texts, ``<br />`` tags included; label 0 is negative, 1 positive. Within a split the negative
        reviews come first, each class in the order of the index in its file names.

    Raises:
        DataError: a damaged or unsafe archive, a class without reviews, an empty or undecodable review.
    """
    (place,) = files
    reviews: dict[str, list[tuple[int, int, str, str]]] = {"train": [], "test": []}
    for match, data in _contents(place):
        split, label, index, rating = match.groups()
        reviews[split].append((CLASSES.index(label), int(index), rating, _decode(place, match[0], data)))
    for split, rows in reviews.items():
        for label, word in enumerate(CLASSES):
            if not any(row[0] == label for row in rows):
                raise DataError(
                    f"{place} has no review aclImdb/{split}/{word}/<index>_<rating>.txt: the data is incomplete or of "
                    f"another layout. {AGAIN}"
                )
        # Archives list their members in any order; sorted, equal reviews give equal fingerprints.
        rows.sort()
    train, test = ([row[3] for row in reviews[split]] for split in ("train", "test"))
    return Texts(
        name="imdb",
        train_texts=train,
        train_labels=np.array([row[0] for row in reviews["train"]], dtype=np.int64),
        test_texts=test,
        test_labels=np.array([row[0] for row in reviews["test"]], dtype=np.int64),
        classes=CLASSES,
        notes=overlap_notes(train, test) + size_notes(len(train), len(test), OFFICIAL),
    )


def members(folder: Path) -> Iterator[tuple[str, Path]]:
    """The reviews of an unpacked ``aclImdb`` folder, as ``(name in the archive, file)``, sorted by name.

    Raises:
        DataError: a review is a link or no regular file.
    """
    for split in ("test", "train"):
        for label in CLASSES:
            below = folder / split / label
            for file in sorted(below.iterdir()) if below.is_dir() else ():
                name = f"aclImdb/{split}/{label}/{file.name}"
                if not _REVIEW.fullmatch(name):
                    continue
                if file.is_symlink() or not file.is_file():
                    raise DataError(f"{file} is a link or no regular file. Put the review itself there.")
                yield name, file


def _contents(place: Path) -> Iterator[tuple[re.Match[str], bytes]]:
    if not place.is_dir():
        yield from tar_members(place, _REVIEW, member_limit=_REVIEW_LIMIT, total_limit=_TOTAL_LIMIT)
        return
    for name, file in members(place):
        match = _REVIEW.fullmatch(name)
        if match is None:
            continue
        if file.stat().st_size > _REVIEW_LIMIT:
            raise DataError(f"{file} has {file.stat().st_size:,} bytes; a review has at most {_REVIEW_LIMIT:,}.")
        yield match, file.read_bytes()


def _decode(place: Path, name: str, data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: {name} is not UTF-8 text (byte {data[error.start]:#04x} at position {error.start}). {AGAIN}"
        ) from None
    if not text or text.isspace():
        raise DataError(f"{place}: {name} is empty. {AGAIN}")
    return text


SOURCE = Source(
    name="imdb",
    title="50,000 movie reviews, positive or negative",
    terms="Maas et al. 2011; academic use, with citation",
    layout=LAYOUT,
    load=read,
    locate=locate,
    remotes=REMOTES,
    members=members,
)
