"""ImageNet: the paper's modified ViT-B/16, 8 layers, d 768, h 12, pictures of 112x112 pixels, patches of 8x8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.picture_folder import FolderTask
from better_attention.lab.tasks.variant import Variant

TABLE_7 = {"standard": (768, 8), "optimised": (816, 8), "efficient": (804, 9), "super": (804, 9)}
"""Mechanism -> width and layers of the models of equal size in table 7 of arXiv 2403.01643. An expressive score has no
parameters, so that each mechanism with it takes the same as without."""


@dataclass(frozen=True, kw_only=True)
class ImageNet(FolderTask):
    """ImageNet, with the paper's own sizes where models of equal parameters are asked for."""

    def fitted(self, folder: Path | None = None) -> Self:
        """See :meth:`FolderTask.fitted`; the title tells what there is."""
        task = super().fitted(folder)
        size = f"{task.image_size}x{task.image_size} pixels"
        whole = "ImageNet" if task.classes == 1000 else "in ImageNet's layout"
        return replace(task, title=f"photographs of {task.classes:,} kinds of things, {size} ({whole})")

    def sized(self, variant: Variant, heads: int) -> Self:
        """See :meth:`Task.sized`; at the paper's width and layers, its table 7, and not the nearest width."""
        plain = replace(variant.mechanism, score="softmax").name
        width, layers = TABLE_7.get(plain, (0, 0))
        theirs = (self.width, self.layers) == TABLE_7["standard"] and not variant.per_head
        if self.equal_params and theirs and width and width % heads == 0:
            return replace(self, width=width, layers=layers)
        return super().sized(variant, heads)


def imagenet(scale: str = "small") -> Task:
    """The task at a scale.

    The parameters of table 7 tell the rest of the model: 196 patches without a class token, an MLP of width 3072 at
    every d, patches without a bias, no final norm, a head with 2000 hidden units. The paper gives neither optimiser nor
    augmentation: they are those of keras.io's ViT example. Classes follow from the folders: a subset of ImageNet can be
    read, and a note then says so. One seed, as in the paper.
    """
    paper = ImageNet(
        name="imagenet",
        title="photographs of 1,000 kinds of things, 112x112 pixels (ImageNet)",
        source="arXiv 2403.01643, section 4.1, tables 1 and 7",
        scale="paper",
        dataset="imagenet",
        official=(1_281_167, 50_000),
        raw_size=112,
        image_size=112,
        patch=8,
        channels=3,
        classes=1000,
        mlp=3072,
        head_hidden=2000,
        final_norm=False,
        embed_bias=False,
        augmentation="keras",
        top5=True,
        width=768,
        length=196,
        layers=8,
        heads=(12,),
        default_heads=12,
        seeds=1,
        epochs=100,
        patience=10,
        batch_size=256,
        optimiser="adamw",
        lr=1e-3,
        weight_decay=1e-4,
        # 2 % of ImageNet are still some 25,600 pictures.
        validation_share=0.02,
    )
    small = replace(
        paper, scale="small", raw_size=64, image_size=64, width=192, mlp=384, length=64, layers=4, epochs=5,
        batch_size=64, train_samples=5_000, test_samples=2_000, validation_share=0.1,
    )  # fmt: skip
    smoke = replace(small, scale="smoke", layers=2, epochs=1, train_samples=640, test_samples=500)
    variants: dict[str, Task] = {"smoke": smoke, "small": small, "paper": paper}
    return variants[scale]
