"""Images into classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.errors import one_of, whole_number
from better_attention.lab.tasks.augmentation import AUGMENTATIONS, keras_augmented
from better_attention.lab.tasks.base import Shown, Task, check_classes, cut, share
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant

if TYPE_CHECKING:
    import numpy as np

SCORING_BATCH = 512
HELD_OUT = ("validation", "test")
COMPARED = 2 * 2**30
"""Bytes up to which all pictures are looked through for the notes on them; above, reading them takes long."""
BLANK = 8
"""The largest difference between two pixels of a picture that is called blank, of 255."""
GROUND = 0.9
"""The share of the training pictures whose edges must be dark, or light, for a picture that differs to be told."""
LOOKED_AT = 1000
"""Training pictures whose edges are looked at."""
DARK = 31
"""The brightest pixel of a picture that is called nearly black, of 255; 16-bit files with 12 bits in them reach 15."""


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """Images of one size into classes, by a :class:`~better_attention.lab.models.vision_transformer.VisionTransformer`.

    Args:
        raw_size: side of the data set's square images, in pixels.
        image_size: side after padding with black on all sides.
        patch: side of a patch; ``length`` follows: (image_size / patch)^2, and one more with a class token.
        channels, classes, peak: 1 (grey) or 3; number of classes; the value that means white.
        head_dropout: before the head.
        class_token, mlp, head_hidden, final_norm, embed_bias: of the model, as described there.
        augmentation: of training images: ``"none"``, or ``"keras"`` for
            :func:`~better_attention.lab.tasks.augmentation.keras_augmented`.
        top5: measure the share of images whose class is among the five likeliest, where there are more than five.
    """

    follows: ClassVar[Mapping[str, str]] = {**Task.follows, "length": "image_size, patch and class_token"}

    raw_size: int
    image_size: int
    patch: int
    channels: int
    classes: int
    peak: int = 255
    head_dropout: float = 0.5
    class_token: bool = False
    mlp: int | None = None
    head_hidden: int = 0
    final_norm: bool = True
    embed_bias: bool = True
    augmentation: str = "none"
    top5: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("raw_size", "image_size", "patch", "classes", "peak"):
            whole_number(getattr(self, name), name)
        if whole_number(self.channels, "channels") not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), received {self.channels}.")
        share(self.head_dropout, "head_dropout")
        if self.mlp is not None:
            whole_number(self.mlp, "mlp")
        whole_number(self.head_hidden, "head_hidden", at_least=0)
        one_of(self.augmentation, "augmentation", AUGMENTATIONS)
        if self.patch > self.image_size:
            raise ValueError(f"patch must be <= image_size={self.image_size}, received {self.patch}.")
        object.__setattr__(self, "length", (self.image_size // self.patch) ** 2 + self.class_token)

    def load(self, folder: Path | None = None) -> Splits:
        """See :meth:`Task.load`."""
        from better_attention.lab.data.catalogue import read
        from better_attention.lab.data.samples import Images

        images = read(self.dataset, folder)
        if not isinstance(images, Images):
            raise TypeError(f"task {self.name!r} needs images; data set {self.dataset!r} holds none.")
        check_classes(self, self.classes, images.classes)
        stored = {
            "raw_size": images.train_images.shape[1],
            "channels": 3 if images.train_images.ndim == 4 else 1,
            "peak": images.peak,
        }
        for name, value in stored.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"task {self.name!r} is set to {name}={getattr(self, name)}, but the pictures of {self.dataset!r} "
                    f"have {value}: leave it as it is."
                )
        if self.image_size < self.raw_size:
            raise ValueError(
                f"task {self.name!r} pads its images of {self.raw_size} pixels a side and cuts nothing off: image_size "
                f"must be >= {self.raw_size}, received {self.image_size}."
            )
        train, validation, test = cut(self, len(images.train_labels), len(images.test_labels))
        kept = Split(self._padded(images.train_images), torch.from_numpy(images.train_labels))
        held = Split(self._padded(images.test_images), torch.from_numpy(images.test_labels))
        splits = Splits(
            train=Split(kept.inputs[train], kept.targets[train]),
            validation=Split(kept.inputs[validation], kept.targets[validation]),
            test=Split(held.inputs[test], held.targets[test]),
            assets={"classes": list(images.classes)},
            departures=images.departures,
        )
        return replace(splits, notes=(*images.notes, *overlap_notes(splits)))

    def model(self, variant: Variant, heads: int) -> nn.Module:
        """See :meth:`Task.model`."""
        from better_attention.lab.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            image_size=self.image_size,
            patch=self.patch,
            channels=self.channels,
            classes=self.classes,
            width=self.width,
            layers=self.layers,
            heads=heads,
            mechanism=variant.mechanism,
            options=variant.options,
            dropout=self.dropout,
            head_dropout=self.head_dropout,
            peak=self.peak,
            class_token=self.class_token,
            mlp=self.mlp,
            head_hidden=self.head_hidden,
            final_norm=self.final_norm,
            embed_bias=self.embed_bias,
        )

    def augment(self, inputs: Tensor) -> Tensor:
        """See :meth:`Task.augment`."""
        return keras_augmented(inputs) if self.augmentation == "keras" else inputs

    def scores(self, model: nn.Module, split: Split, assets: Mapping[str, Any]) -> dict[str, float]:
        """``"top5"``, in per cent, where the task asks for it."""
        if not self.top5 or self.classes <= 5:
            return {}
        hits = 0
        for x, y in split.batches(SCORING_BATCH):
            likeliest = model(x).topk(5, dim=1).indices
            hits += int((likeliest == y[:, None]).sum())
        return {"top5": 100 * hits / len(split)}

    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """Images (N, H, W[, 3]) or one image (H, W[, 3]), pixels 0 ... ``peak``, of the data set's size."""
        import numpy as np

        try:
            array = np.asarray(inputs)
        except ValueError:
            raise ValueError("images of different sizes cannot be read together: bring them to one size.") from None
        shape = (self.raw_size, self.raw_size, *([self.channels] if self.channels > 1 else []))
        if array.shape == shape:
            array = array[None]
        if array.shape[1:] != shape or not np.issubdtype(array.dtype, np.number):
            raise ValueError(
                f"task {self.name!r} reads images of shape {shape} or (N, {', '.join(map(str, shape))}) "
                f"with pixels from 0 to {self.peak}; received {array.dtype} of shape {array.shape}. "
                "Resize the images first."
            )
        if array.size and not (array.min() >= 0 and array.max() <= self.peak):
            raise ValueError(
                f"task {self.name!r} reads pixels from 0 (black) to {self.peak} (white); "
                f"received values from {array.min()} to {array.max()}."
            )
        return self._padded(array)

    def stored(self, splits: Splits) -> Mapping[str, Any]:
        """See :meth:`Task.stored`; ``"ground"`` says whether the training pictures are dark or light at their edges."""
        before = (self.image_size - self.raw_size) // 2
        own = slice(before, before + self.raw_size)  # without the padding
        every = max(1, len(splits.train) // LOOKED_AT)
        return {**splits.assets, "ground": ground(splits.train.inputs[::every, own, own].cpu().numpy(), self.peak)}

    def unlike(self, picture: np.ndarray[Any, Any], assets: Mapping[str, Any]) -> list[str]:
        """In what a picture differs from those that the model was trained on, as sentences for the user.

        Args:
            picture: (H, W) or (H, W, 3), pixels 0 ... ``peak``; of any other shape nothing is said.
            assets: of the run.
        """
        if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)) or 0 in picture.shape:
            return []
        spread = float((picture.max(axis=(0, 1)) - picture.min(axis=(0, 1))).max())
        if spread * 255 <= BLANK * self.peak:
            return [f"blank, every pixel has nearly the same value. {BLANK_HINT}"]
        theirs, own = assets.get("ground"), ground(picture[None], self.peak)
        if theirs not in GROUNDS or own == theirs:
            return []
        return [
            f"{own} at its edges, where the training pictures are {theirs}: the model has learned nothing about such "
            "pictures, however sure it is. Invert the picture if it shows the same kind of thing"
        ]

    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """The image that the model reads, its padding included."""
        return Shown(picture=(inputs.cpu().numpy() * (255 / self.peak)).round().astype("uint8"))

    def _padded(self, images: np.ndarray[Any, Any]) -> Tensor:
        before = (self.image_size - self.raw_size) // 2
        after = self.image_size - self.raw_size - before
        skip = [0, 0] if images.ndim == 4 else []
        return F.pad(torch.from_numpy(images), [*skip, before, after, before, after])


GROUNDS = ("dark", "light")
BLANK_HINT = (
    "White shapes on a transparent ground come out so, because transparent parts are read as white, as they are shown; "
    "save them on a dark ground"
)


def ground(pictures: np.ndarray[Any, Any], peak: int) -> str:
    """Whether pictures are ``"dark"`` or ``"light"`` at their edges, by the median of the outermost pixels of each.

    Args:
        pictures: (N, H, W) or (N, H, W, 3), pixels 0 ... ``peak``.
        peak: the value that means white.

    Returns:
        What is true of at least :data:`GROUND` of them; ``"mixed"`` if neither is.
    """
    import numpy as np

    edges = np.concatenate((pictures[:, 0], pictures[:, -1], pictures[:, 1:-1, 0], pictures[:, 1:-1, -1]), axis=1)
    light = float((np.median(edges.reshape(len(pictures), -1), axis=1) > peak / 2).mean())
    return "light" if light >= GROUND else "dark" if light <= 1 - GROUND else "mixed"


def blank_notes(splits: Splits) -> tuple[str, ...]:
    """A note on pictures that are one colour all over, within :data:`BLANK`; nearly black ones have their own note."""
    if not _looked_through(splits):
        return ()
    parts = [split.inputs.flatten(1, 2) for split in (splits.train, splits.validation, splits.test) if len(split)]
    blank = 0
    for part in parts:
        low, high = part.amin(dim=1).reshape(len(part), -1), part.amax(dim=1).reshape(len(part), -1)
        blank += int((((high - low).amax(dim=1) <= BLANK) & (high.amax(dim=1) > DARK)).sum())
    if not blank:
        return ()
    return (
        f"{blank:,} of {sum(map(len, parts)):,} pictures are blank, one colour all over: there is nothing to learn "
        f"from them. {BLANK_HINT}",
    )


def dark_notes(splits: Splits) -> tuple[str, ...]:
    """A note on pictures without a pixel brighter than :data:`DARK`: a model sees next to nothing of them."""
    if not _looked_through(splits):
        return ()
    parts = [split.inputs for split in (splits.train, splits.validation, splits.test) if len(split)]
    dark = sum(int((part.flatten(1).amax(dim=1) <= DARK).sum()) for part in parts)
    if not dark:
        return ()
    return (
        f"{dark:,} of {sum(map(len, parts)):,} pictures are nearly black, no pixel brighter than {DARK} of 255: files "
        "of 16 bits that use 12 or fewer come out so; scale their values up to white before training",
    )


def overlap_notes(splits: Splits) -> tuple[str, ...]:
    """A note for each held-out split with pictures that are trained on too, equal in every pixel that the model reads.

    What a model has trained on says little of what it can do. Splits above :data:`COMPARED` bytes are not searched.
    """
    if not _looked_through(splits):
        return ()
    known = set(_digests(splits.train.inputs))
    shared = {name: sum(digest in known for digest in _digests(getattr(splits, name).inputs)) for name in HELD_OUT}
    return tuple(
        f"{count:,} of {len(getattr(splits, name)):,} {name} pictures are training pictures too, pixel by pixel"
        for name, count in shared.items()
        if count
    )


def _looked_through(splits: Splits) -> bool:
    """Whether the pictures are few enough for the notes that need all of them."""
    return sum(split.inputs.nbytes for split in (splits.train, splits.validation, splits.test)) <= COMPARED


def _digests(pictures: Tensor) -> Iterator[bytes]:
    return (blake2b(picture.data, digest_size=16).digest() for picture in pictures.contiguous().numpy())
