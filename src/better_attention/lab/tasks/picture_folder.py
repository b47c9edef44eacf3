"""Picture files in a folder per class: the user's own, or ImageNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from better_attention.errors import check_choice
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.picture_notes import blank_notes, dark_notes, overlap_notes
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.subsets import cut, subsets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from better_attention.lab.data.own_pictures.read import Pictures


@dataclass(frozen=True, kw_only=True)
class FolderTask(ImageTask):
    """Picture files of any size into the classes that their folders name.

    Pictures are scaled to ``image_size`` on their shorter side and cut to the middle square when they are decoded;
    nothing is padded. :meth:`fitted` sets ``classes`` and ``channels`` by the data (``channels=1`` reads coloured
    pictures as grey ones), ``raw_size`` by ``image_size``.

    Args:
        damaged: what happens to pictures that cannot be decoded: ``"refuse"`` names them and trains nothing;
            ``"leave-out"`` does without them, and a note says how many there were.
        official: pictures to train and to test with in the published data set; a note says where others were read.
    """

    derived: ClassVar[Mapping[str, str]] = {
        **ImageTask.derived,
        "classes": "the data",
        "raw_size": "image_size",
        "peak": "the files: 255",
    }

    own_data: ClassVar[bool] = True

    damaged: str = "refuse"
    official: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.damaged, "damaged", ("refuse", "leave-out"))

    def fitted(self, folder: Path | None = None) -> Self:
        """See :meth:`Task.fitted`."""
        pictures = self._pictures(folder)
        return replace(
            self,
            classes=len(pictures.classes),
            channels=min(self.channels, pictures.channels),
            raw_size=self.image_size,
        )

    def load(self, folder: Path | None = None) -> Splits:
        """See :meth:`Task.load`."""
        import numpy as np

        from better_attention.lab.data.samples import size_notes

        pictures = self._pictures(folder)
        if (len(pictures.classes), self.raw_size) != (self.classes, self.image_size):
            raise ValueError(
                f"task {self.name!r} is set to {self.classes} classes of {self.raw_size} pixels a side, but "
                f"{pictures.tree.place} has {len(pictures.classes)} and image_size is {self.image_size}. Take "
                "task.fitted(folder) first."
            )
        rows, without = self._readable(pictures, self._rows(pictures))
        # In this order in one array: each split is a slice of it, so that a set larger than memory is never copied.
        order = np.concatenate(rows)
        pixels = torch.from_numpy(pictures.pixels(order, self.image_size, self.channels))
        targets = torch.from_numpy(pictures.labels[order])
        sizes = [len(part) for part in rows]
        train, validation, test = map(Split, pixels.split(sizes), targets.split(sizes))
        notes = [
            *pictures.notes,
            *without,
            f"the shorter side of every picture was scaled to {self.image_size} pixels, and the middle square taken",
        ]
        sizes_there = (len(pictures.parts["train"]), len(pictures.parts["test"]))
        unlike = () if self.official is None else size_notes(*sizes_there, self.official)
        notes += unlike
        splits = Splits(train, validation, test, assets={"classes": list(pictures.classes)}, departures=unlike)
        return replace(splits, notes=(*notes, *overlap_notes(splits), *dark_notes(splits), *blank_notes(splits)))

    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """Picture files, or arrays (H, W) or (H, W, 3) with pixels 0 ... 255, of any size; one, or several."""
        import numpy as np

        if isinstance(inputs, str | Path) or (isinstance(inputs, np.ndarray) and _is_one(inputs)):
            inputs = [inputs]
        pictures = [self.picture(source) for source in inputs]
        shape = (self.image_size, self.image_size, *([self.channels] if self.channels > 1 else []))
        return super().encode(np.stack(pictures) if pictures else np.empty((0, *shape), np.uint8), assets)

    def read_picture(self, path: Path, *, resize: bool = False) -> NDArray[np.uint8]:
        """See :meth:`ImageTask.read_picture`; pictures of every size are read, as in training."""
        return self.picture(path)

    def test_inputs(self, splits: Splits, folder: Path | None = None) -> tuple[Sequence[Any], Sequence[int]]:
        """See :meth:`Task.test_inputs`; the decoded pictures that the task tests with."""
        return list(splits.test.inputs.numpy()), splits.test.targets.tolist()

    def picture(self, source: str | Path | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One picture, from a file or from pixels, as the model reads it.

        Raises:
            ValueError: a file or an array that is no picture.
        """
        import numpy as np
        from PIL import Image

        from better_attention.lab.data.own_pictures.decode import fit, quiet, read_picture

        if isinstance(source, str | Path):
            with quiet():
                return read_picture(str(source), Path(source), self.image_size, self.channels)
        array = np.asarray(source)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or 0 in array.shape:
            raise ValueError(
                f"task {self.name!r} reads picture files, or uint8 pixels (H, W) or (H, W, 3) from 0 to 255; "
                f"received {array.dtype} of shape {array.shape}."
            )
        return fit(Image.fromarray(array), self.image_size, self.channels)

    def _pictures(self, folder: Path | None) -> Pictures:
        from better_attention.lab.data.home import home
        from better_attention.lab.data.own_pictures.read import LAYOUT, find
        from better_attention.lab.data.samples import NotFetched

        base = home() if folder is None else folder
        below = base / self.dataset
        if folder is None and not below.is_dir():
            raise NotFetched(f"task {self.name!r} reads picture files: name them with `--data DIR`. Layout: {LAYOUT}.")
        return find(below if folder is None or (below / "train").is_dir() else folder)

    def _rows(self, pictures: Pictures) -> list[NDArray[np.int64]]:
        """Rows of the training, validation and test pictures; nothing is cut where the data has a validation split."""
        sizes = [len(pictures.parts.get(name, ())) for name in ("train", "validation", "test")]
        if "validation" in pictures.parts:
            rows = subsets(self, *sizes)
            sources = [pictures.parts[name] for name in ("train", "validation", "test")]
        else:
            rows = cut(self, sizes[0], sizes[2])
            sources = [pictures.parts[name] for name in ("train", "train", "test")]
        return [source[some.numpy()] for source, some in zip(sources, rows, strict=True)]

    def _readable(
        self, pictures: Pictures, rows: list[NDArray[np.int64]]
    ) -> tuple[list[NDArray[np.int64]], tuple[str, ...]]:
        """The rows of each split without damaged pictures, where the task leaves them out, and a note on how many.

        Raises:
            ValueError: nothing is left of a split or a class.
        """
        import numpy as np

        if self.damaged == "refuse":
            return rows, ()
        order = np.concatenate(rows)
        lost = pictures.damaged(order, self.image_size, self.channels)
        if not lost:
            return rows, ()
        bad = order[list(lost)]
        kept = [part[~np.isin(part, bad)] for part in rows]
        for part, left in zip(rows, kept, strict=True):
            gone = np.setdiff1d(pictures.labels[part], pictures.labels[left])
            # A class without training pictures cannot be learned, while a held-out split may lack one.
            if (len(part) and not len(left)) or (part is rows[0] and len(gone)):
                what = f"class {pictures.classes[gone[0]]!r}"
                raise ValueError(f"every picture of {what} is damaged, the first so: {next(iter(lost.values()))}")
        first = next(iter(lost.values()))
        note = f"{len(lost):,} of {len(order):,} pictures cannot be decoded and are left out; the first: {first}"
        return kept, (note,)


def _is_one(array: NDArray[Any]) -> bool:
    """Whether an array is one picture, (H, W) or (H, W, 3), and not several grey ones, (N, H, W)."""
    return array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
