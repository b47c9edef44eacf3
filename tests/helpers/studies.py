"""Small studies for the tests of tables, gallery and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap, Study, Threshold

MECHANISMS = ("standard", "optimised", "efficient", "super", "expressive")


def record(mechanism: str = "standard", seed: int = 0, heads: int = 4, **changes: Any) -> dict[str, Any]:
    """One run as results.json has it."""
    base = {
        "task": "digits",
        "scale": "small",
        "mechanism": mechanism,
        "score": "expressive" if "expressive" in mechanism else "softmax",
        "heads": heads,
        "seed": seed,
        "test_accuracy": 97.0 + seed + heads / 8,
        "test_loss": 0.11 - seed / 100,
        "test_top5": None,
        "test_bleu": None,
        "train_accuracy": 99.0,
        "train_loss": 0.03,
        "train_top5": None,
        "train_bleu": None,
        "validation_accuracy": 98.0,
        "validation_loss": 0.07,
        "attention_params": 4224,
        "total_params": 30_000,
        "epoch_seconds": 1.25 + seed / 10,
        "epochs": 7,
        "best_epoch": 5,
        "samples": {"train": 1293, "validation": 144, "test": 360},
        "device": "cpu",
        "threads": 2,
        "commit": "0123abc",
        "command": "better-attention compare digits",
        "versions": {"torch": "2.13.0"},
        "finished": "2026-11-22T09:00:00+00:00",
    }
    return base | changes


def curve(epochs: int = 3, start: float = 1.0, keys: Sequence[str] = ("validation_loss",)) -> list[dict[str, float]]:
    """A run's metrics: each key falls as start / epoch."""
    return [{"epoch": e, "seconds": 1.0, **dict.fromkeys(keys, start / e)} for e in range(1, epochs + 1)]


def attention_map(run: str, heads: int = 2, **changes: Any) -> AttentionMap:
    """Weights of 9 queries and keys over a 6 x 6 picture, each row a distribution."""
    rng = np.random.default_rng(heads)
    weights = rng.random((heads, 9, 9))
    one = AttentionMap(
        run=run,
        layer="blocks.0.attention",
        label="a handwritten 7",
        weights=weights / weights.sum(axis=-1, keepdims=True),
        picture=rng.integers(0, 256, (6, 6), dtype=np.uint8),
    )
    return replace(one, **changes)


def study(text: str = "plain words", mechanism: str = "custom(q+align)", task: str = "digits") -> Study:
    """A whole study with ``text`` in every field of free text, and ``mechanism`` beside standard and expressive.

    Three seeds at one and four heads, of which ``mechanism`` lacks one; a layer of more heads than are drawn.
    """
    rng = np.random.default_rng(5)
    names = ("standard", mechanism, "expressive")
    other = f"{mechanism}-h4-s0"
    free: dict[str, Any] = {"device": text, "commit": text, "command": text, "finished": text}
    runs = [(name, seed, heads) for name in names for seed in (0, 1, 2) for heads in (1, 4)]
    return Study(
        task={"name": task, "title": text, "source": text, "settings": {"dataset": text, "lr": 0.003, text: text}},
        records=[
            record(
                name,
                seed,
                heads,
                task=task,
                **free,
                test_accuracy=97.0 + seed + names.index(name) * (1 + seed / 50),
                waiting_share=0.04 + names.index(name) / 100,
                times_as_fast=1.1 + seed / 100,
                epochs_to_threshold=3 + seed + names.index(name) * (1 + seed),
                seconds_to_threshold=1.5,
                versions={text: text},
                samples={text: 7},
            )
            for name, seed, heads in runs
            if (name, seed, heads) != (mechanism, 2, 1)
        ],
        curves={f"{name}-h4-s{seed}": curve(3 + seed) for name in names[:2] for seed in (0, 1)},
        maps=[
            attention_map(other, label=text, layer=text, predicted=text),
            attention_map(other, label=f"{text} again", layer=text, picture=None, tokens=[text] * 9, heads=12),
        ],
        alignments=[
            AlignmentPicture(other, text, rng.normal(size=(5, 5)), np.eye(5)),
            AlignmentPicture(other, text, rng.normal(size=(12, 5, 5))),
        ],
        command=text,
        commit=text,
        notes=[text, "a second note"],
        threshold=Threshold(90.0, text),
        folders={other: text, "standard-h4-s0": "standard-h4-s0", "standard-h4-s1": f"../{text}"},
    )
