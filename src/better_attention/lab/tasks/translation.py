"""Sentences into sentences of another language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.errors import check_float, check_int
from better_attention.lab.tasks.base import Prediction, Shown, Task, share
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.text import plural

PADDING, START, END = 0, 2, 3  # as in models.translation, which is imported where it is used
NO_WORD = "\N{REPLACEMENT CHARACTER}"  # no translation holds it
DECODING_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class TranslationTask(Task):
    """Sentences into sentences, by a :class:`~better_attention.lab.models.translator.Translator`.

    A sample's input is the source (``length`` tokens) with ``[start]`` and the translation (``length`` tokens) behind
    it; its target is the translation shifted by one, ``[end]`` included. Padding follows the words, and what is longer
    is cut off. Both vocabularies are built from the pairs that are trained on.

    Loss and accuracy of a sample are **means over its target tokens**, padding excluded, unknown words included. Those
    of a batch, an epoch and a split are means over sentences: the training loop adds up samples, and a sum over tokens
    would make the size of a step depend on the length of the sentences. (keras.io's example takes the mean over the
    tokens of a batch.)

    Args:
        layers: blocks of the decoder.
        encoder_layers: blocks of the encoder.
        vocabulary: tokens of each side, padding, unknown, start and end included.
        hidden: width of a block's MLP.
        output_dropout: before the map to the words.
        test_share: share of the pairs that is held out as test; ``validation_share`` is one of the pairs as well.
        beam: sentences kept while translating; 1 is greedy decoding.
        length_penalty: exponent of the length in the ranking of a beam.
        bleu_samples: most pairs of a split that are translated for its BLEU: the first ones, in their random order.
    """

    unnumbered: ClassVar[str] = "has no published test split. Name the sentences instead."

    encoder_layers: int
    vocabulary: int
    hidden: int
    output_dropout: float = 0.5
    test_share: float = 0.001
    beam: int = 1
    length_penalty: float = 1.0
    bleu_samples: int = 2_500

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_layers", "hidden", "beam", "bleu_samples"):
            check_int(getattr(self, name), name)
        check_int(self.vocabulary, "vocabulary", at_least=5)
        share(self.output_dropout, "output_dropout")
        share(self.test_share, "test_share")
        check_float(self.length_penalty, "length_penalty", low=0.0)

    def load(self, folder: Path | None = None) -> Splits:
        """See :meth:`Task.load`."""
        from better_attention.lab.data.catalogue import read
        from better_attention.lab.data.published.translation import END as END_WORD
        from better_attention.lab.data.published.translation import START as START_WORD
        from better_attention.lab.data.published.translation import normalise
        from better_attention.lab.data.samples import Pairs
        from better_attention.lab.data.vocabulary import Vocabulary

        data = read(self.dataset, folder)
        if not isinstance(data, Pairs):
            raise TypeError(f"task {self.name!r} needs sentence pairs; data set {self.dataset!r} holds none.")
        normalised = [(normalise(source), normalise(target)) for source, target in data.pairs]
        pairs = [pair for pair in normalised if all(pair)]
        rows = cut_pairs(self, [source for source, _ in pairs])
        parts = [[pairs[row] for row in part] for part in rows]
        source_words = Vocabulary.build((source for source, _ in parts[0]), self.vocabulary).words
        # The words [start] and [end] take two of the target's numbers.
        target_words = Vocabulary.build((target for _, target in parts[0]), self.vocabulary - 2).words
        assets = {"source": list(source_words), "target": [START_WORD, END_WORD, *target_words]}
        train, validation, test = (self._split(part, assets) for part in parts)
        dropped = len(normalised) - len(pairs)
        return Splits(
            train,
            validation,
            test,
            assets,
            notes=(
                *data.notes,
                *((f"{plural(dropped, 'pair')} without a word on one side left out",) if dropped else ()),
                f"all translations of one source sentence lie in one split: {len(train):,} pairs to train, "
                f"{len(validation):,} to validate, {len(test):,} to test",
                "loss and accuracy are means over sentences, each the mean over its tokens, padding excluded",
                self._bleu_note(),
                "super attention in translation is ours, not the paper's: fixed length, a triangular W_A in the "
                "decoder, W_A over the source between decoder and encoder",
            ),
        )

    def _split(self, pairs: Sequence[tuple[str, str]], assets: Mapping[str, Any]) -> Split:
        from better_attention.lab.data.published.translation import encode

        sources = torch.from_numpy(encode([source for source, _ in pairs], assets["source"], self.length))
        targets = torch.from_numpy(
            # One more than the model reads, because input and target are the same words shifted by one.
            encode([target for _, target in pairs], assets["target"], self.length + 1, framed=True)
        )
        return Split(torch.cat([sources, targets[:, :-1]], dim=1), targets[:, 1:].contiguous())

    def _bleu_note(self) -> str:
        how = "greedy decoding" if self.beam == 1 else f"a beam of {self.beam}, length penalty {self.length_penalty:g}"
        return (
            f"BLEU by sacrebleu, signature {bleu(['a'], ['a'])[1]}, of at most {self.bleu_samples:,} pairs a split, by "
            f"{how}; text as in keras.io's example (lower case, no punctuation), cut off after {self.length} words, so "
            "that values are not comparable with BLEU on raw text"
        )

    def model(self, variant: Variant, heads: int) -> nn.Module:
        """See :meth:`Task.model`."""
        from better_attention.lab.models.translator import Translator

        return Translator(
            vocabulary=self.vocabulary,
            source_length=self.length,
            target_length=self.length,
            width=self.width,
            heads=heads,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.layers,
            mechanism=variant.mechanism,
            options=variant.options,
            hidden=self.hidden,
            dropout=self.dropout,
            output_dropout=self.output_dropout,
        )

    def random_inputs(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_inputs`; sources and translations of full length, ``[start]`` between them."""
        sources = torch.randint(1, self.vocabulary, (samples, self.length), generator=generator)
        words = torch.randint(END + 1, self.vocabulary, (samples, self.length - 1), generator=generator)
        return torch.cat([sources, torch.full((samples, 1), START), words], dim=1)

    def random_targets(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_targets`."""
        return torch.randint(END, self.vocabulary, (samples, self.length), generator=generator)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each sample, (B,), the mean over its tokens, from logits (B, T, V) and targets (B, T)."""
        # Padding has a loss of zero here; the mean over the tokens then leaves it out.
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none")
        return _token_mean(each.view_as(targets), targets)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Share of each sample's tokens that are right, (B,), the tokens before them given."""
        return _token_mean((logits.argmax(dim=-1) == targets).to(logits.dtype), targets)

    def scores(self, model: nn.Module, split: Split, assets: Mapping[str, Any]) -> dict[str, float]:
        """BLEU of the translations against the pairs' own, one reference each."""
        inputs, targets = split.batch(slice(self.bleu_samples))
        translations = [
            p.label for batch in inputs.split(DECODING_BATCH) for p in self.predictions(model, batch, assets)
        ]
        # Which unknown word a reference has does not matter, as long as no translation can match it.
        return {"bleu": bleu(translations, sentences(targets, assets["target"], unknown=NO_WORD))[0]}

    def scored(self, samples: int) -> int:
        """See :meth:`Task.scored`."""
        return min(samples, self.bleu_samples)

    def predictions(self, model: nn.Module, inputs: Tensor, assets: Mapping[str, Any]) -> list[Prediction]:
        """The translation of each source, and the probability of its tokens together."""
        from better_attention.lab.models.beam_search import beam_search, greedy
        from better_attention.lab.models.translator import Translator

        translator, sources = cast(Translator, model), inputs[:, : self.length]
        if self.beam == 1:
            decoded = greedy(translator, sources)
        else:
            decoded = beam_search(translator, sources, width=self.beam, length_penalty=self.length_penalty)
        texts, probabilities = sentences(decoded.tokens, assets["target"]), decoded.log_probability.exp().tolist()
        return [Prediction(text, probability, {}) for text, probability in zip(texts, probabilities, strict=True)]

    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """One source sentence, or a sequence of them, as tokens (N, 2 ℓ), with ``[start]`` for a translation."""
        from better_attention.lab.data.published.translation import normalise

        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"task {self.name!r} reads sentences (str), received {text!r} ({type(text).__name__}).")
            if not normalise(text):
                raise ValueError(f"task {self.name!r} translates words; {text!r} holds none.")
        rows = self._split([(normalise(text), "") for text in texts], assets).inputs
        # Even an empty translation is framed: [start] stays, its [end] must not reach the decoder.
        rows[:, self.length + 1 :] = PADDING
        return rows

    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """The source's tokens, then the translation's; padding is empty, an unknown word a question mark."""
        words = (["", "?", *assets["source"]], ["", "?", *assets["target"]])
        tokens = inputs.tolist()
        halves = tokens[: self.length], tokens[self.length :]
        return Shown(tokens=tuple(vocabulary[n] for vocabulary, half in zip(words, halves, strict=True) for n in half))

    def key_tokens(self, layer: str, shown: Shown) -> tuple[str, ...] | None:
        """The decoder's own attention reads the translation, every other layer the source."""
        if shown.tokens is None:
            return None
        reads_target = layer.startswith("decoder.") and "cross" not in layer
        return shown.tokens[self.length :] if reads_target else shown.tokens[: self.length]

    def query_tokens(self, layer: str, shown: Shown) -> tuple[str, ...] | None:
        """Every layer of the decoder is asked by the translation, every other layer by the source."""
        if shown.tokens is None:
            return None
        return shown.tokens[self.length :] if layer.startswith("decoder.") else shown.tokens[: self.length]

    def examples(self, splits: Splits, number: int) -> list[tuple[int, str]]:
        """The longest test pairs of which nothing was cut off, each of another source: row and both sentences."""
        sources, targets = splits.test.inputs[:, : self.length], splits.test.targets
        lengths = (sources != PADDING).sum(dim=1)
        whole = (lengths < self.length) & (targets == END).any(dim=1)
        # Pairs that were cut off get a length below zero and so come after all whole ones. More rows than wanted are
        # kept, since several may have the same source.
        order = torch.where(whole, lengths, lengths - self.length).argsort(descending=True, stable=True)[: 20 * number]
        read = sentences(sources[order], splits.assets["source"])
        meant = sentences(targets[order], splits.assets["target"])
        pairs: dict[str, tuple[int, str]] = {}
        for row, source, target in zip(order.tolist(), read, meant, strict=True):
            pairs.setdefault(source, (row, f"test pair {row}: {source} → {target}"))
        return list(pairs.values())[:number]


def cut_pairs(task: TranslationTask, sources: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
    """Row numbers of the training, validation and test pairs.

    Random, in an order that depends on ``task.data_seed`` alone. Pairs of equal source lie in one part, which may make
    a part a little larger than its share. Smaller scales then take the first pairs of each part.

    Raises:
        ValueError: a part would be empty.
    """
    rows_of: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows_of.setdefault(source, []).append(row)
    groups = list(rows_of.values())
    wanted = {"test": round(len(sources) * task.test_share), "validation": round(len(sources) * task.validation_share)}
    parts: dict[str, list[int]] = {"test": [], "validation": [], "training": []}
    for group in torch.randperm(len(groups), generator=torch.Generator().manual_seed(task.data_seed)).tolist():
        part = next((name for name, size in wanted.items() if len(parts[name]) < size), "training")
        parts[part] += groups[group]
    parts["training"] = parts["training"][: task.train_samples]
    parts["test"] = parts["test"][: task.test_samples]
    for name, part_rows in parts.items():
        if not part_rows:
            raise ValueError(
                f"task {task.name!r} leaves no {name} pairs of {len(sources)} (test_share={task.test_share}, "
                f"validation_share={task.validation_share}, train_samples={task.train_samples}, "
                f"test_samples={task.test_samples}). Raise the share, or add data."
            )
    return parts["training"], parts["validation"], parts["test"]


def sentences(tokens: Tensor, vocabulary: Sequence[str], *, unknown: str = "?") -> list[str]:
    """The words of each row of ``tokens`` (N, L), without padding, up to the word ``[end]``.

    >>> sentences(torch.tensor([[4, 1, 3, 4], [5, 0, 0, 0]]), ["[start]", "[end]", "no", "sí"])
    ['no ?', 'sí']
    """
    words = dict(enumerate(vocabulary, start=2))  # a model may know more numbers than there were words
    rows = ([words.get(token, unknown) for token in row if token != PADDING] for row in tokens.tolist())
    return [" ".join(row[: row.index("[end]")] if "[end]" in row else row) for row in rows]


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU in points and sacrebleu's signature, from words that stand between spaces.

    >>> bleu(["the cat sat on the mat today"], ["the cat sat on the mat yesterday"])[0] > 70
    True
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return float(score), str(metric.get_signature())


def _token_mean(values: Tensor, targets: Tensor) -> Tensor:
    real = targets != PADDING
    return (values * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
