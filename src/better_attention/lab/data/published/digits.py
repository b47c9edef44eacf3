"""The 1,797 handwritten digits that scikit-learn carries: real data without a download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998: its test part, by 13 writers, as ``sklearn.datasets.load_digits`` ships it.
"""

from __future__ import annotations

import numpy as np

from better_attention.lab.data.samples import Images, Int64
from better_attention.lab.data.source import Source

SEED = 2403  # any number would do; fixed, for results are comparable on one split alone
TEST_SHARE = 0.2
NOTES = (
    "scikit-learn ships no split: ours is stratified by class, 80 % train and 20 % test, with a fixed seed; "
    "writers are not distinguished, so that the same hand occurs on both sides",
)


def read() -> Images:
    """The digits, 8×8, grey values 0 to 16.

    Returns:
        1,438 training and 359 test images, each split in scikit-learn's order.

    Raises:
        ImportError: scikit-learn is missing.
    """
    # Imported here, because scikit-learn is an optional dependency that no other data set needs.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.asarray(bunch.images).astype(np.uint8)
    labels = np.asarray(bunch.target).astype(np.int64)
    test = held_out(labels)
    return Images(
        name="digits",
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple(str(digit) for digit in range(10)),
        peak=16,
        notes=NOTES,
    )


def held_out(labels: Int64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which samples are test samples: a fifth of every class, drawn without replacement.

    Args:
        labels: int64 ``(N,)``.

    Returns:
        bool ``(N,)``. The same on every machine: NumPy's ``RandomState`` stream is frozen (NEP 19), unlike
        that of its newer generators.
    """
    random = np.random.RandomState(SEED)
    mask = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[random.permutation(members)[: round(TEST_SHARE * len(members))]] = True
    return mask


SOURCE = Source(
    name="digits",
    title="1,797 handwritten digits, 8×8, carried by scikit-learn",
    terms="Alpaydin, Kaynak 1998, UCI Machine Learning Repository",
    layout="scikit-learn carries it",
    load=lambda _: read(),
)
