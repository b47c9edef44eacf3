"""What a report, or a user, must know about pictures: blank, nearly black or repeated ones, light or dark grounds."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from torch import Tensor

from better_attention.lab.tasks.splits import Splits

if TYPE_CHECKING:
    import numpy as np

HELD_OUT = ("validation", "test")
SEARCHED_BYTES = 2 * 2**30
"""Bytes up to which every picture is examined for the notes; above, reading them all takes too long."""
BLANK_RANGE = 8
"""The largest difference between two pixels of a picture that counts as blank, of 255."""
GROUND_SHARE = 0.9
"""Share of the training pictures that must have dark (or light) edges before a picture that differs is reported."""
GROUND_SAMPLES = 1000
"""Training pictures whose edges are examined."""
NEARLY_BLACK = 31
"""The brightest pixel of a nearly black picture, of 255; 16-bit files that use 12 bits reach 15."""

GROUNDS = ("dark", "light")
BLANK_HINT = (
    "White shapes on a transparent ground are read this way, because transparent parts are read as white, as they are "
    "shown; save them on a dark ground"
)


def ground(pictures: np.ndarray[Any, Any], peak: int) -> str:
    """Whether pictures are ``"dark"`` or ``"light"`` at their edges, by the median of the outermost pixels of each.

    Args:
        pictures: (N, H, W) or (N, H, W, 3), pixels 0 ... ``peak``.
        peak: the value that means white.

    Returns:
        What is true of at least :data:`GROUND_SHARE` of them; ``"mixed"`` if neither is.
    """
    import numpy as np

    # The columns leave out the first and the last pixel, so that no corner counts twice.
    edges = np.concatenate((pictures[:, 0], pictures[:, -1], pictures[:, 1:-1, 0], pictures[:, 1:-1, -1]), axis=1)
    light = float((np.median(edges.reshape(len(pictures), -1), axis=1) > peak / 2).mean())
    return "light" if light >= GROUND_SHARE else "dark" if light <= 1 - GROUND_SHARE else "mixed"


def training_ground(pictures: Tensor, peak: int) -> str:
    """:func:`ground` of about :data:`GROUND_SAMPLES` training pictures, evenly spaced."""
    return ground(pictures[:: max(1, len(pictures) // GROUND_SAMPLES)].cpu().numpy(), peak)


def unlike_training(picture: np.ndarray[Any, Any], peak: int, training: str) -> list[str]:
    """How a picture differs from the training pictures, see :meth:`Task.unlike`.

    Args:
        picture: (H, W) or (H, W, 3), pixels 0 ... ``peak``; nothing is said of any other shape.
        peak: the value that means white.
        training: the ground of the training pictures; anything but :data:`GROUNDS` is unknown.
    """
    if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)) or 0 in picture.shape:
        return []
    spread = float((picture.max(axis=(0, 1)) - picture.min(axis=(0, 1))).max())
    # Both sides in 255ths of the range of the pixels.
    if spread * 255 <= BLANK_RANGE * peak:
        return [f"blank, every pixel has nearly the same value. {BLANK_HINT}"]
    edges = ground(picture[None], peak)
    if training not in GROUNDS or edges == training:
        return []
    return [
        f"{edges} at its edges, where the training pictures are {training}: the model has learned nothing about such "
        "pictures, however high its probabilities. Invert the picture if it shows the same kind of thing"
    ]


def blank_notes(splits: Splits, searched: int = SEARCHED_BYTES) -> tuple[str, ...]:
    """A note on pictures of one colour, within :data:`BLANK_RANGE`; on nearly black ones see :func:`dark_notes`."""
    if not _looked_through(splits, searched):
        return ()
    parts = [split.inputs.flatten(1, 2) for split in (splits.train, splits.validation, splits.test) if len(split)]
    blank = 0
    for part in parts:
        low, high = part.amin(dim=1).reshape(len(part), -1), part.amax(dim=1).reshape(len(part), -1)
        blank += int((((high - low).amax(dim=1) <= BLANK_RANGE) & (high.amax(dim=1) > NEARLY_BLACK)).sum())
    if not blank:
        return ()
    return (
        f"{blank:,} of {sum(map(len, parts)):,} pictures are blank, one colour all over: there is nothing to learn "
        f"from them. {BLANK_HINT}",
    )


def dark_notes(splits: Splits, searched: int = SEARCHED_BYTES) -> tuple[str, ...]:
    """A note on pictures without a pixel brighter than :data:`NEARLY_BLACK`: a model sees next to nothing of them."""
    if not _looked_through(splits, searched):
        return ()
    parts = [split.inputs for split in (splits.train, splits.validation, splits.test) if len(split)]
    dark = sum(int((part.flatten(1).amax(dim=1) <= NEARLY_BLACK).sum()) for part in parts)
    if not dark:
        return ()
    return (
        f"{dark:,} of {sum(map(len, parts)):,} pictures are nearly black, no pixel brighter than {NEARLY_BLACK} of "
        "255: files of 16 bits that use 12 or fewer look like this; scale their values up to white before training",
    )


def overlap_notes(splits: Splits, searched: int = SEARCHED_BYTES) -> tuple[str, ...]:
    """A note for each held-out split with pictures that are trained on too, equal in every pixel that the model reads.

    Accuracy on pictures that a model was trained on says little about others. Splits of more than
    ``searched`` bytes are not searched, here and for the other notes.
    """
    if not _looked_through(splits, searched):
        return ()
    known = set(_digests(splits.train.inputs))
    shared = {name: sum(digest in known for digest in _digests(getattr(splits, name).inputs)) for name in HELD_OUT}
    return tuple(
        f"{count:,} of {len(getattr(splits, name)):,} {name} pictures are training pictures too, pixel by pixel"
        for name, count in shared.items()
        if count
    )


def _looked_through(splits: Splits, most: int) -> bool:
    """Whether the pictures are few enough for the notes that need all of them."""
    return sum(split.inputs.nbytes for split in (splits.train, splits.validation, splits.test)) <= most


def _digests(pictures: Tensor) -> Iterator[bytes]:
    # 16 bytes in place of each picture; two different ones share a digest by chance once in 2^128.
    return (blake2b(picture.data, digest_size=16).digest() for picture in pictures.contiguous().numpy())
