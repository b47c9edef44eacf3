"""IMDB: positive or negative film reviews, 1 layer, d 32, ℓ 32, after keras.io's text example."""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.text import TextTask


def imdb(scale: str = "small") -> Task:
    """The task at a scale.

    What the paper leaves open is taken from the port that was made with its authors' help: batches of 64,
    10 epochs, a head of 6 ReLU units and one output. Of each review the last 32 tokens are read.
    """
    paper = TextTask(
        name="imdb",
        title="sentiment of film reviews (IMDB)",
        source="arXiv 2403.01643, section 4.2, tables 2 and 8",
        scale="paper",
        dataset="imdb",
        vocabulary=20_000,
        classes=2,
        width=32,
        length=32,
        layers=1,
        heads=(1, 2, 4),
        default_heads=4,
        seeds=5,
        epochs=10,
        patience=0,
        batch_size=64,
        optimiser="adam",
        lr=1e-3,
        threads=1,
        threshold=77.0,
    )
    variants: dict[str, Task] = {
        "smoke": replace(
            paper, scale="smoke", seeds=1, epochs=1, train_samples=1_000, test_samples=500, threshold=None
        ),
        "small": replace(paper, scale="small", seeds=3, epochs=3),
        "paper": paper,
    }
    return variants[scale]
