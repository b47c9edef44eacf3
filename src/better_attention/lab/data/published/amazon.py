"""Amazon reviews with one to five stars: the five-class set of 3,650,000, or a small mixture instead.

Source: X. Zhang, J. Zhao, Y. LeCun, "Character-level Convolutional Networks for Text Classification", NIPS 2015,
made from J. McAuley, J. Leskovec, "Hidden factors and hidden topics", RecSys 2013. Their "Amazon Review Full Score
Dataset" (version 3) has ``train.csv`` and ``test.csv`` with 600,000 and 130,000 reviews of each class, records
``"class","title","text"``, quotes doubled, line ends written as ``\\n``.

arXiv 2403.01643 cites J. Ni, J. Li, J. McAuley, EMNLP 2019, whose set has 233 million reviews and no split of its own,
but mentions 3,650,000 reviews in five classes, the size of this set, and reports test accuracies of about 53 %. These
are meaningful for balanced classes only: in a raw sample more than half of the reviews have five stars.

The mixture is one file of JSON lines with ``stars``, ``title``, ``text`` and ``source``; it has no official split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from better_attention.lab.data.archives import MIB, decompressed, tar_streams
from better_attention.lab.data.own_texts.records import Faults, csv_records, json_records, lines, text_lines, whole
from better_attention.lab.data.own_texts.split import partition, repeats, text_key
from better_attention.lab.data.samples import DataError, Int64, Texts, overlap_notes, size_notes
from better_attention.lab.data.source import Source

# Its publisher's page gives no digest; torchtext knows an MD5, which is no proof. So it can be imported only.
OFFICIAL = (3_000_000, 650_000)
ARCHIVES = ("amazon_review_full_csv.tar.gz", "amazon_review_full_csv.tgz")
FOLDER = "amazon_review_full_csv"
FILES = ("train.csv", "test.csv")
MIXTURES = ("amazon-5star.jsonl", "amazon-5star.jsonl.gz", "amazon-5star.jsonl.xz")
CLASSES = ("1", "2", "3", "4", "5")
LAYOUT = (
    f"{ARCHIVES[0]} or .tgz, or its train.csv and test.csv (Zhang et al. 2015), or {MIXTURES[0]}, plain, .gz or .xz, "
    "with stars, title, text and source on each line"
)

_MEMBER = re.compile(rf"(?:{FOLDER}/)?(train|test)\.csv")
_LIMIT = 4096 * MIB  # bytes; the official files have 1.3 and 0.3 GiB
_FIELDS = ("stars", "title", "text", "source")


def locate(place: Path) -> tuple[Path, ...] | None:
    """The archive, the two files, or the mixture at or in ``place``, or None; the official data come first.

    Raises:
        DataError: only one of the two files is there.
    """
    if place.is_file():
        return (place,) if place.name in (*ARCHIVES, *MIXTURES) else None
    for name in ARCHIVES:
        if (place / name).is_file():
            return (place / name,)
    for folder in (place / FOLDER, place):
        there = tuple(folder / name for name in FILES if (folder / name).is_file())
        if len(there) == 1:
            raise DataError(f"{folder} holds {there[0].name} alone; {' and '.join(FILES)} belong together.")
        if there:
            return there
    return next(((place / name,) for name in MIXTURES if (place / name).is_file()), None)


def read(files: Sequence[Path]) -> Texts:
    """The reviews of what :func:`locate` found, title and text joined by a line end; class ``n - 1`` has ``n`` stars.

    Raises:
        DataError: a damaged file, a review without text, other stars than 1 to 5; names file and line.
    """
    return read_mixture(files[0]) if files[0].name in MIXTURES else read_official(files)


def read_official(files: Sequence[Path]) -> Texts:
    """Zhang et al.'s set, split as they split it, from the archive or its two files."""
    splits: dict[str, tuple[list[str], Int64]] = {}
    for part, place, source in _official_lines(files):
        texts: list[str] = []
        stars = bytearray()  # one byte per review: there are three million
        faults = Faults()
        for line, fields in csv_records(place, source, faults=faults):
            try:
                title, text = _official_fields(fields, f"{place}, line {line}")
                texts.append(_joined(title, text, f"{place}, line {line}"))
            except DataError as error:
                faults.add(line, str(error))
                continue
            # Last, so that texts and stars stay in step where a line is left out as faulty.
            stars.append(int(fields[0]))
        faults.check()
        splits[part] = texts, np.frombuffer(stars, dtype=np.uint8).astype(np.int64) - 1
    if splits.keys() != {"train", "test"}:
        raise DataError(f"{files[0]} holds no {' and no '.join({'train', 'test'} - splits.keys())}.csv: {LAYOUT}.")
    (train, train_labels), (test, test_labels) = splits["train"], splits["test"]
    if set(np.unique(np.concatenate([train_labels, test_labels])).tolist()) == {0, 1}:
        raise DataError(
            f"{files[0]}: every review is of class 1 or 2. This is Zhang et al.'s set of two classes (Amazon Review "
            "Polarity), where 1 is negative and 2 positive, not the one of one to five stars. Name the latter, or put "
            'a first line "label","title","text" into each file and read them with `better-attention compare text`.'
        )
    return Texts(
        name="amazon",
        train_texts=train,
        train_labels=train_labels,
        test_texts=test,
        test_labels=test_labels,
        classes=CLASSES,
        notes=(
            *overlap_notes(train, test),
            *size_notes(len(train), len(test), OFFICIAL),
        ),
    )


def _official_fields(fields: Sequence[str], place: str) -> tuple[str, str]:
    """Title and text of a record of the published set."""
    if len(fields) != 3 or fields[0] not in CLASSES:
        raise DataError(
            f'{place}: expected "class","title","text" with a class from 1 to 5, received {len(fields)} fields, the '
            f"first {fields[0][:20]!r}. This is not the set of five classes."
        )
    # Its publishers write a line end within a text as a backslash and an n.
    return fields[1].replace("\\n", "\n"), fields[2].replace("\\n", "\n")


def _official_lines(files: Sequence[Path]) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Part, name for messages and lines of the two files, each to be read before the next is asked for."""
    if len(files) == 1:
        for match, stream in tar_streams(files[0], _MEMBER, member_limit=_LIMIT, total_limit=2 * _LIMIT):
            yield match[1], f"{files[0]}: {match[0]}", lines(f"{files[0]}: {match[0]}", stream)
        return
    for file in files:
        with decompressed(file, limit=_LIMIT, plain=True) as stream:
            yield file.stem, str(file), lines(file, stream)


def read_mixture(file: Path) -> Texts:
    """A mixture of several collections: a tenth each of every source and number of stars for test and validation.

    Texts of the same words are on one side of the split.
    """
    texts: list[str] = []
    strata: list[tuple[str, int]] = []
    with text_lines(file) as source:
        faults = Faults()
        for line, record in json_records(file, source, faults):
            try:
                title, text, stars, origin = _fields(record, f"{file}, line {line}")
                texts.append(_joined(title, text, f"{file}, line {line}"))
            except DataError as error:
                faults.add(line, str(error))
                continue
            strata.append((origin, stars))
        faults.check()
    keys = [text_key(text) for text in texts]
    labels = np.array([stars - 1 for _, stars in strata], dtype=np.int64)
    parts = partition(keys, strata)
    train, validation, test = ([texts[row] for row in parts[part]] for part in ("train", "validation", "test"))
    if not test or not validation:
        raise DataError(f"{file} holds {len(texts)} reviews: too few to test with.")
    return Texts(
        name="amazon",
        train_texts=train,
        train_labels=labels[parts["train"]],
        test_texts=test,
        test_labels=labels[parts["test"]],
        classes=CLASSES,
        notes=(
            f"a mixture of {len(texts):,} reviews of {len({origin for origin, _ in strata})} collections, not the "
            f"{sum(OFFICIAL):,} of the paper; a tenth each for test and validation, by hash of the text within each "
            "collection and number of stars, texts of the same words on one side",
            *repeats(keys, labels.tolist()),
            _source_note(strata),
        ),
        validation_texts=validation,
        validation_labels=labels[parts["validation"]],
    )


def _fields(record: dict[str, Any], place: str) -> tuple[str, str, int, str]:
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        raise DataError(f"{place} has no {missing[0]!r}. Every line needs {', '.join(_FIELDS)}.")
    stars, title, text, origin = (record[name] for name in _FIELDS)
    # isinstance() would accept `true`, since bool is a subclass of int.
    if type(stars) is not int or not 1 <= stars <= 5:
        raise DataError(f"{place}: stars must be a whole number from 1 to 5, received {stars!r:.40}.")
    for name, value in (("title", title), ("text", text), ("source", origin)):
        if not isinstance(value, str) or not whole(value):
            raise DataError(f"{place}: {name} must be a text of whole characters, received {value!r:.40}.")
    return title, text, stars, origin


def _joined(title: str, text: str, place: str) -> str:
    """Title and text as the model reads them: of a long review the last words, so that its title matters less."""
    joined = f"{title}\n{text}" if title.strip() else text
    if not joined.strip():
        raise DataError(f"{place}: the review is empty. Remove that line.")
    return joined


def _source_note(strata: Sequence[tuple[str, int]]) -> str:
    """How well the collection that a text comes from predicts its stars."""
    sizes = Counter(origin for origin, _ in strata)
    best = Counter(origin for origin, stars in strata if stars == 5)
    shares = sorted(100 * best[origin] / size for origin, size in sizes.items())
    low, high = shares[0], shares[-1]
    return f"the collection partly predicts the stars: five stars make {low:.0f} % of one and {high:.0f} % of another"


SOURCE = Source(
    name="amazon",
    title="product reviews, one to five stars (officially 3,650,000)",
    terms="Zhang, Zhao, LeCun 2015, from McAuley, Leskovec 2013; research use, with citation",
    layout=LAYOUT,
    load=read,
    locate=locate,
)
