"""Delayed recurrences: the next symbol from the one before and the one τ steps back. Our own definition, not a paper's.

arXiv 2407.18601 reports "autoregressive prediction tasks" whose definition is not published; these are ours. Under the
rule (a, b) a sequence continues as x_t = (a x_{t-1} + b x_{t-τ}) mod N from τ symbols drawn at random, the initial
state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from better_attention.errors import check_choice, check_float, check_int
from better_attention.lab.models.causal_decoder import ACTIVATIONS, EMBEDDINGS, POSITIONS, CausalDecoder, decoder_size
from better_attention.lab.tasks.base import Shown, Task
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.mechanism import Mechanism

RULES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"plus": (1, 1), "minus": (1, -1), "back": (-1, 1), "negative": (-1, -1)}
)
"""Name -> (a, b). Each can be run backwards, since b is invertible modulo any N: no state is lost on the way."""

SCALINGS: Mapping[str, float | str | None] = MappingProxyType({"sqrt": None, "raw": 1.0, "learned": "learned"})
"""Name -> ``scale`` of the attention layers: 1/sqrt(d_k), none at all, or a parameter of each head."""

ENUMERATED = 16
"""Spaces of up to this many times the states that are wanted are cut as a whole; from larger ones states are drawn."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceTask(Task):
    """Predict every next symbol of a recurrence, by :class:`~better_attention.lab.models.causal_decoder.CausalDecoder`.

    A model reads x_0 ... x_{τ+steps-2}, with several rules after a token that tells which one holds, and predicts
    what follows each symbol. Only x_t with t >= τ can be known, so they alone count, in loss and accuracy.
    ``length``, the number of tokens read, follows from delay, steps and rules.

    Initial states are split by their SHA-256: the tenth with the smallest digests is for testing, the next for
    validation, the rest for training (of fewer than 160 states up to 16 a part, a quarter at most); a state is held
    out under every rule.

    Args:
        modulus: number of symbols N, 2 ... 256.
        delay: τ, at least 2.
        steps: symbols that follow the initial state.
        rules: names from :data:`RULES`, different ones modulo N; several make the multi-task case.
        positions: ``"learned"``, ``"rotary"``, ``"alibi-weight"`` or ``"alibi-score"``.
        embedding: ``"learned"``, or ``"one-hot"``: symbol i is the unit vector i, not trained; the width is at least
            the number of tokens.
        activation: of the MLP, ``"gelu"`` or ``"relu"``.
        scaling: key of :data:`SCALINGS`.
        target_accuracy: per cent of the validation symbols at which a run has solved its task and stops.
        train_samples, test_samples: sequences of an epoch, drawn once; most test (and most validation) sequences.

    Raises:
        ValueError, TypeError: a setting out of range.
    """

    derived: ClassVar[Mapping[str, str]] = {"length": "delay, steps and rules"}
    unnumbered: ClassVar[str] = "computes its data. Name the symbols instead, as in '1 0 1'."

    modulus: int
    delay: int
    steps: int
    rules: tuple[str, ...] = ("plus",)
    positions: str = "rotary"
    embedding: str = "learned"
    activation: str = "gelu"
    scaling: str = "sqrt"
    target_accuracy: float | None = 99.0

    def __post_init__(self) -> None:
        if check_int(self.modulus, "modulus", at_least=2) > 256:
            raise ValueError(f"modulus must be <= 256, received {self.modulus}.")
        for name, least in (("delay", 2), ("steps", 1)):
            check_int(getattr(self, name), name, at_least=least)
        for name in ("train_samples", "test_samples"):
            check_int(getattr(self, name), name)
        check_choice(self.positions, "positions", POSITIONS)
        check_choice(self.embedding, "embedding", EMBEDDINGS)
        check_choice(self.activation, "activation", ACTIVATIONS)
        check_choice(self.scaling, "scaling", SCALINGS)
        if self.target_accuracy is not None:
            check_float(self.target_accuracy, "target_accuracy", low=0.0, high=100.0)
        self._check_rules()
        # Set past the frozen dataclass, because it follows from the other fields.
        object.__setattr__(self, "length", self.delay + self.steps - 1 + (len(self.rules) > 1))
        super().__post_init__()

    def _check_rules(self) -> None:
        if not isinstance(self.rules, tuple) or not self.rules:
            raise ValueError(f"rules must be a tuple of names out of {', '.join(RULES)}, received {self.rules!r}.")
        meanings: dict[tuple[int, ...], str] = {}
        for name in self.rules:
            # Modulo N, coefficients that differ may be equal: for N = 2 all four rules are the same.
            meaning = tuple(c % self.modulus for c in RULES[check_choice(name, "rules", RULES)])
            if meaning in meanings:
                raise ValueError(
                    f"rules {meanings[meaning]!r} and {name!r} are the same modulo {self.modulus}. Leave one out, or "
                    "choose a larger modulus."
                )
            meanings[meaning] = name

    def at_length(self, length: int) -> Self:
        """With as many steps as make ``length`` tokens."""
        steps = length - self.delay + 1 - (len(self.rules) > 1)
        if steps < 1:
            raise ValueError(f"task {self.name!r} with delay={self.delay} reads more than {length} tokens.")
        return replace(self, steps=steps)

    @property
    def reads_files(self) -> bool:
        """False: the sequences are computed."""
        return False

    def load(self, folder: Path | None = None) -> Splits:
        """Make the data; nothing is read."""
        held_out = check_int(self.test_samples, "test_samples")
        wanted = {"train": check_int(self.train_samples, "train_samples"), "validation": held_out, "test": held_out}
        rules = len(self.rules)
        # Rounded up, since every state serves under every rule.
        states = split_states(self.modulus, self.delay, {k: -(-n // rules) for k, n in wanted.items()}, self.data_seed)
        sequences = {name: self._sequences(of, wanted[name], name == "train") for name, of in states.items()}
        return Splits(
            train=self._split(sequences["train"]),
            validation=self._split(sequences["validation"]),
            test=self._split(sequences["test"]),
            assets={"classes": [str(symbol) for symbol in range(self.modulus)], "rules": list(self.rules)},
            notes=(
                "the task is our own definition, not a paper's: "
                + "; ".join(f"{name}: x_t = {formula(name, self.delay)} mod {self.modulus}" for name in self.rules),
                overlap_note(sequences["train"][1], sequences["test"][1], self.delay),
            ),
        )

    def _sequences(self, states: Tensor, wanted: int, again: bool) -> tuple[Tensor, Tensor]:
        """Number of the rule (n,) and sequence (n, τ + steps) for each state under each rule.

        With fewer than ``wanted`` and ``again`` they are repeated, so that an epoch has its number of updates.
        """
        rows = torch.arange(wanted if again else min(wanted, len(states) * len(self.rules)))
        # The rule changes fastest, so that any number of rows holds all rules about equally often.
        which, state = rows % len(self.rules), (rows // len(self.rules)) % len(states)
        coefficients = torch.tensor([RULES[name] for name in self.rules])[which]
        return which, continued(states[state], coefficients, self.steps, self.modulus)

    def _split(self, numbered: tuple[Tensor, Tensor]) -> Split:
        which, sequences = numbered
        inputs = sequences[:, :-1]
        if len(self.rules) > 1:
            # The tokens that name a rule are numbered behind the symbols.
            inputs = torch.cat([self.modulus + which[:, None], inputs], dim=1)
        return Split(inputs.contiguous(), sequences[:, self.delay :].contiguous())

    def model(self, variant: Variant, heads: int) -> nn.Module:
        """See :meth:`Task.model`."""
        return CausalDecoder(
            mechanism=variant.mechanism,
            options=variant.options,
            dropout=self.dropout,
            activation=self.activation,
            **self._shape(heads),
        )

    def size(self, variant: str | Mechanism | Variant, heads: int) -> int:
        """See :meth:`Task.size`; computed, since a ladder asks for hundreds of sizes before it begins."""
        variant = Variant.of(variant)
        shape = self.sized(variant, heads)._shape(heads)
        return decoder_size(mechanism=variant.mechanism, per_head=variant.per_head, **shape)

    def _shape(self, heads: int) -> dict[str, Any]:
        """The arguments that the model and its size have in common."""
        return {
            "vocabulary": self.modulus + (len(self.rules) if len(self.rules) > 1 else 0),
            "outputs": self.modulus,
            "length": self.length,
            "width": self.width,
            "layers": self.layers,
            "heads": heads,
            "positions": self.positions,
            "embedding": self.embedding,
            "scale": SCALINGS[self.scaling],
        }

    def random_inputs(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_inputs`; symbols that follow no rule."""
        symbols = torch.randint(self.modulus, (samples, self.length), generator=generator)
        if len(self.rules) > 1:
            symbols[:, 0] = self.modulus
        return symbols

    def random_targets(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Task.random_targets`."""
        return torch.randint(self.modulus, (samples, self.steps), generator=generator)

    def torch_twin(self) -> Self:
        """Learned positions and 1/sqrt(d_k): torch's layer knows no others."""
        return replace(self, positions="learned", scaling="sqrt")

    def width_step(self, heads: int) -> int:
        """Even head widths: rotary positions turn pairs of features, and the others are compared at the same widths."""
        return 2 * heads

    def solved(self, epoch: Mapping[str, float]) -> bool:
        """See :meth:`Task.solved`: ``target_accuracy`` is reached on the validation symbols."""
        return self.target_accuracy is not None and epoch["validation_accuracy"] >= self.target_accuracy

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the predictable symbols of each sequence, (B,), from logits (B, L, N)."""
        # cross_entropy expects the classes in dimension 1.
        return F.cross_entropy(self._predictable(logits).mT, targets, reduction="none").mean(dim=1)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Share of the predictable symbols of each sequence that are the likeliest ones, float (B,)."""
        return (self._predictable(logits).argmax(dim=-1) == targets).float().mean(dim=1)

    def _predictable(self, logits: Tensor) -> Tensor:
        """The logits of x_t with t >= τ: those behind the last ``steps`` tokens, (B, steps, N)."""
        return logits[:, -self.steps :]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of every symbol to come after the last token, (B, N)."""
        return logits[:, -1].softmax(dim=-1)

    def examples(self, splits: Splits, number: int) -> list[tuple[int, str]]:
        """The first test sequences."""
        return [(row, f"test sequence {row + 1}") for row in range(min(number, len(splits.test)))]

    def encode(self, inputs: Any, assets: Mapping[str, Any]) -> Tensor:
        """One sequence, or several of one length, as text ("3 0 5"; with several rules "minus 3 0 5"), as (n, L)."""
        lines = [inputs] if isinstance(inputs, str) else list(inputs)
        rows = [self._read(line) for line in lines]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"sequences of one length are read together, received lengths {[len(r) for r in rows]}.")
        return torch.tensor(rows)

    def _read(self, line: object) -> list[int]:
        if not isinstance(line, str):
            raise TypeError(f"task {self.name!r} reads texts of symbols, received {line!r} ({type(line).__name__}).")
        words, several = line.replace(",", " ").split(), len(self.rules) > 1
        head = [self.modulus + self.rules.index(words[0])] if several and words and words[0] in self.rules else []
        symbols = [int(word) for word in words[len(head) :] if word.isdecimal() and int(word) < self.modulus]
        if len(symbols) < len(words) - len(head) or len(head) < several or not self.delay <= len(symbols):
            name = f"the rule ({', '.join(self.rules)}), then " if several else ""
            raise ValueError(
                f"expected {name}at least {self.delay} symbols 0 ... {self.modulus - 1}, received {line!r}."
            )
        if len(head) + len(symbols) > self.length:
            raise ValueError(f"at most {self.length} tokens are read, received {len(head) + len(symbols)}.")
        return head + symbols

    def show(self, inputs: Tensor, assets: Mapping[str, Any]) -> Shown:
        """The symbols, after the name of the rule where there are several."""
        names = [*assets["classes"], *assets["rules"]]
        return Shown(tokens=tuple(names[number] for number in inputs.tolist()))


def formula(rule: str, delay: int) -> str:
    """A rule in symbols.

    >>> formula("plus", 8), formula("minus", 2)
    ('x_{t-1} + x_{t-8}', 'x_{t-1} - x_{t-2}')
    """
    a, b = RULES[rule]
    return f"{'-' * (a < 0)}x_{{t-1}} {'+' if b > 0 else '-'} x_{{t-{delay}}}"


def continued(states: Tensor, coefficients: Tensor, steps: int, modulus: int) -> Tensor:
    """Sequences (n, τ + steps) that go on from ``states`` (n, τ) with ``coefficients`` (n, 2), (a, b) of each.

    >>> continued(torch.tensor([[1, 0, 2]]), torch.tensor([[1, 1]]), 4, 3)
    tensor([[1, 0, 2, 0, 0, 2, 2]])
    """
    delay = states.shape[1]
    columns = list(states.unbind(dim=1))
    for _ in range(steps):
        # The remainder has the sign of the modulus, so that a negative sum gives a symbol, too.
        columns.append((coefficients[:, 0] * columns[-1] + coefficients[:, 1] * columns[-delay]) % modulus)
    return torch.stack(columns, dim=1)


def split_states(modulus: int, delay: int, wanted: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Initial states (n, τ) for ``"train"``, ``"validation"`` and ``"test"``, no state in two of them.

    Small spaces are cut as a whole, at least one state a part; from large ones states are drawn by ``seed`` until
    each part has as many as are wanted.
    """
    if modulus**delay <= max(2**14, ENUMERATED * sum(wanted.values())):
        ranked = sorted(product(range(modulus), repeat=delay), key=digest)
        held_out = max(len(ranked) // 10, min(len(ranked) // 4, 16))  # of four states one, not none
        parts = {"test": ranked[:held_out], "validation": ranked[held_out:][:held_out], "train": ranked[2 * held_out :]}
    else:
        parts = {"test": [], "validation": [], "train": []}
        for state in drawn(modulus, delay, seed):
            # The digest alone decides the part of a state, whatever was drawn before it.
            share = 10 * digest(state) / 2.0**64
            part = parts["test" if share < 1 else "validation" if share < 2 else "train"]
            part.append(state)
            if all(len(parts[name]) >= n for name, n in wanted.items()):
                break
    return {name: torch.tensor(parts[name][:n]) for name, n in wanted.items()}


def drawn(modulus: int, delay: int, seed: int) -> Iterator[tuple[int, ...]]:
    """States at random, each once, without end: the space must be large."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[tuple[int, ...]] = set()
    while True:
        for state in map(tuple, torch.randint(modulus, (4096, delay), generator=generator).tolist()):
            if state not in seen:
                seen.add(state)
                yield state


def digest(state: Sequence[int]) -> int:
    """The first 64 bits of the SHA-256 of the symbols, a byte each."""
    return int.from_bytes(sha256(bytes(state)).digest()[:8])


def overlap_note(train: Tensor, test: Tensor, delay: int) -> str:
    """How many held-out initial states a model met further along a training sequence."""
    # Each window as one number, a sum with random weights modulo 2^64: two windows agree by chance once in 2^64.
    weights = torch.randint(-(2**62), 2**62, (delay,), generator=torch.Generator().manual_seed(0))
    met = torch.isin(test[:, :delay] @ weights, train.unfold(1, delay, 1) @ weights)
    return (
        f"{100 * met.double().mean():.1f} % of the test sequences begin with τ symbols that occur, further along, in a "
        "training sequence: initial states are held out, not what follows from others"
    )
