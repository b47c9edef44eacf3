"""Texts continued by a language model: prompts in, pieces of text out as they come, until something ends them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from better_attention.errors import check_int, describe
from better_attention.lab.data.tokenisers import Tokeniser
from better_attention.lab.generation.decoder import Decoder
from better_attention.lab.generation.sampling import Sampling
from better_attention.lab.models.language_model import LanguageModel

BATCH = 32
"""Prompts that are continued together."""

Emit = Callable[[int, str], None]
"""Called with the number of a prompt and the next piece of its text."""


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one prompt.

    Args:
        prompt: the text that was continued.
        text: what the model wrote behind it, without the stop string.
        tokens: how many tokens it generated.
        ended: ``"stop"``, a stop string came; ``"max_tokens"``, that many were asked for; ``"length"``, the model reads
            no more.
    """

    prompt: str
    text: str
    tokens: int
    ended: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How texts are continued.

    Args:
        sampling: how tokens are chosen.
        max_tokens: most tokens of one text.
        stop: texts that end what is written; none of them is part of it.
        seed: of the random numbers; prompt n draws those of (``seed``, n), whatever other prompts there are.

    Raises:
        TypeError, ValueError: a number out of range, a stop string that is empty or not in a tuple.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 200
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_int(self.max_tokens, "max_tokens")
        check_int(self.seed, "seed", at_least=0)
        # A text is a sequence of texts too: each of its letters would end what is written.
        if not isinstance(self.stop, tuple | list) or not all(isinstance(one, str) for one in self.stop):
            raise TypeError(f"stop must be a tuple of texts, such as ('.',); received {describe(self.stop)}.")
        if not all(self.stop):
            raise ValueError("a stop string is empty: it would end every text before its first character.")


class Stream:
    """Bytes as they come, as text that can be shown: whole characters, and nothing that a stop string may begin.

    Args:
        stop: texts that end the stream.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop, self.stopped = tuple(stop), False
        # A sampled sequence of bytes need not be UTF-8.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, data: bytes, *, last: bool = False) -> str:
        """The next piece of text; ``last``: nothing follows ``data``."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, final=last)
        ends = [at for one in self.stop if (at := text.find(one)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if last else max((_overlap(text, one) for one in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``, though not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def write(
    model: LanguageModel,
    tokeniser: Tokeniser,
    prompts: Sequence[str],
    settings: Settings,
    emit: Emit = lambda number, piece: None,
) -> list[Written]:
    """Continue ``prompts``; several at a time, each as it would be alone.

    Args:
        model: in eval mode.
        tokeniser: the one that the model was trained with.
        prompts: texts of at least one character.
        settings: how.
        emit: called with each piece of text as soon as it is certain.

    Raises:
        ValueError: an empty prompt, one with a character that the model does not know, or one that is too long; logits
            that leave no token to choose, see :meth:`Decoder.step`.
    """
    tokens = [_encoded(tokeniser, prompt, n) for n, prompt in enumerate(prompts)]
    _check_lengths(model, prompts, tokens)
    done: dict[int, Written] = {}
    for group in _groups(model, tokens):
        decoder = Decoder(
            model,
            [tokens[n] for n in group],
            settings.sampling,
            seed=settings.seed,
            never=tokeniser.never,
            numbers=group,
        )
        for place, written in _continue(decoder, tokeniser, [prompts[n] for n in group], settings, group, emit):
            done[group[place]] = written
    return [done[n] for n in range(len(prompts))]


def _continue(
    decoder: Decoder, tokeniser: Tokeniser, prompts: Sequence[str], settings: Settings, group: Sequence[int], emit: Emit
) -> Iterator[tuple[int, Written]]:
    """Each prompt of a group, by its place there, and what became of it, in the order in which they end."""
    streams = [Stream(settings.stop) for _ in prompts]
    texts = [""] * len(prompts)
    for count in range(1, settings.max_tokens + 1):
        found = decoder.step()
        full = decoder.full
        ended = []
        for place, token in found.items():
            over = place in full or count == settings.max_tokens
            piece = streams[place].feed(tokeniser.decode([token]), last=over)
            texts[place] += piece
            if piece:
                emit(group[place], piece)
            if over or streams[place].stopped:
                reason = "stop" if streams[place].stopped else "length" if count < settings.max_tokens else "max_tokens"
                ended.append(place)
                yield place, Written(prompts[place], texts[place], count, reason)
        decoder.end(ended)
        if not decoder.rows:
            return


def _groups(model: LanguageModel, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts that are continued together, by their numbers: of one length where padding is not possible."""
    lots: dict[int, list[int]] = {}
    for n, one in enumerate(tokens):
        lots.setdefault(len(one) if model.places_matter else 0, []).append(n)
    return [lot[start : start + BATCH] for lot in lots.values() for start in range(0, len(lot), BATCH)]


def _encoded(tokeniser: Tokeniser, prompt: str, number: int) -> list[int]:
    if not prompt:
        raise ValueError(f"prompt {number + 1} is empty: there is nothing to continue. Write at least one character.")
    try:
        return tokeniser.encode(prompt, strict=True)
    except ValueError as error:
        raise ValueError(f"prompt {number + 1}: {error}") from None


def _check_lengths(model: LanguageModel, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    """Refuse a prompt that is too long before any is continued."""
    for number, one in enumerate(tokens, start=1):
        if model.longest is not None and len(one) > model.longest:
            raise ValueError(
                f"prompt {number} has {len(one):,} tokens, and this model reads at most {model.longest:,}. Shorten it, "
                f"or train a model {model.unbounded}."
            )
