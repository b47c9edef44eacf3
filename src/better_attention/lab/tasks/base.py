"""An experiment as data: a data set, a model, and the settings of its training.

A task is a frozen dataclass that a function of ``tasks/catalogue/`` returns for a scale; every variant of it is made by
``dataclasses.replace``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.errors import check_choice, check_float, check_int
from better_attention.lab.tasks.inputs import NamedInput, StandardInput, read_texts
from better_attention.lab.tasks.optimisers import OPTIMISERS, optimiser_of
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import Mechanism

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCALES = ("smoke", "small", "paper")
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Shown:
    """One input in readable form: the tokens of a text, or a uint8 picture (H, W) or (H, W, 3)."""

    tokens: tuple[str, ...] | None = None
    picture: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one input.

    Args:
        label: the likeliest class, or the text that was generated.
        probability: its probability, 0 ... 1.
        probabilities: name -> probability, of every class; empty for a text.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One experiment at one scale.

    Args:
        name, title, source: key on the command line, one line for people, where the paper has it.
        scale: ``"smoke"`` (seconds), ``"small"`` (minutes) or ``"paper"`` (the paper's setting).
        dataset: key of :data:`better_attention.lab.data.published.SOURCES`, or a name that only the task knows.
        width, length, layers: model width d, sequence length ℓ, attention layers.
        heads, default_heads: head counts of the paper's ablation; the one compared by default.
        seeds: default number of runs of each row.
        epochs: most epochs of a run.
        patience: epochs without a better validation loss after which a run stops; 0: never.
        batch_size: samples of one update, over all processes together.
        optimiser, lr, weight_decay: ``"adam"``, ``"adamw"``, ``"rmsprop"`` (as in Keras) or ``"sgd"`` (momentum 0.7),
            and its parameters.
        dropout: rate inside the blocks.
        validation_share: share of the training split that is held out as validation.
        train_samples, test_samples: random subsets for the smaller scales; None: everything.
        data_seed: seed of the validation cut and of the subsets, the same for every run.
        equal_params: give every mechanism the width at which its model comes nearest to the parameters of the standard
            model at ``width``, as table 7 of arXiv 2403.01643 does by hand.
        threads: most CPU threads of a run; None: torch's default. Very small models lose more by handing work to a
            second thread than they gain, especially where another program needs that core.
        threshold: validation accuracy in per cent, the epochs to which are counted, chosen before the runs that it is
            applied to; None: by the rule of :func:`better_attention.lab.analysis.learning_speed.find_threshold`. It
            changes no run and is therefore none of :meth:`settings`.
    """

    derived: ClassVar[Mapping[str, str]] = {}
    """Settings that follow from others or from the data -> from which; to set them would do nothing."""

    own_data: ClassVar[bool] = False
    """Whether the data is the user's own, and every folder of it is read."""

    unnumbered: ClassVar[str] = ""
    """Why test samples cannot be named by number, and what to do instead; empty: see :meth:`numbered_samples`."""

    name: str
    title: str
    source: str
    scale: str
    dataset: str
    width: int
    length: int
    layers: int
    heads: tuple[int, ...]
    default_heads: int
    seeds: int
    epochs: int
    patience: int
    batch_size: int
    optimiser: str
    lr: float
    weight_decay: float = 0.0
    dropout: float = 0.1
    validation_share: float = 0.1
    train_samples: int | None = None
    test_samples: int | None = None
    data_seed: int = 0
    equal_params: bool = False
    threads: int | None = None
    threshold: float | None = field(default=None, compare=False, metadata={"setting": False})

    def __post_init__(self) -> None:
        for name in ("width", "length", "layers", "default_heads", "seeds", "epochs", "batch_size"):
            check_int(getattr(self, name), name)
        check_int(self.patience, "patience", at_least=0)
        for name in ("threads", "train_samples", "test_samples"):
            if getattr(self, name) is not None:
                check_int(getattr(self, name), name)
        check_choice(self.scale, "scale", SCALES)
        check_choice(self.optimiser, "optimiser", OPTIMISERS)
        if check_float(self.lr, "lr", low=0.0) == 0:
            raise ValueError("lr must be above 0, received 0.")
        check_float(self.weight_decay, "weight_decay", low=0.0)
        if self.threshold is not None:
            check_float(self.threshold, "threshold", low=0.0, high=100.0)
        for name in ("dropout", "validation_share"):
            share(getattr(self, name), name)

    def at_length(self, length: int) -> Self:
        """This task with inputs of ``length`` tokens, for measurements at other sizes.

        Raises:
            ValueError: its model cannot read inputs of that length.
        """
        return replace(self, length=length)

    def fitted(self, folder: Path | None = None) -> Self:
        """This task with what only the user's data can tell (classes, sizes) filled in; known data sets know it all.

        Raises:
            ValueError: the data set is missing or damaged; the message says how to get it.
        """
        return self

    @property
    def reads_files(self) -> bool:
        """Whether the data lies in files: it is neither made by the task nor carried by an installed package."""
        from better_attention.lab.data.published import SOURCES

        return self.dataset not in SOURCES or not SOURCES[self.dataset].embedded

    @abstractmethod
    def load(self, folder: Path | None = None) -> Splits:
        """Read the data set from ``folder`` (None: the library's own data home) and split it.

        Raises:
            ValueError: the data set is missing or damaged; the message says how to get it.
        """

    @abstractmethod
    def model(self, variant: Variant, heads: int) -> nn.Module:
        """A fresh model of this width: inputs (B, ...) to logits (B, K), or (B, T, K) of T targets a sample."""

    def build(self, variant: str | Mechanism | Variant, heads: int) -> nn.Module:
        """A fresh model for a comparison: :meth:`model`, at the width that ``equal_params`` asks for."""
        variant = Variant.of(variant)
        return self.sized(variant, heads).model(variant, heads)

    def size(self, variant: str | Mechanism | Variant, heads: int) -> int:
        """Parameters of the model that :meth:`build` makes; takes no memory."""
        with torch.device("meta"):
            return count(self.build(variant, heads))

    def remarks(self, variants: Sequence[Variant], heads: Sequence[int]) -> tuple[str, ...]:
        """Sentences on settings that do not mean the same for all variants and numbers of heads that are compared."""
        return ()

    def torch_twin(self) -> Self:
        """This task with a standard model that ``torch.nn.MultiheadAttention`` can compute, to compare their speed."""
        return self

    def width_step(self, heads: int) -> int:
        """Widths that :meth:`sized` may choose are multiples of this."""
        return heads

    def sized(self, variant: Variant, heads: int) -> Self:
        """This task at the width of ``variant``: its own, or the one of about equal parameters in total."""
        return replace(self, width=equal_width(self, variant, heads)) if self.equal_params else self

    def random_samples(self, samples: int) -> Split:
        """Random inputs and targets of this task's shapes and types, always the same: for measurements of speed.

        >>> from better_attention.lab.tasks.catalogue import TASKS
        >>> TASKS["imdb"]("paper").random_samples(7).inputs.shape
        torch.Size([7, 32])
        """
        # A generator for each, so that the targets do not depend on how many numbers the inputs take.
        first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
        return Split(self.random_inputs(samples, first), self.random_targets(samples, second))

    @abstractmethod
    def random_inputs(self, samples: int, generator: torch.Generator) -> Tensor:
        """Encoded inputs (N, ...) drawn at random, without padding."""

    @abstractmethod
    def random_targets(self, samples: int, generator: torch.Generator) -> Tensor:
        """Targets (N,) or (N, T) drawn at random."""

    def read_inputs(
        self, names: Sequence[str], standard_input: StandardInput, *, resize: bool = False
    ) -> list[NamedInput]:
        """New inputs for :meth:`encode`, by what a user calls them; here texts, see :func:`.inputs.read_texts`.

        Args:
            names: of the inputs.
            standard_input: what ``-`` stands for.
            resize: scale pictures to the size of the data set's.

        Raises:
            ValueError, FileNotFoundError: something that is not there or cannot be an input; the message names it.
        """
        return read_texts(names, standard_input)

    def unlike(self, value: Any, assets: Mapping[str, Any]) -> list[str]:
        """How an input differs from all that the model was trained on, as sentences that follow its name and a colon.

        What a model predicts for such an input is worth little. Empty where nothing is known to differ.
        """
        return []

    def numbered_samples(self, rows: Sequence[int], splits: Splits, folder: Path | None = None) -> list[NamedInput]:
        """Samples of the test split by their numbers in the data set's own order, for :meth:`encode`.

        Args:
            rows: the numbers, from 0.
            splits: what :meth:`load` gives.
            folder: where it reads the data.

        Raises:
            ValueError: no such sample, or :attr:`unnumbered`.
        """
        if self.unnumbered:
            raise ValueError(f"task {self.name!r} {self.unnumbered}")
        inputs, targets = self.test_inputs(splits, folder)
        classes = splits.assets["classes"]
        for row in rows:
            if not 0 <= row < len(inputs):
                raise ValueError(f"test sample {row}: the test split has samples 0 to {len(inputs) - 1}.")
        return [NamedInput(f"test sample {row}", inputs[row], classes[targets[row]]) for row in rows]

    def test_inputs(self, splits: Splits, folder: Path | None = None) -> tuple[Sequence[Any], Sequence[int]]:
        """Input and class of every test sample, before encoding and before any subset is taken."""
        return list(splits.test.inputs.numpy()), splits.test.targets.tolist()

    @abstractmethod
    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """New inputs as the model reads them, (N, ...).

        Raises:
            ValueError, TypeError: inputs that the model cannot read.
        """

    def stored(self, splits: Splits) -> Mapping[str, Any]:
        """What a run keeps for reading new inputs, as plain JSON values: ``splits.assets``, and what a task adds."""
        return splits.assets

    @abstractmethod
    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """One encoded input, without the batch dimension, in readable form."""

    def key_tokens(self, layer: str, shown: Shown) -> tuple[str, ...] | None:
        """The tokens of ``shown`` that are the keys of an attention layer, by its name in the model; None: no text."""
        return shown.tokens

    def query_tokens(self, layer: str, shown: Shown) -> tuple[str, ...] | None:
        """The tokens of ``shown`` that are the queries of an attention layer: its keys, unless overridden."""
        return self.key_tokens(layer, shown)

    def augment(self, inputs: Tensor) -> Tensor:
        """Training inputs (B, ...) changed at random, by the generator of their device; unchanged unless overridden."""
        return inputs

    def scores(self, model: nn.Module, split: Split, assets: Mapping[str, Any]) -> dict[str, float]:
        """What a finished model is measured by beside accuracy and loss: ``"top5"`` (%) or ``"bleu"`` (points).

        The model is in eval mode, on the device of ``split``.
        """
        return {}

    def figures(self, split: str, loss: float, assets: Mapping[str, Any]) -> dict[str, float]:
        """What follows from the mean loss of a split: ``"bits_per_character"`` and ``"perplexity"`` of a text.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            loss: its mean loss, of a finished model.
            assets: of the data.
        """
        return {}

    def costs(self, model: nn.Module, splits: Splits, epoch_seconds: float) -> dict[str, float]:
        """What a finished model costs beside parameters and the seconds of an epoch: tokens a second, bytes of a cache.

        The model is in eval mode, on the device of ``splits``. Keys are those of
        :data:`better_attention.lab.analysis.summary.COLUMNS`.
        """
        return {}

    @property
    def evaluation_batch(self) -> int:
        """Samples that are evaluated at once."""
        return EVALUATION_BATCH

    def epoch_updates_of(self, samples: int) -> int:
        """Updates of an epoch, for a training split of ``samples``: all of it once, unless overridden."""
        return math.ceil(samples / self.batch_size)

    def learning_rate(self, update: int, updates: int) -> float:
        """Learning rate of the update of this number, from 0, of ``updates`` in all; ``lr`` unless overridden."""
        return self.lr

    def scored(self, samples: int) -> int:
        """How many of a split's samples :meth:`scores` looks at."""
        return samples

    def solved(self, epoch: Mapping[str, float]) -> bool:
        """Whether a run may end after ``epoch``, its line of the curve, since more cannot be learned."""
        return False

    def examples(self, splits: Splits, number: int) -> list[tuple[int, str]]:
        """Test samples for a report, each of another class: row and description."""
        targets = splits.test.targets.tolist()
        rows = [targets.index(target) for target in dict.fromkeys(targets)][:number]
        return [(row, f"test sample {row}, class {splits.assets['classes'][targets[row]]}") for row in rows]

    def predictions(self, model: nn.Module, inputs: Tensor, assets: Mapping[str, Any]) -> list[Prediction]:
        """The likeliest class of each encoded input (B, ...) by ``model``, which is in eval mode."""
        classes = assets["classes"]
        return [
            Prediction(classes[best := row.index(max(row))], row[best], dict(zip(classes, row, strict=True)))
            for row in self.probabilities(model(inputs)).tolist()
        ]

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each sample, (B,), from logits (B, K); K = 1 is the logit of class 1 of two."""
        if logits.shape[1] == 1:
            # From the logit itself: a sigmoid that rounds to 0 or 1 would give an infinite logarithm.
            return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype), reduction="none")
        return F.cross_entropy(logits, targets, reduction="none")

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether the likeliest class is the right one, bool (B,); with several targets a sample, the share, float."""
        predicted = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)
        return predicted == targets

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of every class, (B, classes)."""
        if logits.shape[1] == 1:
            second = logits[:, 0].sigmoid()
            return torch.stack([1 - second, second], dim=1)
        return logits.softmax(dim=1)

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The task's optimiser over all parameters of ``model``."""
        return optimiser_of(self.optimiser, model.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def settings(self) -> dict[str, Any]:
        """Every field that a run depends on, as a plain JSON value."""
        known = _settings_of(type(self))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k in known}

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """This task with the fields that :meth:`settings` once gave.

        Raises:
            ValueError: an unknown or a missing field, or a value out of range.
        """
        known = _settings_of(type(self))
        if known != set(settings):
            raise ValueError(
                f"settings of task {self.name!r}: unknown {sorted(set(settings) - known)}, "
                f"missing {sorted(known - set(settings))}; written by another version of better-attention."
            )
        # JSON has no tuples: they were written as lists.
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return replace(self, **values)


def _settings_of(task: type[Task]) -> set[str]:
    return {f.name for f in fields(task) if f.metadata.get("setting", True)}


def share(value: object, name: str) -> float:
    """``value`` as a number from 0 to below 1, or an error naming the setting; a share of 1 would leave nothing.

    Raises:
        TypeError, ValueError: it is not such a number.
    """
    number = check_float(value, name, low=0.0, high=1.0)
    if number == 1:
        raise ValueError(f"{name} must be below 1, received {value!r}: nothing would be left.")
    return number


def count(module: nn.Module) -> int:
    """Number of learned values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def equal_width(task: Task, variant: Variant, heads: int) -> int:
    """The multiple of ``task.width_step(heads)`` at which ``variant`` comes nearest to standard at ``task.width``."""

    def size(width: int, of: Variant) -> int:
        return replace(task, width=width, equal_params=False).size(of, heads)

    aim, step = size(task.width, Variant.of("standard")), task.width_step(heads)
    # Where only the score differs, the counts are equal at the same width and there is nothing to search for.
    if size(task.width, variant) == aim:
        return task.width
    low, high = 1, max(2, 4 * task.width // step)
    while high - low > 1:  # parameters grow with the width
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle * step, variant) <= aim else (low, middle)
    # The width of the task itself need not be a multiple of the step, so it competes with the two neighbours.
    return min((low * step, high * step, task.width), key=lambda width: abs(size(width, variant) - aim))
