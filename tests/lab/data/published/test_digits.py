"""The embedded digits and our split of them."""

from __future__ import annotations

import random

import numpy as np
from sklearn.datasets import load_digits

from better_attention.lab.data.catalogue import read
from better_attention.lab.data.published import digits
from better_attention.lab.data.samples import Images


def test_the_splits_are_scikit_learns_digits_each_exactly_once() -> None:
    data = read("digits")
    assert isinstance(data, Images)
    bunch = load_digits()
    ours = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
    labels = np.concatenate([data.train_labels, data.test_labels])
    rows = sorted((*map(int, image), int(label)) for image, label in zip(ours, labels, strict=True))
    assert rows == sorted((*map(int, image), int(label)) for image, label in zip(bunch.data, bunch.target, strict=True))


def test_types_and_values() -> None:
    data = digits.read()
    assert data.train_images.shape == (1438, 8, 8)
    assert data.test_images.shape == (359, 8, 8)
    assert data.train_images.dtype == np.uint8
    assert data.train_labels.dtype == np.int64
    assert int(data.train_images.max()) == data.peak == 16
    assert data.classes == tuple("0123456789")
    assert data.train_images.flags.writeable  # torch.from_numpy warns of what is not
    assert "ours" in data.notes[0]


def test_every_class_gives_a_fifth_to_the_test() -> None:
    data = digits.read()
    train, test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    assert len(train) == len(test) == 10
    assert all(abs(5 * held - (kept + held)) <= 2 for kept, held in zip(train, test, strict=True))


def test_both_splits_keep_scikit_learns_order() -> None:
    labels = load_digits().target
    held_out = digits.held_out(labels)
    data = digits.read()
    np.testing.assert_array_equal(data.train_labels, labels[~held_out])
    np.testing.assert_array_equal(data.test_labels, labels[held_out])


def test_the_split_is_mixed_within_a_class() -> None:
    """A split that held out the first fifth of each class would hold out whole writers' first pages."""
    labels = load_digits().target
    places = np.flatnonzero(digits.held_out(labels)[labels == 3])
    count = int((labels == 3).sum())
    assert places.min() < count / 4
    assert places.max() > 3 * count / 4


def test_the_split_is_the_one_that_published_results_refer_to() -> None:
    """The fingerprint was taken when the split was made; if this fails, results/ no longer say what they measured."""
    assert digits.read().fingerprint() == "268b530afef8ccec1d6805123a9ab99532449c8740f5e787013538ecbe5d2c6e"


def test_nobodys_random_state_is_touched() -> None:
    digits.read()  # what imports do to it is not ours
    before = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    digits.read()
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()) == before
