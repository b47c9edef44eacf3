"""What a data set is once it has been read: arrays or texts, labels, and what a reader should know about them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from better_attention.text import plural

UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]


class DataError(ValueError):
    """Data that cannot be used as it is: damaged, incomplete, of another layout, or refused as unsafe."""


class NotFetched(DataError):  # noqa: N818 - it says what to do, and is public under this name
    """The data set is not on this machine; the message says the commands that bring it."""


@dataclass(frozen=True, eq=False)  # arrays have no single truth value; compare fingerprints instead
class Images:
    """Labelled pictures, split as their publisher split them.

    Args:
        name: the data set's name.
        train_images: uint8 ``(N, H, W)`` grey or ``(N, H, W, 3)`` RGB.
        train_labels: int64 ``(N,)``, indices into ``classes``.
        test_images: uint8, of the same ``H``, ``W`` and channels.
        test_labels: int64 ``(M,)``.
        classes: the name of each label.
        peak: the pixel value that means white.
        notes: what a report should say about the data.
        departures: those of the notes that say why this is not the published set of that name; they are shown with
            every result.

    Raises:
        DataError: the parts do not fit together, or there is only one class to learn.
    """

    name: str
    train_images: UInt8
    train_labels: Int64
    test_images: UInt8
    test_labels: Int64
    classes: tuple[str, ...]
    peak: int = 255
    notes: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split, images in (("train", self.train_images), ("test", self.test_images)):
            if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
                raise DataError(
                    f"{self.name}: the {split} images must be uint8 of shape (N, H, W) or (N, H, W, 3), "
                    f"received {images.dtype} {images.shape}."
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"{self.name}: training images have shape {self.train_images.shape[1:]} and test images "
                f"{self.test_images.shape[1:]}; both splits must be of one size."
            )
        _check_labels(self.name, "train", len(self.train_images), self.train_labels, self.classes)
        _check_labels(self.name, "test", len(self.test_images), self.test_labels, self.classes)

    def fingerprint(self) -> str:
        """SHA-256 of the contents, 64 hexadecimal digits: equal for equal data, whatever file it came from."""
        return _digest([self.train_images, self.train_labels, self.test_images, self.test_labels], self.classes)


@dataclass(frozen=True, eq=False)
class Texts:
    """Labelled texts, split as their publisher split them.

    Args:
        name: the data set's name.
        train_texts: the raw texts.
        train_labels: int64 ``(N,)``, indices into ``classes``.
        test_texts: the raw texts.
        test_labels: int64 ``(M,)``.
        classes: the name of each label.
        notes: what a report should say about the data.
        validation_texts, validation_labels: the validation split where the data has one; None: it is yet to be cut
            from the training split.

    Raises:
        DataError: the parts do not fit together, a text is empty, or there is only one class to learn.
    """

    name: str
    train_texts: list[str]
    train_labels: Int64
    test_texts: list[str]
    test_labels: Int64
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    validation_texts: list[str] | None = None
    validation_labels: Int64 | None = None

    def __post_init__(self) -> None:
        splits = {"train": (self.train_texts, self.train_labels), "test": (self.test_texts, self.test_labels)}
        if self.validation_texts is not None and self.validation_labels is not None:
            splits["validation"] = (self.validation_texts, self.validation_labels)
        for split, (texts, labels) in splits.items():
            for index, text in enumerate(texts):
                if not text or text.isspace():
                    raise DataError(f"{self.name}: text {index} of the {split} split is empty. Remove it.")
            _check_labels(self.name, split, len(texts), labels, self.classes)

    def fingerprint(self) -> str:
        """SHA-256 of the contents, 64 hexadecimal digits: equal for equal data, whatever file it came from."""
        texts = [*self.train_texts, *self.test_texts, *(self.validation_texts or ())]
        labels = [self.train_labels, self.test_labels]
        if self.validation_labels is not None:
            labels.append(self.validation_labels)
        return _digest(labels, [*self.classes, *texts])


@dataclass(frozen=True, eq=False)
class Pairs:
    """Sentences and their translations, in one list that is not split yet.

    Args:
        name: the data set's name.
        pairs: raw source and target sentence.
        notes: what a report should say about the data.

    Raises:
        DataError: no pair, or one with an empty side.
    """

    name: str
    pairs: list[tuple[str, str]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.pairs:
            raise DataError(f"{self.name}: there is no sentence pair.")
        for index, (source, target) in enumerate(self.pairs):
            if not source.strip() or not target.strip():
                raise DataError(f"{self.name}: pair {index} has an empty side ({source!r}, {target!r}). Remove it.")

    def fingerprint(self) -> str:
        """SHA-256 of the contents, 64 hexadecimal digits: equal for equal data, whatever file it came from."""
        return _digest([], (text for pair in self.pairs for text in pair))


@dataclass(frozen=True, eq=False)
class RunningText:
    """One long text, for language models; the task splits it by position.

    Args:
        name: the data set's name.
        text: all of it.
        notes: what a report should say about the data.
        departures: why this is not the published text of that name; shown with every result.

    Raises:
        DataError: there is nothing to read.
    """

    name: str
    text: str
    notes: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise DataError(f"{self.name}: the text is empty.")

    def fingerprint(self) -> str:
        """SHA-256 of the contents, 64 hexadecimal digits: equal for equal data, whatever file it came from."""
        return _digest([], [self.text])


def overlap_notes(train: Iterable[str], test: Iterable[str]) -> tuple[str, ...]:
    """A note if a text is in both splits: the accuracy on training texts says little about others."""
    shared = len(set(train) & set(test))
    return (f"{plural(shared, 'text')} {'occurs' if shared == 1 else 'occur'} in both splits",) if shared else ()


def size_notes(train: int, test: int, official: tuple[int, int]) -> tuple[str, ...]:
    """A note if the splits are not of the ``official`` sizes: a shortened copy must be recognisable."""
    if (train, test) == official:
        return ()
    return (
        f"{train:,} training and {test:,} test samples, where the official set has {official[0]:,} and {official[1]:,}",
    )


def departures(
    title: str, sizes: tuple[int, int], official: tuple[int, int], digests: Mapping[str, tuple[str, str]]
) -> tuple[str, ...]:
    """Why data is not the published set whose layout it has, as notes; none if it is that set.

    Args:
        title: the set's name, for people.
        sizes, official: samples to train and to test with, found and published.
        digests: file -> SHA-256 of its contents, found and published.
    """
    if sized := size_notes(*sizes, official):
        return sized
    wrong = [f"{name} has SHA-256 {digest[:12]}..." for name, (digest, theirs) in digests.items() if digest != theirs]
    if not wrong:
        return ()
    return (
        f"not {title}: {', '.join(wrong)}, not that of the published file. Other data in the same layout, or a changed "
        f"copy; nothing published about {title} compares with results on it",
    )


def _check_labels(name: str, split: str, samples: int, labels: Int64, classes: tuple[str, ...]) -> None:
    if labels.dtype != np.int64 or labels.shape != (samples,):
        raise DataError(
            f"{name}: the {split} split has {samples} samples and needs int64 labels of shape ({samples},), "
            f"received {labels.dtype} {labels.shape}."
        )
    if samples == 0:
        raise DataError(f"{name}: the {split} split is empty.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise DataError(
            f"{name}: {split} labels run from {low} to {high}, but there are {len(classes)} classes "
            f"(labels 0 to {len(classes) - 1})."
        )
    if split == "train" and low == high:
        raise DataError(
            f"{name}: every training sample has the one label {classes[low]!r}; there is nothing to learn. "
            "The file is incomplete or was cut by class."
        )


def _digest(arrays: Iterable[NDArray[Any]], texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        # Type and shape, too: the same bytes in another shape are other data.
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big"))  # lengths keep ("ab", "c") and ("a", "bc") apart
        digest.update(data)
    return digest.hexdigest()
