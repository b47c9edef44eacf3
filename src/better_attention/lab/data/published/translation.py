"""English sentences and their Spanish translations: Anki's pairs (Tatoeba) and the European Parliament's (Europarl).

Sources: Anki, tab-separated pairs made from tatoeba.org's, CC BY 2.0, in the copy that TensorFlow's tutorials and
keras.io's translation example read. P. Koehn, "Europarl: A Parallel Corpus for Statistical Machine Translation", MT
Summit 2005: two files with one sentence per line, where line n of one translates line n of the other. No digest of
either archive is published that could be cited, so that both are imported and not fetched.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from better_attention.errors import check_int
from better_attention.lab.data.archives import AGAIN, MIB, tar_members, zip_members
from better_attention.lab.data.samples import DataError, Int64, Pairs
from better_attention.lab.data.source import Source
from better_attention.lab.data.vocabulary import UNKNOWN

OFFICIAL = {"Anki": 118_964, "Europarl": 1_965_734}
"""Pairs of TensorFlow's copy of Anki's file, and of Europarl v7."""
LAYOUT = (
    "spa-eng.zip (Anki) or its spa.txt in DIR or DIR/spa_eng; es-en.tgz or another es-en*.tgz (Europarl), or "
    "europarl-v7.es-en.en and .es, in DIR or DIR/europarl; one of the two suffices"
)
START, END = "[start]", "[end]"

_ANKI_FILES = ("spa-eng.zip", "spa-eng/spa.txt", "spa.txt")
_ANKI_MEMBER = re.compile(r"(?:[^/]+/)?spa\.txt")
_EUROPARL_FILES = ("europarl-v7.es-en.en", "europarl-v7.es-en.es")
_EUROPARL_MEMBER = re.compile(r"(?:.*/)?(europarl-v7\.es-en\.(?:en|es))")
_FILE_LIMIT = 1024 * MIB  # bytes of one text, decompressed; Europarl's Spanish half has about 310 MiB
_DROPPED = re.compile(r"[^\w\s]|_")

Sentences = list[tuple[str, str]]


def normalise(text: str) -> str:
    """``text`` as keras.io's translation example reads it: lower case, no punctuation, a space between words.

    The example drops ASCII punctuation and the inverted question mark; here every other mark and symbol goes as well,
    the inverted exclamation mark first of all.

    >>> normalise("¿No?  ¡Qué «va», Señor O'Neill!")
    'no qué va señor oneill'
    """
    return " ".join(_DROPPED.sub("", unicodedata.normalize("NFC", text.lower())).split())


def encode(sentences: Sequence[str], words: Sequence[str], length: int, *, framed: bool = False) -> Int64:
    """The **first** ``length`` words of normalised sentences as numbers, padded on the **right** with 0.

    Args:
        sentences: ``N`` sentences.
        words: the vocabulary; word ``i`` has the number ``i + 2``, an unknown one 1.
        length: numbers a row.
        framed: put the word ``[start]`` in front and ``[end]`` behind, both counted and cut off like any other.

    Returns:
        int64 ``(N, length)``.

    >>> encode(["a b c", "b"], ["a", "b"], 2).tolist()
    [[2, 3], [3, 0]]
    """
    length = check_int(length, "length")
    numbers = {word: number for number, word in enumerate(words, start=UNKNOWN + 1)}
    rows = np.zeros((len(sentences), length), dtype=np.int64)
    for row, sentence in zip(rows, sentences, strict=True):
        own = sentence.split()
        own = ([START, *own, END] if framed else own)[:length]
        row[: len(own)] = [numbers.get(word, UNKNOWN) for word in own]
    return rows


def locate(place: Path) -> tuple[Path, ...] | None:
    """Anki's file, then Europarl's one or two, at or in ``place``; None if there is neither.

    Raises:
        DataError: half of Europarl, or several archives of it, none of them the official one.
    """
    if place.is_file():
        return (place,)
    anki = [file for folder in (place, place / "spa_eng") for name in _ANKI_FILES if (file := folder / name).is_file()]
    europarl = next((files for folder in (place, place / "europarl") if (files := _locate_europarl(folder))), ())
    return (*anki[:1], *europarl) or None


def read(files: Sequence[Path]) -> Pairs:
    """The pairs in the files that :func:`locate` found, Anki's first, in the order of their lines.

    Returns:
        Raw English and Spanish sentences. Lines of Europarl with an empty side are left out, as its publisher advises;
        an Anki line without a translation is an error, since the published file has none.

    Raises:
        DataError: a damaged or unsafe archive, a line of another form, halves of different length, or no UTF-8.
    """
    anki = [file for file in files if file.suffix in (".zip", ".txt", ".tsv")]
    europarl = [file for file in files if file not in anki]
    pairs: Sentences = []
    notes: tuple[str, ...] = ()
    for name, files_there, reader in (("Anki", anki, _read_anki), ("Europarl", europarl, _read_europarl)):
        if not files_there:
            notes += (f"without {name}, which was not there: arXiv 2403.01643 takes Anki and Europarl together",)
            continue
        part, empty = reader(files_there)
        pairs += part
        # Pairs with an empty side count as well, since the official number includes them.
        if len(part) + empty != OFFICIAL[name]:
            notes += (f"{len(part) + empty:,} pairs of {name}, where the official set has {OFFICIAL[name]:,}",)
        if empty:
            notes += (f"{empty:,} lines of {name} with an empty side left out",)
    return Pairs("translation", pairs, notes)


def _locate_europarl(folder: Path) -> tuple[Path, ...]:
    if (folder / "es-en.tgz").is_file():
        return (folder / "es-en.tgz",)
    archives = sorted(file for file in folder.glob("es-en*.tgz") if file.is_file())
    if len(archives) > 1:
        raise DataError(
            f"{folder} holds several archives of Europarl ({', '.join(f.name for f in archives)}). Name the one to "
            "read es-en.tgz, or remove the others."
        )
    halves = [file for name in _EUROPARL_FILES if (file := folder / name).is_file()]
    if not archives and len(halves) == 1:
        raise DataError(f"{folder} holds {halves[0].name} alone: {' and '.join(_EUROPARL_FILES)} belong together.")
    return tuple(archives or halves)


def _read_anki(files: Sequence[Path]) -> tuple[Sentences, int]:
    (path,) = files
    if path.suffix == ".zip":
        members = [
            (f"{path}: {match[0]}", data) for match, data in zip_members(path, _ANKI_MEMBER, member_limit=_FILE_LIMIT)
        ]
        if len(members) != 1:
            raise DataError(f"{path} holds {len(members)} files spa.txt, and one is expected. {AGAIN}")
    else:
        members = [(str(path), _contents(path))]
    ((where, data),) = members
    pairs = []
    for number, line in _lines(where, data):
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) not in (2, 3):
            raise DataError(
                f"{where}, line {number}: expected English TAB Spanish, or a third column with the origin; received "
                f"{len(columns)} column{'s' * (len(columns) > 1)}: {line[:60]!r}."
            )
        if not (columns[0] and columns[1]):
            raise DataError(f"{where}, line {number}: the {'Spanish' if columns[0] else 'English'} side is empty.")
        pairs.append((columns[0], columns[1]))
    return pairs, 0


def _read_europarl(files: Sequence[Path]) -> tuple[Sentences, int]:
    if len(files) == 2:
        halves = {file.name: (str(file), _contents(file)) for file in files}
    else:
        limits = {"member_limit": _FILE_LIMIT, "total_limit": 2 * _FILE_LIMIT}
        members = tar_members(files[0], _EUROPARL_MEMBER, **limits)
        halves = {match[1]: (f"{files[0]}: {match[0]}", data) for match, data in members}
    missing = [name for name in _EUROPARL_FILES if name not in halves]
    if missing:
        raise DataError(f"{files[0]} does not hold {' and '.join(missing)}: incomplete, or of another layout. {AGAIN}")
    # pop() frees the bytes of one half, about 300 MiB, before the other half is decoded.
    (english, spanish) = ([line.strip() for _, line in _lines(*halves.pop(name))] for name in _EUROPARL_FILES)
    if len(english) != len(spanish):
        raise DataError(
            f"{files[0]}: {_EUROPARL_FILES[0]} has {len(english):,} lines and {_EUROPARL_FILES[1]} {len(spanish):,}. "
            f"From line {min(len(english), len(spanish)) + 1:,} on one side is missing, and nothing tells where they "
            f"parted. {AGAIN}"
        )
    pairs = [(source, target) for source, target in zip(english, spanish, strict=True) if source and target]
    return pairs, len(english) - len(pairs)


def _contents(path: Path) -> bytes:
    if path.stat().st_size > _FILE_LIMIT:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes; at most {_FILE_LIMIT:,} are expected.")
    return path.read_bytes()


def _lines(where: str, data: bytes) -> Iterator[tuple[int, str]]:
    """Number and text of each line, ended by line feeds alone: Europarl has other separators inside its sentences."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}, line {number}: not UTF-8 text (byte {data[error.start]:#04x}). Convert the file to UTF-8."
        ) from None
    # A line end at the end of the file does not begin another line.
    yield from enumerate(text.removesuffix("\n").split("\n"), start=1)


SOURCE = Source(
    name="translation",
    title="English sentences and their Spanish translations: Anki and Europarl",
    terms="Tatoeba (tatoeba.org), CC BY 2.0 FR; Koehn 2005 (Europarl v7), no known restriction",
    layout=LAYOUT,
    load=read,
    locate=locate,
)
