"""Words as numbers: a vocabulary by frequency, and the fixed-length rows a text classifier reads."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from better_attention.errors import check_int

from .samples import DataError, Int64

PADDING, UNKNOWN = 0, 1  # the words follow
_RESERVED = 2
_WORD = re.compile(r"\w+(?:'\w+)*")  # of ASCII text; see _word() for any other
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180b-\u180f\u200e\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
"""Soft hyphens, directions, variation selectors: they change how a word is set, not which word it is."""


def tokens(text: str) -> list[str]:
    """The words of a text: lower-case, apostrophes within a word kept, ``<br />`` and punctuation dropped.

    A word is a run of letters, digits and underscores with their combining marks (vowel signs, points, accents), also
    across a zero-width joiner or non-joiner, as in Unicode's UAX #29. Composed and decomposed spellings (NFC and NFD)
    are the same word. Scripts without spaces between words, such as Thai and Chinese, are not segmented.

    >>> tokens("It isn't.<br /><br />GREAT (2/10)")
    ['it', "isn't", 'great', '2', '10']
    >>> tokens("मील, मेल")
    ['मील', 'मेल']
    """
    # With either apostrophe it is one word.
    plain = text.lower().replace("<br />", " ").replace("’", "'")
    # ASCII text has no combining marks and a single normal form, so the simple pattern suffices.
    if plain.isascii():
        return _WORD.findall(plain)
    return _word().findall(unicodedata.normalize("NFC", _INVISIBLE.sub("", plain)))


@cache
def _word() -> re.Pattern[str]:
    """A word of any script: :data:`_WORD` whose letters carry marks, which Python's ``\\w`` leaves out."""
    # Combining marks begin at U+0300.
    marks = "".join(
        chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me")
    )
    run = rf"\w[\w{marks}]*(?:[\u200c\u200d]+[\w{marks}]+)*"  # zero-width (non-)joiner, as in Persian and Bengali
    return re.compile(rf"{run}(?:['\u05f3\u05f4]{run})*")  # Hebrew's geresh and gershayim


class Vocabulary:
    """Words and their numbers: 0 is padding, 1 an unknown word, then the words by falling frequency.

    Args:
        words: the words, most frequent first; word ``i`` gets the number ``i + 2``.

    Raises:
        DataError: a word occurs twice, or is empty.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        if not all(isinstance(word, str) and word for word in self._words):
            raise DataError("the words of a vocabulary must be texts that are not empty.")
        self._numbers = {word: number for number, word in enumerate(self._words, start=_RESERVED)}
        if len(self._numbers) != len(self._words):
            twice = next(word for word, count in Counter(self._words).items() if count > 1)
            raise DataError(f"the word {twice!r} occurs twice in the vocabulary; each word needs its own number.")

    @classmethod
    def build(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """The vocabulary of ``texts``; words of equal frequency are in alphabetical order.

        Args:
            texts: training texts (those of the test split must not choose the words).
            size: the most numbers to give out, padding and unknown included: the rows of the embedding table.

        Raises:
            DataError: no word in any text.
            ValueError: ``size`` leaves no room for a word.
        """
        size = check_int(size, "size", at_least=_RESERVED + 1)
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(tokens(text))
        if not counts:
            raise DataError("there is no word in these texts; a vocabulary needs at least one.")
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([word for word, _ in ranked[: size - _RESERVED]])

    def encode(self, texts: Sequence[str], length: int) -> Int64:
        """The **last** ``length`` words of each text as numbers, padded on the **left** with 0.

        Args:
            texts: ``N`` texts.
            length: words per row.

        Returns:
            int64 ``(N, length)``. (Keras' ``pad_sequences`` does the same by default; arXiv 2403.01643 used it.)
        """
        length = check_int(length, "length")
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            numbers = [self._numbers.get(word, UNKNOWN) for word in _last_tokens(text, length)]
            if numbers:
                row[-len(numbers) :] = numbers
        return rows

    @staticmethod
    def tokens(text: str) -> list[str]:
        """The words of ``text`` as :meth:`encode` sees them; see :func:`tokens`."""
        return tokens(text)

    @property
    def words(self) -> tuple[str, ...]:
        """The words, most frequent first."""
        return self._words

    def __len__(self) -> int:
        """How many numbers there are, padding and unknown included."""
        return len(self._words) + _RESERVED

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._words == other._words

    def __hash__(self) -> int:
        return hash(self._words)


def _last_tokens(text: str, count: int) -> list[str]:
    """The same as ``tokens(text)[-count:]``, without reading a long text to its beginning.

    The text may be cut at any white space: no word contains one, and neither half of a cut ``<br />`` holds a word
    that the whole would not.
    """
    # Eight characters per word suffice for most texts; otherwise the reach is doubled.
    reach = 8 * count
    while reach < len(text):
        cut = text.find(" ", len(text) - reach)
        last = tokens(text[cut:]) if cut >= 0 else []
        if len(last) >= count:
            return last[-count:]
        reach *= 2
    return tokens(text)[-count:]
