"""Running text, every next token to be predicted: language models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.errors import check_choice, check_int
from better_attention.lab.models.causal_decoder import POSITIONS
from better_attention.lab.models.language_model import LanguageModel, language_model_size
from better_attention.lab.tasks.base import Prediction, Shown, Task, share
from better_attention.lab.tasks.language_notes import grouping, guessing_bits, parts_told
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import Mechanism

TOKENISERS = ("characters", "bpe")
SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1 - done,
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    }
)
"""Name -> share of the learning rate, by the share of the updates that are done."""
UNKNOWN_EARLIER: Mapping[str, Any] = MappingProxyType(
    {"epoch_updates": None, "schedule": "constant", "warmup": 0, "kv_heads": None}
)
"""Settings that earlier versions did not know, and what their runs have."""
LARGEST_LOGITS = 2**25
"""Numbers that the logits of one batch of an evaluation may have: 128 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """Predict every next token, by a :class:`~better_attention.lab.models.language_model.LanguageModel`.

    The text is split by position: training first, then validation, then test. A sample is ``length`` tokens, and its
    targets are the same shifted by one; samples follow each other, in training ``stride`` tokens apart. Loss and
    accuracy are means over all tokens, each of which is predicted from the tokens before it in its sample alone.

    Args:
        tokeniser: ``"characters"``, or ``"bpe"`` (byte-pair encoding learned from the training part).
        vocabulary: most tokens; of characters there are as many as the training part has, and one for unknown ones.
        positions: ``"rotary"``, ``"learned"``, ``"alibi-weight"`` or ``"alibi-score"``.
        window: each token sees the last ``window`` tokens; None: all of its sample that come before it.
        kv_heads: heads of projected keys and values, see :class:`~better_attention.MultiheadAttention`; mechanisms that
            project no keys have none to group and stay as they are. None: as many as queries have.
        stride: tokens between the beginnings of two training samples; None: ``length``, so that none overlap.
        test_share: share of the text that is held out as test; ``validation_share`` is one of the text as well.
        epoch_updates: updates after which an epoch ends with a validation, so that a learning curve has more points;
            the next one begins with another random order of all samples. None: the whole training part.
        schedule: of the learning rate after the warm-up: ``"constant"``, or from ``lr`` down to zero along a straight
            line (``"linear"``) or half a cosine (``"cosine"``, arXiv 1608.03983, eq. 5), over the updates of all
            epochs.
        warmup: updates in which the learning rate rises to ``lr`` along a straight line; 0: none.
        train_samples, test_samples: random subsets of the samples for the smaller scales; None: all.
    """

    derived: ClassVar[Mapping[str, str]] = {}
    unnumbered: ClassVar[str] = "reads running text without numbers. Name the text instead."

    tokeniser: str = "characters"
    vocabulary: int = 512
    positions: str = "rotary"
    window: int | None = None
    kv_heads: int | None = None
    stride: int | None = None
    test_share: float = 0.1
    epoch_updates: int | None = None
    schedule: str = "constant"
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.tokeniser, "tokeniser", TOKENISERS)
        check_choice(self.positions, "positions", POSITIONS)
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_int(self.warmup, "warmup", at_least=0)
        check_int(self.vocabulary, "vocabulary", at_least=256 if self.tokeniser == "bpe" else 2)
        for name in ("window", "kv_heads", "stride", "epoch_updates"):
            if getattr(self, name) is not None:
                check_int(getattr(self, name), name)
        share(self.test_share, "test_share")

    # --- data ---------------------------------------------------------------------------------------------------------

    def fitted(self, folder: Path | None = None) -> Self:
        """With as many tokens as the training part gives the vocabulary."""
        from better_attention.lab.data.tokenisers import LEARN

        train = self._parts(self.text(folder).text)["train"]
        return replace(self, vocabulary=len(LEARN[self.tokeniser](train, self.vocabulary)))

    def text(self, folder: Path | None = None) -> Any:
        """The running text as it is read; ``folder`` may be a file."""
        from better_attention.lab.data.catalogue import read
        from better_attention.lab.data.samples import RunningText

        text = read(self.dataset, folder)
        if not isinstance(text, RunningText):
            raise TypeError(f"task {self.name!r} needs a running text, which data set {self.dataset!r} is not.")
        return text

    def load(self, folder: Path | None = None) -> Splits:
        """See :meth:`Task.load`."""
        from better_attention.lab.data.tokenisers import LEARN

        source = self.text(folder)
        parts = self._parts(source.text)
        tokeniser = LEARN[self.tokeniser](parts["train"], self.vocabulary)
        tokens = {name: torch.tensor(tokeniser.encode(text)) for name, text in parts.items()}
        splits = {name: self._split(name, tokens[name]) for name in parts}
        # Both are those of the whole part, of which the samples leave out at most the last few tokens.
        rates = {name: len(tokens[name]) / len(text) for name, text in parts.items()}
        bits = guessing_bits(tokens, len(tokeniser))
        unknown = sum(int((tokens[name][:, None] == torch.tensor(tokeniser.never)).sum()) for name in parts)
        return Splits(
            **splits,
            assets={**tokeniser.assets(), "tokens_per_character": rates},
            notes=(
                *source.notes,
                f"{len(source.text):,} characters, split by position: {', '.join(parts_told(parts, tokens))}",
                f"{self.tokeniser}: {len(tokeniser):,} tokens, learned from the training part",
                f"their frequencies alone give {bits * rates['test']:.3f} bits per character of the test part",
                *((f"{unknown:,} characters are not in the vocabulary: one token stands for all",) if unknown else ()),
                f"every sample of {self.length:,} tokens begins without a context, so that the first ones are guessed",
            ),
            departures=source.departures,
        )

    def _parts(self, text: str) -> dict[str, str]:
        """The text of each split."""
        test, validation = (round(len(text) * part) for part in (self.test_share, self.validation_share))
        train = len(text) - validation - test
        return {
            "train": text[:train],
            "validation": text[train : train + validation],
            "test": text[train + validation :],
        }

    def _split(self, name: str, tokens: Tensor) -> Split:
        """The samples of a split: views of ``tokens``, which overlapping samples share."""
        step = (self.stride or self.length) if name == "train" else self.length
        if len(tokens) <= self.length:
            raise ValueError(
                f"task {self.name!r}: the {name} part of the text has {len(tokens):,} tokens, and a sample needs "
                f"{self.length + 1:,}. Take a longer text, a shorter length, or larger parts (validation_share and "
                "test_share)."
            )
        rows = tokens.unfold(0, self.length + 1, step)
        wanted = {"train": self.train_samples, "test": self.test_samples}.get(name)
        if wanted is not None and wanted < len(rows):
            generator = torch.Generator().manual_seed(self.data_seed)
            rows = rows[torch.randperm(len(rows), generator=generator)[:wanted].sort().values]
        return Split(rows[:, :-1], rows[:, 1:])

    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """One text, or several of equally many tokens, as tokens (N, L); of a long text the last ``length``."""
        from better_attention.lab.data.tokenisers import tokeniser_of

        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"task {self.name!r} reads texts (str), received {text!r} ({type(text).__name__}).")
            if not text:
                raise ValueError(f"task {self.name!r} continues a text; received an empty one.")
        tokeniser = tokeniser_of(assets)
        rows = [tokeniser.encode(text, strict=True)[-self.length :] for text in texts]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(
                f"texts of equally many tokens are read together, received {', '.join(str(len(row)) for row in rows)}. "
                "Pass them one by one, or use `better-attention generate`, which takes any."
            )
        return torch.tensor(rows)

    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """The tokens; a line end is a sign, an unknown character a question mark."""
        from better_attention.lab.data.tokenisers import tokeniser_of

        tokeniser = tokeniser_of(assets)
        return Shown(tokens=tuple(tokeniser.shown(token) for token in inputs.tolist()))

    def examples(self, splits: Splits, number: int) -> list[tuple[int, str]]:
        """Test samples from all over the test part."""
        rows = [len(splits.test) * n // number for n in range(min(number, len(splits.test)))]
        return [(row, f"test text from token {row * self.length:,}") for row in rows]

    def random_inputs(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_inputs`."""
        return torch.randint(self.vocabulary, (samples, self.length), generator=generator)

    def random_targets(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_targets`."""
        return torch.randint(self.vocabulary, (samples, self.length), generator=generator)

    # --- model --------------------------------------------------------------------------------------------------------

    def model(self, variant: Variant, heads: int) -> nn.Module:
        """See :meth:`Task.model`."""
        return LanguageModel(options=variant.options, dropout=self.dropout, **self._shape(variant, heads))

    def size(self, variant: str | Mechanism | Variant, heads: int) -> int:
        """See :meth:`Task.size`; computed without a model."""
        variant = Variant.of(variant)
        shape = self.sized(variant, heads)._shape(variant, heads)
        return language_model_size(per_head=variant.per_head, **shape)

    def _shape(self, variant: Variant, heads: int) -> dict[str, Any]:
        """The arguments that the model and its size have in common."""
        own = {name: getattr(self, name) for name in ("vocabulary", "length", "width", "layers", "positions", "window")}
        return own | {
            "heads": heads,
            "mechanism": variant.mechanism,
            "kv_heads": variant.kv_heads(self.kv_heads, heads),
        }

    def remarks(self, variants: Sequence[Variant], heads: Sequence[int]) -> tuple[str, ...]:
        """See :meth:`Task.remarks`: to which mechanisms ``kv_heads`` applies."""
        return grouping(self.kv_heads, variants, heads)

    def torch_twin(self) -> Self:
        """Learned positions, no window and as many heads of keys as of queries: torch's layer knows no others."""
        return replace(self, positions="learned", window=None, kv_heads=None)

    def width_step(self, heads: int) -> int:
        """Even head widths: rotary positions turn pairs of features, and the others are compared at the same widths."""
        return 2 * heads

    def make_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The task's optimiser; gains of norms and biases do not decay, as in GPT-2 and Llama."""
        if self.optimiser != "adamw":
            return super().make_optimiser(model)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def epoch_updates_of(self, samples: int) -> int:
        """See :meth:`Task.epoch_updates_of`; at most ``epoch_updates``."""
        whole = super().epoch_updates_of(samples)
        return whole if self.epoch_updates is None else min(whole, self.epoch_updates)

    def learning_rate(self, update: int, updates: int) -> float:
        """See :meth:`Task.learning_rate`; by ``warmup`` and ``schedule``.

        The first update has 1/(warmup + 1) of ``lr``, and the one after the last would have zero, so that no update is
        without effect. A warm-up that is longer than the run ends with the run.
        """
        if update < self.warmup:
            return self.lr * (update + 1) / (self.warmup + 1)
        done = (update - self.warmup) / max(1, updates - self.warmup)
        return self.lr * SCHEDULES[self.schedule](done)

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """See :meth:`Task.with_settings`; runs that were written before these settings existed have their defaults."""
        return super().with_settings({**UNKNOWN_EARLIER, **settings})

    # --- what is measured ---------------------------------------------------------------------------------------------

    @property
    def evaluation_batch(self) -> int:
        """See :attr:`Task.evaluation_batch`; fewer where logits are large."""
        return max(1, min(super().evaluation_batch, LARGEST_LOGITS // (self.length * self.vocabulary)))

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of each sample in nats a token, (B,), from logits (B, L, V)."""
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view_as(targets).mean(dim=1)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Share of the tokens of each sample that are the likeliest ones, float (B,)."""
        return (logits.argmax(dim=-1) == targets).float().mean(dim=1)

    def figures(self, split: str, loss: float, assets: Mapping[str, Any]) -> dict[str, float]:
        """Perplexity of a token, and bits a character, which compares tokenisers too."""
        bits = loss / math.log(2) * assets["tokens_per_character"][split]
        return {"bits_per_character": bits, "perplexity": math.exp(min(loss, 100.0))}

    def costs(self, model: nn.Module, splits: Splits, epoch_seconds: float) -> dict[str, float]:
        """See :meth:`Task.costs`: tokens a second in training and in decoding one text; bytes of the cache a token."""
        from better_attention.lab.generation.speed import decoding_speed

        prompt = splits.test.inputs[0].tolist()[: max(1, self.length // 2)]
        decoding = decoding_speed(model, prompt, self.length)  # type: ignore[arg-type] # as :meth:`model` makes it
        samples = min(len(splits.train), self.epoch_updates_of(len(splits.train)) * self.batch_size)
        found = {
            "tokens_per_second": samples * self.length / epoch_seconds,
            "decoded_per_second": decoding.tokens_per_second,
            "cache_bytes_per_token": decoding.cache_bytes_per_token,
        }
        return {key: value for key, value in found.items() if value is not None}

    def predictions(self, model: nn.Module, inputs: Tensor, assets: Mapping[str, Any]) -> list[Prediction]:
        """The likeliest token after each text."""
        from better_attention.lab.data.tokenisers import tokeniser_of

        tokeniser = tokeniser_of(assets)
        best = model(inputs)[:, -1].softmax(dim=-1).max(dim=-1)
        return [
            Prediction(tokeniser.shown(token), probability, {})
            for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
