"""Running text as numbers and back, without loss: characters, or byte-pair encoding learned from the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, Self

from better_attention.errors import check_int
from better_attention.lab.data.samples import DataError

UNKNOWN = 0
UNKNOWN_SIGN = "\N{REPLACEMENT CHARACTER}"
BYTES = 256
"""Tokens that byte-pair encoding begins with: one for each byte, so that no text is unknown."""


class Tokeniser(Protocol):
    """Text as numbers 0 ... len - 1, and numbers as text."""

    def __len__(self) -> int:
        """How many different tokens there are."""

    def encode(self, text: str, *, strict: bool = False) -> list[int]:
        """The tokens of ``text``; with ``strict``, a character without one is an error (ValueError)."""

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of ``tokens`` in UTF-8; of a part of a text it may begin or end within a character."""

    def shown(self, token: int) -> str:
        """One token for a reader; a line end is a sign."""

    @property
    def never(self) -> tuple[int, ...]:
        """Tokens that no text is to hold."""

    def assets(self) -> Mapping[str, Any]:
        """Plain JSON values from which :func:`tokeniser_of` makes it again."""


class Characters:
    """A token a character; token 0 stands for every character that is not among them.

    Args:
        symbols: the characters of the tokens 1, 2, ...

    Raises:
        DataError: a symbol that is no single character, or occurs twice.
    """

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        if not all(isinstance(one, str) and len(one) == 1 for one in self.symbols):
            raise DataError("the symbols of a vocabulary of characters must be single characters.")
        if len(set(self.symbols)) != len(self.symbols):
            raise DataError("a character occurs twice in a vocabulary of characters.")
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols, start=UNKNOWN + 1)}

    @classmethod
    def learn(cls, text: str, size: int) -> Self:
        """The characters of ``text``, in the order of Unicode; of more than ``size`` - 1 the most frequent ones.

        Raises:
            ValueError: ``size`` leaves no room for a character.
        """
        counts = Counter(text)
        most = sorted(counts, key=lambda one: (-counts[one], one))[: check_int(size, "size", at_least=2) - 1]
        return cls(sorted(most))

    def __len__(self) -> int:
        return len(self.symbols) + 1

    def encode(self, text: str, *, strict: bool = False) -> list[int]:
        """See :class:`Tokeniser`."""
        unknown = dict.fromkeys(one for one in text if one not in self._numbers) if strict else ()
        if unknown:
            listed = ", ".join(f"{one!r} (U+{ord(one):04X})" for one in list(unknown)[:10])
            raise ValueError(
                f"the model has no token for {listed}: its vocabulary is the {len(self.symbols)} characters of the "
                "text that it was trained on. Leave these out."
            )
        return [self._numbers.get(one, UNKNOWN) for one in text]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """See :class:`Tokeniser`."""
        return "".join(self.symbols[token - 1] if token else UNKNOWN_SIGN for token in tokens).encode()

    def shown(self, token: int) -> str:
        """See :class:`Tokeniser`."""
        return "?" if token == UNKNOWN else visible(self.symbols[token - 1])

    @property
    def never(self) -> tuple[int, ...]:
        """See :class:`Tokeniser`."""
        return (UNKNOWN,)

    def assets(self) -> Mapping[str, Any]:
        """See :class:`Tokeniser`."""
        return {"tokeniser": "characters", "symbols": list(self.symbols)}


class BytePairs:
    """Byte-pair encoding over UTF-8 bytes, as in GPT-2: nothing is unknown, and decoding gives the text back.

    It computes with the package ``tokenizers``. A token is a sequence of bytes: the 256 bytes first, then the result of
    each merge, in the order in which they were learned.

    Args:
        merges: pairs of tokens, in the spelling of ``tokenizers``, where a printable character stands for each byte.

    Raises:
        DataError: a merge that is no pair of tokens known before it.
        ImportError: the package is missing.
    """

    def __init__(self, merges: Sequence[Sequence[str]]) -> None:
        self.merges = [tuple(pair) for pair in merges]
        vocabulary = {one: number for number, one in enumerate(sorted(_byte_level().ByteLevel.alphabet()))}
        for pair in self.merges:
            if len(pair) != 2 or not all(isinstance(one, str) and one in vocabulary for one in pair):
                raise DataError(f"{pair!r} is no pair of tokens that an earlier merge made.")
            # Two different pairs can make the same token.
            vocabulary.setdefault("".join(pair), len(vocabulary))
        self._names = list(vocabulary)
        self._vocabulary = vocabulary

    @classmethod
    def learn(cls, text: str, size: int) -> Self:
        """Merges of the most frequent pairs in ``text``, until there are ``size`` tokens or nothing is left to merge.

        Raises:
            ValueError: ``size`` is below 256: each byte has a token.
            ImportError: the package ``tokenizers`` is missing.
        """
        import json

        size = check_int(size, "size", at_least=BYTES)
        trainers = _tokenizers().trainers
        tokenizer = _empty(_tokenizers().models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=sorted(_byte_level().ByteLevel.alphabet()), show_progress=False
        )
        tokenizer.train_from_iterator([text], trainer)
        return cls(json.loads(tokenizer.to_str())["model"]["merges"])

    def fast(self) -> Any:
        """The same as a ``tokenizers.Tokenizer``, a new one each time."""
        return _empty(_tokenizers().models.BPE(vocab=self._vocabulary, merges=self.merges))

    @cached_property
    def _tokenizer(self) -> Any:
        return self.fast()

    def __len__(self) -> int:
        return len(self._names)

    def encode(self, text: str, *, strict: bool = False) -> list[int]:
        """See :class:`Tokeniser`; every character has tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """See :class:`Tokeniser`."""
        return b"".join(self._bytes[token] for token in tokens)

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of every token."""
        values = byte_signs()
        return [bytes(values[sign] for sign in name) for name in self._names]

    def shown(self, token: int) -> str:
        """See :class:`Tokeniser`."""
        return visible(self._bytes[token].decode(errors="replace"))

    @property
    def never(self) -> tuple[int, ...]:
        """See :class:`Tokeniser`: any byte may be generated."""
        return ()

    def assets(self) -> Mapping[str, Any]:
        """See :class:`Tokeniser`."""
        return {"tokeniser": "bpe", "merges": [list(pair) for pair in self.merges]}


LEARN: Mapping[str, Callable[[str, int], Tokeniser]] = {"characters": Characters.learn, "bpe": BytePairs.learn}
"""Name of a kind of tokeniser -> function from a text and the most tokens to one."""


def tokeniser_of(assets: Mapping[str, Any]) -> Tokeniser:
    """The tokeniser whose :meth:`Tokeniser.assets` these are, other entries beside them.

    Raises:
        DataError: they are of none.
    """
    match assets:
        case {"tokeniser": "characters", "symbols": list(symbols)}:
            return Characters(symbols)
        case {"tokeniser": "bpe", "merges": list(merges)}:
            return BytePairs(merges)
    raise DataError(f"no tokeniser is described by the entries {', '.join(map(repr, list(assets)[:10]))}.")


def visible(text: str) -> str:
    """``text`` with signs for line ends and tabs, which a table would swallow.

    >>> visible("to\\n")
    'to↵'
    """
    return text.replace("\n", "↵").replace("\t", "⇥")


def byte_signs() -> dict[str, int]:
    """Which byte each printable character stands for in GPT-2's spelling.

    Printable bytes of Latin-1 stand for themselves, the others in their order for the characters from U+0100.

    >>> signs = byte_signs()
    >>> signs["a"], signs["Ġ"], signs["Ċ"], len(signs)
    (97, 32, 10, 256)
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise ImportError(
            'byte-pair encoding needs the package tokenizers: pip install "better-attention[bpe]". Characters need '
            "nothing: `--set tokeniser=characters`."
        ) from None
    return tokenizers


def _byte_level() -> Any:
    return _tokenizers().pre_tokenizers


def _empty(model: Any) -> Any:
    """A tokenizer around ``model`` that cuts a text as GPT-2's does, without loss."""
    tokenizer = _tokenizers().Tokenizer(model)
    tokenizer.pre_tokenizer = _byte_level().ByteLevel(add_prefix_space=False)
    return tokenizer
