"""The user's own pictures: a folder per class, or train/ and val/ folders of such."""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.picture_folder import FolderTask


def images(scale: str = "small") -> Task:
    """The task at a scale; "paper", though no paper has it, has larger pictures, a larger model and more seeds.

    Number of classes, and whether the pictures are grey, follow from the data.
    """
    paper = FolderTask(
        name="images",
        title="pictures of your own, a folder per class",
        source="not in the paper; its CIFAR100 experiment for any pictures",
        scale="paper",
        dataset="images",
        raw_size=64,
        image_size=64,
        patch=8,
        channels=3,
        classes=2,
        augmentation="keras",
        top5=True,
        width=128,
        length=64,
        layers=4,
        heads=(1, 2, 4),
        default_heads=4,
        seeds=5,
        epochs=100,
        patience=10,
        batch_size=64,
        optimiser="adamw",
        lr=1e-3,
        weight_decay=1e-4,
    )
    small = replace(
        paper, scale="small", raw_size=32, image_size=32, patch=4, layers=2, seeds=3, epochs=10, patience=3,
        train_samples=5_000, test_samples=2_000,
    )  # fmt: skip
    smoke = replace(small, scale="smoke", seeds=1, epochs=1, patience=0, train_samples=640, test_samples=500)
    variants: dict[str, Task] = {"smoke": smoke, "small": small, "paper": paper}
    return variants[scale]
