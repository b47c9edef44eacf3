"""MNIST: the paper's image classifier, 2 layers, d 128, ℓ 64, with the settings of keras.io's ViT example."""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.image import ImageTask


def mnist(scale: str = "small") -> Task:
    """The task at a scale.

    The paper gives ℓ = 64 for 28x28 pixels, which have no 64 square patches; the images are padded to
    32x32 and cut into patches of 4x4. It trains "until validation loss flattens": patience, below a limit.
    """
    paper = ImageTask(
        name="mnist",
        title="handwritten digits, 28x28 pixels (MNIST)",
        source="arXiv 2403.01643, section 4.1, tables 1 and 5",
        scale="paper",
        dataset="mnist",
        raw_size=28,
        image_size=32,
        patch=4,
        channels=1,
        classes=10,
        width=128,
        length=64,
        layers=2,
        heads=(1, 2, 4),
        default_heads=4,
        seeds=5,
        epochs=100,
        patience=10,
        batch_size=256,
        optimiser="adamw",
        lr=1e-3,
        weight_decay=1e-4,
        threshold=95.0,
    )
    variants: dict[str, Task] = {
        "smoke": replace(
            paper,
            scale="smoke",
            seeds=1,
            epochs=1,
            batch_size=64,
            train_samples=640,
            test_samples=500,
            threshold=None,
        ),
        "small": replace(paper, scale="small", seeds=3, epochs=5, batch_size=64, train_samples=10_000, threshold=80.0),
        "paper": paper,
    }
    return variants[scale]
