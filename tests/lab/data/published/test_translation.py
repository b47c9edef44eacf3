"""Sentence pairs: both layouts in every wrapper, every way in which they can be wrong, and how sentences are read."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from better_attention.lab.data import store
from better_attention.lab.data.catalogue import read
from better_attention.lab.data.published import SOURCES, translation
from better_attention.lab.data.published.translation import encode, normalise
from better_attention.lab.data.samples import DataError, NotFetched, Pairs
from helpers.layouts import compress, member, tar

ANKI = "Go.\tVe.\nGo.\tVete.\nHow are you?\t¿Cómo estás?\tCC-BY 2.0 (France) Attribution: tatoeba.org #1\n"
ENGLISH = "Resumption of the session\nI declare\u2028it open .\n\n"
SPANISH = "Reanudación del período de sesiones\r\nLo declaro abierto .\n \n"
ANKI_PAIRS = [("Go.", "Ve."), ("Go.", "Vete."), ("How are you?", "¿Cómo estás?")]
EUROPARL_PAIRS = [
    ("Resumption of the session", "Reanudación del período de sesiones"),
    ("I declare\u2028it open .", "Lo declaro abierto ."),
]
HALVES = ("europarl-v7.es-en.en", "europarl-v7.es-en.es")


def zipped(members: Mapping[str, str | bytes], **header: Any) -> bytes:
    """A zip archive; ``header`` sets fields of every member's entry."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in header.items():
                setattr(info, key, value)
            archive.writestr(info, text)
    return stream.getvalue()


def write_anki(folder: Path, text: str | bytes = ANKI, name: str = "spa-eng.zip") -> Path:
    """Anki's file below ``folder``, zipped where the name says so."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = text.encode() if isinstance(text, str) else text
    path.write_bytes(
        zipped({"spa-eng/": "", "spa-eng/spa.txt": plain, "spa-eng/_about.txt": "x"})
        if path.suffix == ".zip"
        else plain
    )
    return path


def write_europarl(folder: Path, english: str = ENGLISH, spanish: str = SPANISH, name: str = "es-en.tgz") -> Path:
    """Europarl's archive below ``folder``; the two files themselves without a name."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = dict(zip(HALVES, (english, spanish), strict=True))
    if not name:
        for half, text in texts.items():
            (folder / half).write_bytes(text.encode())
        return folder
    (folder / name).write_bytes(compress(tar(member(half, text) for half, text in texts.items()), "gz"))
    return folder / name


def pairs(place: Path) -> Pairs:
    data = read("translation", place)
    assert isinstance(data, Pairs)
    return data


@pytest.mark.parametrize(
    "anki", ["spa-eng.zip", "spa.txt", "spa_eng/spa-eng.zip", "spa-eng/spa.txt", "spa_eng/spa.txt"]
)
@pytest.mark.parametrize("europarl", ["", "europarl"])
@pytest.mark.parametrize("archive", ["es-en.tgz", "es-en-subset.tgz", ""])
@pytest.mark.parametrize("below", ["", "translation"])
def test_what_was_written_is_read(tmp_path: Path, anki: str, europarl: str, archive: str, below: str) -> None:
    write_anki(tmp_path / below, name=anki)
    write_europarl(tmp_path / below / europarl, name=archive)
    data = pairs(tmp_path)
    assert data.pairs == ANKI_PAIRS + EUROPARL_PAIRS
    assert data.notes == (
        "3 pairs of Anki, where the official set has 118,964",
        "3 pairs of Europarl, where the official set has 1,965,734",
        "1 lines of Europarl with an empty side left out",
    )


def test_one_of_the_two_suffices_and_is_noted(tmp_path: Path) -> None:
    alone = pairs(write_anki(tmp_path / "a").parent)
    assert alone.pairs == ANKI_PAIRS
    assert alone.notes[1].startswith("without Europarl, which was not there")
    assert pairs(write_anki(tmp_path / "a")).pairs == ANKI_PAIRS  # the file itself
    other = pairs(write_europarl(tmp_path / "b"))
    assert other.pairs == EUROPARL_PAIRS
    assert other.notes[0].startswith("without Anki")


def test_neither_is_not_there_and_can_only_be_imported(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(NotFetched, match=r"not in .*`better-attention data import translation FROM`"):
        read("translation", tmp_path)
    with pytest.raises(DataError, match="'translation' can only be imported"):
        store.fetch(SOURCES["translation"])
    write_anki(tmp_path)
    write_europarl(tmp_path)
    store.import_from(SOURCES["translation"], tmp_path)
    assert (cache / "translation" / "spa-eng.zip").is_file()
    assert read("translation").fingerprint() == pairs(tmp_path).fingerprint()


def test_which_archive_of_europarl(tmp_path: Path) -> None:
    for name in ("es-en-a.tgz", "es-en-b.tgz"):
        write_europarl(tmp_path, name=name)
    with pytest.raises(DataError, match=r"several archives of Europarl \(es-en-a\.tgz, es-en-b\.tgz\)"):
        read("translation", tmp_path)
    official = write_europarl(tmp_path)
    assert translation.locate(tmp_path) == (official,)
    write_europarl(tmp_path / "halves", name="")
    (tmp_path / "halves" / HALVES[1]).unlink()
    with pytest.raises(DataError, match=r"holds europarl-v7\.es-en\.en alone"):
        read("translation", tmp_path / "halves")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Go.\tVe.\nGo. Vete.\n", r"line 2: expected English TAB Spanish.* received 1 column: 'Go\. Vete\.'"),
        ("Go.\tVe.\n\nHi.\tHola.\n", "line 2: .* received 1 column: ''"),
        ("a\tb\tc\td\n", "line 1: .* received 4 columns"),
        ("Go.\tVe.\nHi.\t \n", "line 2: the Spanish side is empty"),
        ("Go.\tVe.\n\tHola.\n", "line 2: the English side is empty"),
        ("Go.\tVe.\nHi.\t¿Qué?\n".encode("latin-1"), r"line 2: not UTF-8 text \(byte 0xbf\)"),
        ("", "line 1: .* received 1 column"),
    ],
)
@pytest.mark.parametrize("name", ["spa-eng.zip", "spa.txt"])
def test_a_damaged_line_is_named(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    write_anki(tmp_path, text or (b"" if name.endswith("zip") else b"\n"), name)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read("translation", tmp_path)


@pytest.mark.parametrize("name", ["es-en.tgz", ""])
def test_halves_that_do_not_fit(tmp_path: Path, name: str) -> None:
    write_europarl(tmp_path, spanish="uno\ndos\ntres\ncuatro\n", name=name)
    with pytest.raises(DataError, match=r"\.en has 3 lines and europarl-v7\.es-en\.es 4\. From line 4 on one side"):
        read("translation", tmp_path)


def test_half_an_archive_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "es-en.tgz"
    path.write_bytes(compress(tar([member(HALVES[0], ENGLISH)]), "gz"))
    with pytest.raises(DataError, match=r"does not hold europarl-v7\.es-en\.es"):
        read("translation", tmp_path)
    texts = (ENGLISH, "uno\n\xf3\n".encode("latin-1"))
    path.write_bytes(compress(tar(member(half, text) for half, text in zip(HALVES, texts, strict=True)), "gz"))
    with pytest.raises(DataError, match=r"europarl-v7\.es-en\.es, line 2: not UTF-8 text \(byte 0xf3\)"):
        read("translation", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<!DOCTYPE html><html>moved</html>", "is a web page, not data"),
        (b"PK\x03\x04 nothing", "is no zip archive, or a damaged one"),
        (zipped({"spa-eng/spa.txt": ANKI})[:-30], "is no zip archive, or a damaged one"),
        (
            zipped({"spa-eng/spa.txt": ANKI}).replace(
                b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
            ),
            "encrypted",
        ),
        (zipped({"spa-eng/spa.txt": ANKI}, external_attr=(stat.S_IFLNK | 0o777) << 16), "is a link"),
        (zipped({"../spa.txt": ANKI}), r"'\.\./spa\.txt' is a path that leads out"),
        (zipped({"/etc/spa.txt": ANKI}), "is a path that leads out"),
        (zipped({"a/spa.txt": ANKI, "b/spa.txt": ANKI}), r"holds 2 files spa\.txt"),
        (zipped({"readme": "x"}), r"holds 0 files spa\.txt"),
        (zipped({"spa.txt": bytes(300 << 20)}), "expands to more than 100 times its size"),
    ],
)
def test_archives_that_nobody_should_trust(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "spa-eng.zip").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read("translation", tmp_path)


def test_a_flipped_bit_fails_the_checksum(tmp_path: Path) -> None:
    content = bytearray(write_anki(tmp_path).read_bytes())
    start = content.index(b"spa-eng/spa.txt") + len("spa-eng/spa.txt")
    for place in range(start, start + 60):
        content[place] ^= 4
        (tmp_path / "spa-eng.zip").write_bytes(content)
        with pytest.raises(DataError, match=r"spa-eng\.zip is (damaged|no zip archive, or a damaged one)"):
            read("translation", tmp_path)
        content[place] ^= 4


def test_a_member_that_occurs_twice(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("spa-eng/spa.txt", ANKI)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("spa-eng/spa.txt", "other\ttext\n")
    (tmp_path / "spa-eng.zip").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=r"'spa-eng/spa\.txt' occurs twice"):
        read("translation", tmp_path)


@pytest.mark.parametrize(
    ("made_of", "message"), [([], "there is no sentence pair"), ([("a", " ")], "pair 0 has an empty side")]
)
def test_pairs_that_are_none(made_of: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=f"mine: {message}"):
        Pairs("mine", made_of)


def test_a_fingerprint_knows_the_pairs() -> None:
    one = Pairs("x", [("a", "b"), ("c", "d")])
    assert Pairs("x", [("a", "bc"), ("c", "d")]).fingerprint() != Pairs("x", [("ab", "c"), ("c", "d")]).fingerprint()
    assert Pairs("y", [("a", "b"), ("c", "d")], ("note",)).fingerprint() == one.fingerprint()
    assert Pairs("x", [("c", "d"), ("a", "b")]).fingerprint() != one.fingerprint()
    assert Pairs("x", [("a", "b"), ("c", "e")]).fingerprint() != one.fingerprint()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Can you please leave me alone?", "can you please leave me alone"),
        ("¿Me puedes dejar sola, por favor?", "me puedes dejar sola por favor"),
        ("¡ES  [start] así_no!\t", "es start asíno"),
        ("It isn't 3.5 – \u201cquoted\u201d \u00bfno\u00a0?", "it isnt 35 quoted no"),
        ("Sen\u0303or A\u0301LAMO", "señor álamo"),
        ("... !", ""),
    ],
)
def test_sentences_are_read_as_in_the_example(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


def test_words_as_numbers() -> None:
    words = ["[start]", "[end]", "el", "gato"]
    rows = encode(["el gato", "el perro el gato el", ""], words, 5, framed=True)
    assert rows.tolist() == [[2, 4, 5, 3, 0], [2, 4, 1, 4, 5], [2, 3, 0, 0, 0]]
    assert encode(["el gato negro"], words, 2).tolist() == [[4, 5]]


@pytest.mark.data
def test_the_real_thing(real_data: Path) -> None:
    """Sizes as the data's README says; the pair that keras.io's example prints first is among them."""
    data = pairs(real_data)
    assert len(data.pairs) == 118_964 + 23_269
    assert data.notes == ("23,269 pairs of Europarl, where the official set has 1,965,734",)
    assert data.pairs[0] == ("Go.", "Ve.")
    assert data.pairs[-1][0].startswith("The threshold has been lowered to 0.5")
