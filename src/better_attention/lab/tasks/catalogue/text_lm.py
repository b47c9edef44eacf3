"""Language modelling: every next character of Tiny Shakespeare, or of any text file; a small modern model."""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.language import LanguageTask


def text_lm(scale: str = "small") -> Task:
    """The task at a scale; "paper", though no paper has it, is nanoGPT's size for this text.

    nanoGPT's example trains 6 layers of width 384 with 6 heads on 256 characters at a time and drops out 0.2; it takes
    5,000 updates of 64 samples, 82 times the text. Here that is ``stride`` 64 and 20 epochs, at a constant rate.
    """
    paper = LanguageTask(
        name="text-lm",
        title="language modelling: Tiny Shakespeare by characters, or a text of your own",
        source="not in the papers; sizes after nanoGPT's example for this text",
        scale="paper",
        dataset="tinyshakespeare",
        width=384,
        length=256,
        layers=6,
        heads=(2, 6),
        default_heads=6,
        seeds=3,
        epochs=20,
        patience=3,
        batch_size=64,
        optimiser="adamw",
        lr=1e-3,
        weight_decay=0.1,
        dropout=0.2,
        validation_share=0.05,
        test_share=0.05,
        stride=64,
    )
    small = replace(
        paper,
        scale="small",
        width=64,
        length=64,
        layers=3,
        heads=(2, 4),
        default_heads=4,
        epochs=6,
        lr=3e-3,
        dropout=0.0,
        threads=1,
    )
    variants: dict[str, Task] = {
        "smoke": replace(small, scale="smoke", layers=2, seeds=1, epochs=2, train_samples=1_280, test_samples=200),
        "small": small,
        "paper": paper,
    }
    return variants[scale]
