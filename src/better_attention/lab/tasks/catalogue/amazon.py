"""Amazon reviews: one to five stars, 3 layers, d 64, ℓ 64, otherwise as the film reviews."""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.text import TextTask


def amazon(scale: str = "small") -> Task:
    """The task at a scale.

    The paper gives layers, widths and classes. Its 2.6 million parameters make a vocabulary of about 40,000; the
    rest is as in :func:`~better_attention.lab.tasks.catalogue.imdb.imdb`. It trains "until validation loss flattens":
    patience, below a limit that is fixed here. Title and text are joined; of each review the last 64 words are read.
    """
    paper = TextTask(
        name="amazon",
        title="stars of product reviews (Amazon)",
        source="arXiv 2403.01643, section 4.2, tables 2 and 9",
        scale="paper",
        dataset="amazon",
        vocabulary=40_000,
        classes=5,
        width=64,
        length=64,
        layers=3,
        heads=(1, 2, 4),
        default_heads=4,
        seeds=5,
        epochs=10,
        patience=2,
        batch_size=64,
        optimiser="adam",
        lr=1e-3,
        threads=1,
    )
    variants: dict[str, Task] = {
        "smoke": replace(paper, scale="smoke", seeds=1, epochs=1, train_samples=1_000, test_samples=500),
        "small": replace(paper, scale="small", seeds=3, epochs=4, train_samples=20_000, test_samples=10_000),
        "paper": paper,
    }
    return variants[scale]
