"""CIFAR-100: the paper's image classifier, 8 layers, d 256, ℓ 257, with the settings of keras.io's ViT example."""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.image import ImageTask


def cifar100(scale: str = "small") -> Task:
    """The task at a scale.

    The parameters of the paper's table 6 tell ℓ = 257 for its super attention: 256 patches of 2x2 pixels and a class
    token. "small" has patches of 4x4 pixels and half the layers and width: the paper's model takes days on two cores.
    """
    paper = ImageTask(
        name="cifar100",
        title="photographs of 100 kinds of things, 32x32 pixels (CIFAR-100)",
        source="arXiv 2403.01643, section 4.1, tables 1 and 6",
        scale="paper",
        dataset="cifar100",
        raw_size=32,
        image_size=32,
        patch=2,
        channels=3,
        classes=100,
        class_token=True,
        augmentation="keras",
        top5=True,
        width=256,
        length=257,
        layers=8,
        heads=(1, 2, 4, 8),
        default_heads=8,
        seeds=5,
        epochs=100,
        patience=10,
        batch_size=256,
        optimiser="adamw",
        lr=1e-3,
        weight_decay=1e-4,
    )
    small = replace(
        paper, scale="small", patch=4, width=128, length=65, layers=4, seeds=3, epochs=5, batch_size=64,
        train_samples=5_000, test_samples=2_000,
    )  # fmt: skip
    smoke = replace(small, scale="smoke", layers=2, seeds=1, epochs=1, train_samples=640, test_samples=500)
    variants: dict[str, Task] = {"smoke": smoke, "small": small, "paper": paper}
    return variants[scale]
