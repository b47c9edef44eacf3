"""Texts into classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from better_attention.errors import check_int
from better_attention.lab.tasks.base import Shown, Task
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.subsets import check_classes, cut, subsets
from better_attention.lab.tasks.variant import Variant

if TYPE_CHECKING:
    from better_attention.lab.data.samples import Texts


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """Texts into classes, by a :class:`~better_attention.lab.models.text_classifier.TextClassifier`.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("vocabulary", 3), ("classes", 2), ("hidden", 1), ("head", 1)):
            check_int(getattr(self, name), name, at_least=least)

    def load(self, folder: Path | None = None) -> Splits:
        """See :meth:`Task.load`."""
        from better_attention.lab.data.vocabulary import Vocabulary

        texts = self.texts(folder)
        check_classes(self, self.classes, texts.classes)
        parts = chosen(self, texts)
        vocabulary = Vocabulary.build(parts["train"].texts, self.vocabulary)

        def split(part: Part) -> Split:
            return Split(torch.from_numpy(vocabulary.encode(part.texts, self.length)), part.targets)

        train = split(parts["train"])
        # Padding is on the left, so a text fills its row exactly if the first number is not padding.
        full = int((train.inputs[:, 0] != 0).sum())
        cut_off = (
            f"{full:,} of {len(train):,} training texts have {self.length} words or more: the last {self.length} of a "
            "text are read; `--set length=N` reads more"
        )
        return Splits(
            train=train,
            validation=split(parts["validation"]),
            test=split(parts["test"]),
            assets={"classes": list(texts.classes), "vocabulary": list(vocabulary.words)},
            notes=(*texts.notes, *([cut_off] if full else [])),
        )

    def texts(self, folder: Path | None = None) -> Texts:
        """The data set as it is read, before anything is left out."""
        from better_attention.lab.data.catalogue import read
        from better_attention.lab.data.samples import Texts

        texts = read(self.dataset, folder)
        if not isinstance(texts, Texts):
            raise TypeError(f"task {self.name!r} needs texts; data set {self.dataset!r} holds none.")
        return texts

    def model(self, variant: Variant, heads: int) -> nn.Module:
        """See :meth:`Task.model`."""
        from better_attention.lab.models.text_classifier import TextClassifier

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

    def random_inputs(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_inputs`."""
        return torch.randint(1, self.vocabulary, (samples, self.length), generator=generator)

    def random_targets(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_targets`."""
        return torch.randint(self.classes, (samples,), generator=generator)

    def test_inputs(self, splits: Splits, folder: Path | None = None) -> tuple[Sequence[Any], Sequence[int]]:
        """See :meth:`Task.test_inputs`; of the whole data set."""
        texts = self.texts(folder)
        return texts.test_texts, texts.test_labels.tolist()

    def unlike(self, value: Any, assets: Mapping[str, Any]) -> list[str]:
        """See :meth:`Task.unlike`; texts without a single known word."""
        from better_attention.lab.data.vocabulary import UNKNOWN

        known = int(self.encode(value, assets).max()) > UNKNOWN
        return [] if known else ["none of its words is in the model's vocabulary"]

    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """One text, or a sequence of them, as tokens (N, ℓ)."""
        from better_attention.lab.data.vocabulary import Vocabulary

        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise TypeError(f"task {self.name!r} reads texts (str), received {wrong[0]!r} ({type(wrong[0]).__name__}).")
        return torch.from_numpy(Vocabulary(assets["vocabulary"]).encode(texts, self.length))

    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """The tokens that the model reads; padding is empty, an unknown word a question mark."""
        words = ["", "?", *assets["vocabulary"]]
        return Shown(tokens=tuple(words[number] for number in inputs.tolist()))


@dataclass(frozen=True, kw_only=True)
class OwnTextTask(TextTask):
    """The user's own texts; classes and words are counted when their file is known.

    Args:
        text_column, label_column: the columns of the file; "": one of the usual names, such as ``text`` and ``label``.
    """

    derived: ClassVar[Mapping[str, str]] = {"classes": "the data"}
    own_data: ClassVar[bool] = True

    text_column: str = ""
    label_column: str = ""

    def fitted(self, folder: Path | None = None) -> Self:
        """With the number of classes, no more words than there are, and a last layer no narrower than the outputs."""
        from better_attention.lab.data.vocabulary import Vocabulary

        texts = self.texts(folder)
        words = Vocabulary.build(chosen(self, texts)["train"].texts, self.vocabulary)
        classes = len(texts.classes)
        return replace(self, classes=classes, vocabulary=len(words), head=max(self.head, classes))

    def texts(self, folder: Path | None = None) -> Texts:
        """See :meth:`TextTask.texts`; ``folder`` may be a file."""
        from better_attention.lab.data.own_texts import read as texts
        from better_attention.lab.data.samples import NotFetched

        if folder is None:
            raise NotFetched(f"task {self.name!r} reads texts of your own: name them with `--data`, {texts.LAYOUT}.")
        return texts.read(folder, self.text_column, self.label_column)


@dataclass(frozen=True)
class Part:
    """Some texts and the class of each, int64 (N,)."""

    texts: Sequence[str]
    targets: Tensor


def chosen(task: TextTask, texts: Texts) -> dict[str, Part]:
    """The texts of ``"train"``, ``"validation"`` and ``"test"`` that the task uses.

    A validation split of the data set's own is kept; without one it is cut from the training split by
    :func:`~better_attention.lab.tasks.subsets.cut`.

    Raises:
        ValueError: a part would be empty.
    """
    train, test = (texts.train_texts, texts.train_labels), (texts.test_texts, texts.test_labels)
    if texts.validation_texts is None or texts.validation_labels is None:
        validation, rows = train, cut(task, len(train[0]), len(test[0]))
    else:
        validation = texts.validation_texts, texts.validation_labels
        rows = subsets(task, len(train[0]), len(validation[0]), len(test[0]))
    parts = zip(("train", "validation", "test"), (train, validation, test), rows, strict=True)
    return {
        name: Part([sources[row] for row in some.tolist()], torch.from_numpy(labels)[some])
        for name, (sources, labels), some in parts
    }
