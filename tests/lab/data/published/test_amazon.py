"""Amazon reviews: the five-class set in its wrappers, the mixture in its stead, and what can be wrong with either."""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from better_attention.lab.data import store
from better_attention.lab.data.catalogue import read
from better_attention.lab.data.published import SOURCES, amazon
from better_attention.lab.data.samples import DataError, Texts
from better_attention.lab.data.vocabulary import tokens
from helpers.layouts import compress, member, tar

TRAIN = (
    '"3","more like ""funchuck""","Gave this to my dad.\\nHe nearly ""died""."\n'
    '"5","Inspiring","I hope, a lot of people hear this cd."\n'
    '"1","","No title: avoid"\n'
)
TEST = '"4","Delightful","A fast read; in brief, sly."\n"5","Inspiring","I hope, a lot of people hear this cd."\n'
OFFICIAL: Mapping[str, str] = {
    "amazon_review_full_csv/readme.txt": "Amazon Review Full Score Dataset",
    "amazon_review_full_csv/test.csv": TEST,
    "amazon_review_full_csv/train.csv": TRAIN,
}


def write_archive(
    place: Path, files: Mapping[str, str] = OFFICIAL, name: str = "amazon_review_full_csv.tar.gz"
) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(compress(tar(member(file, text) for file, text in files.items()), "gz"))
    return place


def write_folder(place: Path, files: Mapping[str, str] = OFFICIAL) -> Path:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    return place


WRAPPERS = pytest.mark.parametrize("write", [write_archive, write_folder])


@WRAPPERS
def test_the_five_class_set(tmp_path: Path, write: Any) -> None:
    data = read("amazon", write(tmp_path))
    assert isinstance(data, Texts)
    assert data.train_texts == [
        'more like "funchuck"\nGave this to my dad.\nHe nearly "died".',
        "Inspiring\nI hope, a lot of people hear this cd.",
        "No title: avoid",
    ]
    assert data.train_labels.tolist() == [2, 4, 0]
    assert data.test_labels.tolist() == [3, 4]
    assert data.classes == ("1", "2", "3", "4", "5")
    assert data.validation_texts is None
    assert data.notes == (
        "1 text occurs in both splits",
        "3 training and 2 test samples, where the official set has 3,000,000 and 650,000",
    )


def test_every_wrapper_holds_the_same(tmp_path: Path) -> None:
    bare = {name.rpartition("/")[2]: text for name, text in OFFICIAL.items()}
    places = [
        write_archive(tmp_path / "a"),
        write_archive(tmp_path / "b", name="amazon_review_full_csv.tgz"),
        write_archive(tmp_path / "c", dict(reversed(OFFICIAL.items()))),
        write_folder(tmp_path / "d"),
        write_folder(tmp_path / "e" / "amazon", bare),
        write_archive(tmp_path / "f", bare) / "amazon_review_full_csv.tar.gz",
    ]
    assert len({read("amazon", place).fingerprint() for place in places}) == 1


@WRAPPERS
@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            '"6","a","b"\n',
            r"train\.csv, line 1: expected \"class\",\"title\",\"text\" with a class from 1 to 5, received ",
        ),
        (
            '"1","a b"\n',
            r"train\.csv, line 1: expected .* received 2 fields, the first '1'\. This is not the set of fi",
        ),
        (TRAIN + '"2","a"\n', r"train\.csv, line 4 has 2 fields, line 1 has 3"),
        (TRAIN + '"2"," ",""\n', r"train\.csv, line 4: the review is empty"),
        (TRAIN + '"2","a","b', r"train\.csv: the record that begins on line 4 is no CSV"),
        (TRAIN.replace("1", "5").replace("3", "5"), r"every training sample has the one label '5'"),
    ],
)
def test_what_is_wrong_with_the_five_class_set(tmp_path: Path, write: Any, train: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("amazon", write(tmp_path, {**OFFICIAL, "amazon_review_full_csv/train.csv": train}))


def test_half_of_the_five_class_set(tmp_path: Path) -> None:
    one = {"amazon_review_full_csv/test.csv": TEST}
    with pytest.raises(
        DataError, match=r"amazon_review_full_csv holds test\.csv alone; train\.csv and test\.csv belong"
    ):
        read("amazon", write_folder(tmp_path / "a", one))
    with pytest.raises(DataError, match=r"tar\.gz holds no train\.csv: amazon_review_full_csv\.tar\.gz or \.tgz"):
        read("amazon", write_archive(tmp_path / "b", one))
    packed = (write_archive(tmp_path / "c") / "amazon_review_full_csv.tar.gz").read_bytes()
    (tmp_path / "c" / "amazon_review_full_csv.tar.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match=r"amazon_review_full_csv\.tar\.gz is cut short"):
        read("amazon", tmp_path / "c")


def test_an_archive_that_no_publisher_made(tmp_path: Path) -> None:
    outside = {"amazon_review_full_csv/../../train.csv": TRAIN, **OFFICIAL}
    with pytest.raises(DataError, match=r"is a path that leads out of the archive"):
        read("amazon", write_archive(tmp_path, outside))


# --- the mixture ------------------------------------------------------------------------------------------------------


def review(number: int, rating: int, source: str, **changes: Any) -> dict[str, Any]:
    texts = {"title": f"title {number}", "text": f"review number {number} from {source}", "domain": "books"}
    return {"stars": rating, **texts, "source": source} | changes


MIXTURE = [review(i, 1 + i % 5, "shop") for i in range(500)] + [
    review(i, 5 if i % 10 else 1, "market", title="") for i in range(200)
]
MIXTURE += [review(i, 5, "market", title="", text=f"REVIEW number {i}, from market!") for i in range(0, 200, 40)]
"""705 reviews of two sources: five stars make 20 % of one and 185 of 205 of the other; five texts come twice."""


def write_mixture(place: Path, records: Any = MIXTURE, name: str = "amazon-5star.jsonl.xz") -> Path:
    place.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)
    (place / name).write_bytes(pack(content))
    return place


def key(text: str) -> tuple[str, ...]:
    return tuple(tokens(text))


def test_the_mixture(tmp_path: Path) -> None:
    data = read("amazon", write_mixture(tmp_path))
    assert isinstance(data, Texts)
    assert data.validation_texts is not None
    assert len(data.train_texts) + len(data.validation_texts) + len(data.test_texts) == len(MIXTURE)
    assert "title 3\nreview number 3 from shop" in {*data.train_texts, *data.validation_texts, *data.test_texts}
    train, validation, test = ({*map(key, t)} for t in (data.train_texts, data.validation_texts, data.test_texts))
    assert not train & validation
    assert not train & test
    assert not validation & test
    # A tenth of every source and number of stars: 5 x 10 of the shop's 500; of the market's 205, 2 with one star (of 25
    # rows, the repeated among them) and 18 with five (of 180).
    shop = Counter(
        label for text, label in zip(data.test_texts, data.test_labels.tolist(), strict=True) if "shop" in text
    )
    assert shop == {0: 10, 1: 10, 2: 10, 3: 10, 4: 10}
    assert data.notes[1:] == (
        "5 of 705 texts repeat another one word for word",
        "5 texts occur with different labels: no model can be right on all of them",
        "the collection partly predicts the stars: five stars make 20 % of one and 90 % of another",
    )
    assert data.notes[0].startswith(
        "a mixture of 705 reviews of 2 collections, not the 3,650,000 of the paper; a tenth"
    )


def test_the_mixture_in_any_order_and_wrapper(tmp_path: Path) -> None:
    names = ("amazon-5star.jsonl", "amazon-5star.jsonl.gz", "amazon-5star.jsonl.xz")
    assert len({read("amazon", write_mixture(tmp_path / name, name=name)).fingerprint() for name in names}) == 1
    turned = read("amazon", write_mixture(tmp_path / "turned", MIXTURE[::-1]))
    straight = read("amazon", tmp_path / names[0])
    assert isinstance(turned, Texts)
    assert isinstance(straight, Texts)
    assert sorted(turned.test_texts) == sorted(straight.test_texts)
    assert sorted(turned.validation_texts or ()) == sorted(straight.validation_texts or ())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"stars": 5, "title": "", "text": "a"},
            r"xz, line 2 has no 'source'\. Every line needs stars, title, text, so",
        ),
        (review(0, 0, "a"), r"xz, line 2: stars must be a whole number from 1 to 5, received 0\."),
        (review(0, 1, "a", stars=True), r"line 2: stars must be a whole number from 1 to 5, received True"),
        (review(0, 1, "a", stars="5"), r"line 2: stars must be a whole number from 1 to 5, received '5'"),
        (review(0, 1, "a", text=None), r"line 2: text must be a text of whole characters, received None"),
        (review(0, 1, "a", title="\ud83d"), r"line 2: title must be a text of whole characters, received '\\ud83d'"),
        (review(0, 1, "a", title=" ", text="\n"), r"line 2: the review is empty\. Remove that line"),
        ([1], r"line 2 is JSON, but no object"),
    ],
)
def test_what_is_wrong_with_a_line_of_the_mixture(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("amazon", write_mixture(tmp_path, [review(0, 1, "a"), record]))


def test_too_small_a_mixture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 3 reviews: too few to test with"):
        read("amazon", write_mixture(tmp_path, MIXTURE[:3]))


# --- where it lies ----------------------------------------------------------------------------------------------------


def test_the_official_set_comes_first(tmp_path: Path) -> None:
    assert amazon.locate(tmp_path) is None
    write_mixture(tmp_path)
    assert amazon.locate(tmp_path) == (tmp_path / "amazon-5star.jsonl.xz",)
    write_folder(tmp_path)
    assert [file.name for file in amazon.locate(tmp_path) or ()] == ["train.csv", "test.csv"]
    write_archive(tmp_path)
    assert amazon.locate(tmp_path) == (tmp_path / "amazon_review_full_csv.tar.gz",)
    assert amazon.locate(tmp_path / "amazon_review_full_csv" / "readme.txt") is None


@pytest.mark.parametrize("write", [write_archive, write_folder, write_mixture])
def test_it_can_be_imported_though_not_fetched(cache: Path, tmp_path: Path, write: Any) -> None:
    place = write(tmp_path / "mine")
    store.import_from(SOURCES["amazon"], place)
    assert read("amazon").fingerprint() == read("amazon", place).fingerprint()
    with pytest.raises(DataError, match=r"can only be imported: no published SHA-256 of its files could be cited"):
        store.fetch(SOURCES["amazon"])


@pytest.mark.data
def test_the_real_mixture(real_data: Path) -> None:
    """Counts of its README: 28,891 reviews; 4,152 / 2,492 / 1,523 / 3,893 / 16,831 by stars."""
    data = read("amazon", real_data)
    assert isinstance(data, Texts)
    assert data.validation_labels is not None
    labels = [*data.train_labels.tolist(), *data.validation_labels.tolist(), *data.test_labels.tolist()]
    assert Counter(labels) == {0: 4_152, 1: 2_492, 2: 1_523, 3: 3_893, 4: 16_831}
    for held_out in (data.validation_labels, data.test_labels):
        share = Counter(held_out.tolist())
        for label, count in Counter(labels).items():
            assert abs(share[label] - count / 10) < 0.02 * count
    assert not {*map(key, data.train_texts)} & {*map(key, data.test_texts)}
