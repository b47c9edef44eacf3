"""Digits: scikit-learn's 1,797 real handwritten digits, 8x8 pixels; nothing to download.

Not in the paper: its MNIST experiment in miniature, for a first comparison within two minutes.
"""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.image import ImageTask


def digits(scale: str = "small") -> Task:
    """The task at a scale; "paper", though no paper has it, has more seeds than "small"."""
    small = ImageTask(
        name="digits",
        title="handwritten digits, 8x8 pixels (scikit-learn)",
        source="not in the paper; its MNIST experiment in miniature",
        scale="small",
        dataset="digits",
        raw_size=8,
        image_size=8,
        patch=2,
        channels=1,
        classes=10,
        peak=16,
        width=32,
        length=16,
        layers=2,
        heads=(1, 2, 4),
        default_heads=4,
        seeds=3,
        epochs=30,
        patience=8,
        batch_size=64,
        optimiser="adamw",
        lr=3e-3,
        weight_decay=1e-4,
        threads=1,
        threshold=90.0,
    )
    variants: dict[str, Task] = {
        "smoke": replace(small, scale="smoke", seeds=1, epochs=2, threshold=None),
        "small": small,
        "paper": replace(small, scale="paper", seeds=5),
    }
    return variants[scale]
