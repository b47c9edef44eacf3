"""The settings that all runs of the studies share, and their models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from better_attention.lab.models.language_model import LanguageModel
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.language import LanguageTask
from better_attention.lab.tasks.variant import Variant

HEADS = 2
EPOCH_UPDATES, EPOCHS = 50, 8
MECHANISMS = (
    "standard",
    "optimised",
    "efficient",
    "super",
    "expressive",
    "efficient+expressive",
    "super+expressive",
    "optimised+expressive",
)
TEXTS = {"Tiny Shakespeare": "text-lm-shakespeare", "IMDB texts": "text-lm-imdb"}
"""What a text is called -> the folder of its runs or results."""
WINDOWS = {None: "window-full", 16: "window-16", 32: "window-32"}
"""Width of the window -> the folder of its runs or results, below the one of Tiny Shakespeare."""
LONG, LONG_EVERY, LONG_EPOCHS = "text-lm-long", 100, 20
"""The folder of the longer study, its updates between two validations, and how many times as many it has."""
GROUPED = "standard, one head of keys"
"""A model of that study beside the mechanisms; its folder below that of the study is "grouped"."""
GROUPED_WIDTH = 68
VOCABULARY = 66  # Tiny Shakespeare's characters, and one for unknown ones


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the studies.

    Args:
        mechanism: its mechanism.
        window: its window; None: none.
        equal_params: whether its width is the one of equal parameters.
        grouped: one head of keys and values, at :data:`GROUPED_WIDTH`.
    """

    mechanism: str
    window: int | None = None
    equal_params: bool = False
    grouped: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        if self.grouped:
            return GROUPED
        return self.mechanism if self.window is None else f"{self.mechanism}, window {self.window}"

    def task(self, length: int = 64) -> LanguageTask:
        """Its task, with the vocabulary of Tiny Shakespeare; ``length`` in place of the 64 that it is trained at."""
        task = TASKS["text-lm"]("small")
        assert isinstance(task, LanguageTask)  # noqa: S101 - for the type checker
        own: dict[str, Any] = {"window": self.window, "equal_params": self.equal_params, "vocabulary": VOCABULARY}
        own |= {"kv_heads": 1, "width": GROUPED_WIDTH} if self.grouped else {}
        return replace(task, layers=2, batch_size=16, length=length, epoch_updates=EPOCH_UPDATES, **own)

    def build(self, length: int = 64) -> LanguageModel:
        """A fresh model, at the width that it has at length 64."""
        width = self.task().sized(Variant.of(self.mechanism), HEADS).width
        task = replace(self.task(length), width=width, equal_params=False)
        model = task.model(Variant.of(self.mechanism), HEADS)
        assert isinstance(model, LanguageModel)  # noqa: S101 - for the type checker
        return model


EQUAL = tuple(Model(mechanism, equal_params=True) for mechanism in MECHANISMS)
LONGER = (*EQUAL, Model("standard", grouped=True))
WINDOWED = tuple(Model(mechanism, window) for window in WINDOWS for mechanism in ("standard", "super"))
