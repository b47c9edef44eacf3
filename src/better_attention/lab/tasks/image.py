"""Images into classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.errors import check_choice, check_int
from better_attention.lab.tasks.augmentation import AUGMENTATIONS, keras_augmented
from better_attention.lab.tasks.base import Shown, Task, share
from better_attention.lab.tasks.inputs import NamedInput, StandardInput, picture_file, read_array, read_picture_of
from better_attention.lab.tasks.picture_notes import overlap_notes, training_ground, unlike_training
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.subsets import check_classes, cut
from better_attention.lab.tasks.variant import Variant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from better_attention.lab.data.samples import Images

SCORING_BATCH = 512


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

    derived: ClassVar[Mapping[str, str]] = {"length": "image_size, patch and class_token"}

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
            check_int(getattr(self, name), name)
        if check_int(self.channels, "channels") not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), received {self.channels}.")
        share(self.head_dropout, "head_dropout")
        if self.mlp is not None:
            check_int(self.mlp, "mlp")
        check_int(self.head_hidden, "head_hidden", at_least=0)
        check_choice(self.augmentation, "augmentation", AUGMENTATIONS)
        if self.patch > self.image_size:
            raise ValueError(f"patch must be <= image_size={self.image_size}, received {self.patch}.")
        # Set past the frozen dataclass, because it follows from the other fields.
        object.__setattr__(self, "length", (self.image_size // self.patch) ** 2 + self.class_token)

    def at_length(self, length: int) -> Self:
        """With square pictures of ``length`` patches, the class token included."""
        side = math.isqrt(max(0, length - self.class_token))
        if side < 1 or side**2 + self.class_token != length:
            raise ValueError(f"task {self.name!r} reads square pictures, which cannot have {length} patches.")
        return replace(self, image_size=side * self.patch, raw_size=side * self.patch)

    def _images(self, folder: Path | None) -> Images:
        """The data set as it is read, before anything is left out."""
        from better_attention.lab.data.catalogue import read
        from better_attention.lab.data.samples import Images

        images = read(self.dataset, folder)
        if not isinstance(images, Images):
            raise TypeError(f"task {self.name!r} needs images; data set {self.dataset!r} holds none.")
        return images

    def load(self, folder: Path | None = None) -> Splits:
        """See :meth:`Task.load`."""
        images = self._images(folder)
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

    def random_inputs(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_inputs`; noise over the whole range of pixels."""
        shape = (samples, self.image_size, self.image_size, *([self.channels] if self.channels > 1 else []))
        return torch.randint(0, self.peak + 1, shape, dtype=torch.uint8, generator=generator)

    def random_targets(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_targets`."""
        return torch.randint(self.classes, (samples,), generator=generator)

    def read_inputs(
        self, names: Sequence[str], standard_input: StandardInput, *, resize: bool = False
    ) -> list[NamedInput]:
        """The pictures in image files, and in ``.npy`` files as they are; see :meth:`Task.read_inputs`."""
        inputs: list[NamedInput] = []
        for number, name in enumerate(names, start=1):
            path = picture_file(name, number)
            if path.suffix == ".npy":
                inputs += read_array(path, self.channels)
            else:
                inputs.append(NamedInput(str(path), self.read_picture(path, resize=resize)))
        return inputs

    def read_picture(self, path: Path, *, resize: bool = False) -> NDArray[np.uint8]:
        """A picture file as :meth:`encode` reads it; of another size only with ``resize``.

        Raises:
            ValueError: a damaged file or another kind of file, or a picture of another size without ``resize``.
        """
        pixels = read_picture_of(path, self.raw_size, self.channels, task=self.name, resize=resize)
        # Converting to uint8 truncates, so the values are rounded first.
        return (pixels * (self.peak / 255)).round().astype("uint8")

    def test_inputs(self, splits: Splits, folder: Path | None = None) -> tuple[Sequence[Any], Sequence[int]]:
        """See :meth:`Task.test_inputs`; of the whole data set, without padding."""
        images = self._images(folder)
        return list(images.test_images), images.test_labels.tolist()

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
        # Asked the other way round, so that NaN, which no comparison holds for, is refused too.
        if array.size and not (array.min() >= 0 and array.max() <= self.peak):
            raise ValueError(
                f"task {self.name!r} reads pixels from 0 (black) to {self.peak} (white); "
                f"received values from {array.min()} to {array.max()}."
            )
        return self._padded(array)

    def stored(self, splits: Splits) -> Mapping[str, Any]:
        """See :meth:`Task.stored`; ``"ground"`` says whether the training pictures are dark or light at their edges."""
        before = (self.image_size - self.raw_size) // 2
        inner = slice(before, before + self.raw_size)  # without the padding
        return {**splits.assets, "ground": training_ground(splits.train.inputs[:, inner, inner], self.peak)}

    def unlike(self, value: Any, assets: Mapping[str, Any]) -> list[str]:
        """See :meth:`Task.unlike`; blank pictures, and those on another ground, light or dark, than in training."""
        return unlike_training(value, self.peak, str(assets.get("ground")))

    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """The image that the model reads, its padding included."""
        return Shown(picture=(inputs.cpu().numpy() * (255 / self.peak)).round().astype("uint8"))

    def _padded(self, images: np.ndarray[Any, Any]) -> Tensor:
        before = (self.image_size - self.raw_size) // 2
        after = self.image_size - self.raw_size - before
        skip = [0, 0] if images.ndim == 4 else []
        # F.pad counts from the last dimension on: the colours, where there are some, then width and height.
        return F.pad(torch.from_numpy(images), [*skip, before, after, before, after])
