"""Words in messages and tables."""

from __future__ import annotations


def plural(number: int, word: str) -> str:
    """A number and its word.

    >>> plural(1, "run"), plural(1200, "pair")
    ('1 run', '1,200 pairs')
    """
    return f"{number:,} {word}{'s' * (number != 1)}"
