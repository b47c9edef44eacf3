"""What the containers refuse, and what a fingerprint tells apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from better_attention.lab.data.samples import DataError, Images, Texts, size_notes

IMAGES = Images(
    name="marks",
    train_images=np.arange(5 * 3 * 2, dtype=np.uint8).reshape(5, 3, 2),
    train_labels=np.array([0, 1, 1, 0, 1]),
    test_images=np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2),
    test_labels=np.array([1, 1]),
    classes=("tick", "cross"),
)
TEXTS = Texts(
    name="lines",
    train_texts=["ab", "c", "d"],
    train_labels=np.array([0, 1, 1]),
    test_texts=["e"],
    test_labels=np.array([0]),
    classes=("no", "yes"),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((5, 3, 2))}, r"train images must be uint8 .* received float64 \(5, 3, 2\)"),
        ({"test_images": np.zeros((2, 6), np.uint8)}, r"test images must be .* received uint8 \(2, 6\)"),
        ({"test_images": np.zeros((2, 3, 2, 4), np.uint8)}, r"\(N, H, W, 3\), received uint8 \(2, 3, 2, 4\)"),
        ({"test_images": np.zeros((2, 2, 3), np.uint8)}, r"shape \(3, 2\) and test images \(2, 3\)"),
        ({"train_labels": np.array([0, 1, 1, 0])}, r"has 5 samples and needs int64 labels .* received int64 \(4,\)"),
        ({"train_labels": np.zeros(5, np.int32)}, "received int32"),
        ({"train_labels": np.array([0, 1, 2, 0, 1])}, "train labels run from 0 to 2, but there are 2 classes"),
        ({"test_labels": np.array([-1, 1])}, "test labels run from -1 to 1"),
        ({"train_labels": np.ones(5, np.int64)}, "every training sample has the one label 'cross'"),
        ({"test_images": np.zeros((0, 3, 2), np.uint8), "test_labels": np.zeros(0, np.int64)}, "test split is empty"),
    ],
)
def test_images_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"marks: .*{message}"):
        replace(IMAGES, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_texts": ["ab", " \n", "d"]}, "text 1 of the train split is empty"),
        ({"test_texts": [""]}, "text 0 of the test split is empty"),
        ({"test_texts": ["e", "f"]}, "test split has 2 samples"),
        ({"train_labels": np.zeros(3, np.int64)}, "one label 'no'"),
        ({"test_labels": np.array([7])}, "test labels run from 7 to 7"),
    ],
)
def test_texts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"lines: .*{message}"):
        replace(TEXTS, **change)


def test_a_data_error_is_a_value_error() -> None:
    assert issubclass(DataError, ValueError)


def test_fingerprints_know_every_part_of_the_contents_and_nothing_else() -> None:
    swapped = IMAGES.train_images[[1, 0, 2, 3, 4]]
    others: list[Images | Texts] = [
        replace(IMAGES, train_images=swapped),
        replace(IMAGES, train_labels=np.array([1, 1, 1, 0, 1])),
        replace(IMAGES, test_images=IMAGES.test_images[::-1]),
        replace(IMAGES, test_labels=np.array([0, 1])),
        replace(IMAGES, classes=("tick", "blot")),
        TEXTS,
        replace(TEXTS, train_texts=["a", "bc", "d"]),
        replace(TEXTS, train_labels=np.array([0, 0, 1])),
        replace(TEXTS, test_texts=["f"]),
        replace(TEXTS, test_labels=np.array([1])),
    ]
    prints = [data.fingerprint() for data in (IMAGES, *others)]
    assert len(set(prints)) == len(prints)
    assert all(len(bytes.fromhex(text)) == 32 for text in prints)
    same = replace(IMAGES, name="other", notes=("a note",), train_images=np.asfortranarray(IMAGES.train_images))
    assert same.fingerprint() == IMAGES.fingerprint()


def test_sizes_other_than_the_official_ones_are_noted() -> None:
    assert size_notes(60_000, 10_000, (60_000, 10_000)) == ()
    (note,) = size_notes(59_999, 10_000, (60_000, 10_000))
    assert note == "59,999 training and 10,000 test samples, where the official set has 60,000 and 10,000"
