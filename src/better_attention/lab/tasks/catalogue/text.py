"""The user's own texts: a file or folder with a text and a label column, in the paper's larger text model."""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.text import OwnTextTask


def text(scale: str = "small") -> Task:
    """The task at a scale; "paper", though no paper has it, has more seeds and epochs than "small".

    The model is the one of the paper's Amazon experiment, but for a last layer of 20 units as in keras.io's example: 6
    are few for many classes. Classes and vocabulary are what the texts hold, the vocabulary up to the limit given here;
    before they are known, two classes stand in.
    """
    paper = OwnTextTask(
        name="text",
        title="texts of your own",
        source="not in the paper; the model of its Amazon experiment",
        scale="paper",
        dataset="text",
        vocabulary=20_000,
        classes=2,
        head=20,
        width=64,
        length=64,
        layers=3,
        heads=(1, 2, 4),
        default_heads=4,
        seeds=5,
        epochs=20,
        patience=3,
        batch_size=64,
        optimiser="adam",
        lr=1e-3,
        threads=1,
    )
    variants: dict[str, Task] = {
        "smoke": replace(paper, scale="smoke", seeds=1, epochs=1, train_samples=1_000, test_samples=500),
        "small": replace(paper, scale="small", seeds=3, epochs=6, train_samples=20_000, test_samples=10_000),
        "paper": paper,
    }
    return variants[scale]
