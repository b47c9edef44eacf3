"""Texts into classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from better_attention.experiments.task import Shown, Split, Splits, Task, cut
from better_attention.experiments.variant import Variant

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """Texts into classes, by a :class:`~better_attention.models.classifier.TextClassifier`.

    The vocabulary is built from the texts that are trained on, validation and test excluded. A text is
    its last ``length`` tokens, padded on the left.

    Args:
        vocabulary: number of tokens, padding and unknown included.
        classes: number of classes; two classes have one logit.
        hidden, head: widths of a block's MLP and of the layer before the output.
    """

    vocabulary: int
    classes: int
    hidden: int = 32
    head: int = 6

    def load(self, folder: Path | None = None) -> Splits:
        """See :meth:`Task.load`."""
        from better_attention.data import Texts, Vocabulary, read

        texts = read(self.dataset, folder)
        if not isinstance(texts, Texts):
            raise TypeError(f"task {self.name!r} needs texts; data set {self.dataset!r} holds none.")
        train, validation, test = cut(self, len(texts.train_texts), len(texts.test_texts))
        vocabulary = Vocabulary.build([texts.train_texts[i] for i in train.tolist()], self.vocabulary)

        def split(sources: Sequence[str], labels: np.ndarray[Any, Any], rows: Tensor) -> Split:
            tokens = vocabulary.encode([sources[i] for i in rows.tolist()], self.length)
            return Split(torch.from_numpy(tokens), torch.from_numpy(labels)[rows])

        return Splits(
            train=split(texts.train_texts, texts.train_labels, train),
            validation=split(texts.train_texts, texts.train_labels, validation),
            test=split(texts.test_texts, texts.test_labels, test),
            assets={"classes": list(texts.classes), "vocabulary": list(vocabulary.words)},
            notes=texts.notes,
        )

    def model(self, variant: Variant, heads: int) -> nn.Module:
        """See :meth:`Task.model`."""
        from better_attention.models.classifier import TextClassifier

        return TextClassifier(
            vocabulary=self.vocabulary,
            length=self.length,
            width=self.width,
            layers=self.layers,
            heads=heads,
            mechanism=variant.mechanism,
            options=variant.options,
            hidden=self.hidden,
            head=self.head,
            outputs=1 if self.classes == 2 else self.classes,
            dropout=self.dropout,
        )

    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """One text, or a sequence of them, as tokens (N, ℓ)."""
        from better_attention.data import Vocabulary

        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise TypeError(f"task {self.name!r} reads texts (str), received {wrong[0]!r} ({type(wrong[0]).__name__}).")
        return torch.from_numpy(Vocabulary(assets["vocabulary"]).encode(texts, self.length))

    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """The tokens that the model reads; padding is empty, an unknown word a question mark."""
        words = ["", "?", *assets["vocabulary"]]
        return Shown(tokens=tuple(words[number] for number in inputs.tolist()))
