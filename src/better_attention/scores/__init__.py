"""Scores by name, one file each: what code, the command line and the tests read.

A new score is a file here and a row of the table below. Implementations that do not know it refuse it by name until
they are taught; ``reference`` computes every row, and so does ``chunked`` where the score has ``tiles``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from .expressive import EXPRESSIVE
from .score import Score, Tiles
from .softmax import SOFTMAX

__all__ = ["DEFAULT_SCORE", "SCORES", "Score", "Tiles", "registered"]

DEFAULT_SCORE = SOFTMAX.name
"""The score of a mechanism whose name does not say otherwise. It is that of PyTorch's own attention, too."""

# Written to by registered() alone; everybody else reads it through the proxy.
_rows = {score.name: score for score in (SOFTMAX, EXPRESSIVE)}

SCORES: Mapping[str, Score] = MappingProxyType(_rows)
"""Every score by its name, the default first."""


@contextmanager
def registered(score: Score) -> Iterator[Score]:
    """Have one score more while the context lasts, for experiments and tests.

    Args:
        score: a row for :data:`SCORES`.

    Raises:
        ValueError: there is a score of that name.

    >>> import torch
    >>> def squared_relu(q, k, bias, hide):
    ...     a = (q @ k.transpose(-1, -2)).relu().square()
    ...     return a / a.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    >>> equation = "S_i = relu({z})^2, each row divided by its sum"
    >>> row = Score("squared-relu", "Squared ReLU", (equation,), "none", True, squared_relu)
    >>> from better_attention import attention
    >>> x = torch.ones(1, 2, 5, 8)
    >>> with registered(row):
    ...     attention(x, x, x, score="squared-relu").shape
    torch.Size([1, 2, 5, 8])
    """
    if score.name in _rows:
        raise ValueError(f"there is a score {score.name!r} already: choose another name than {', '.join(_rows)}.")
    _rows[score.name] = score
    try:
        yield score
    finally:
        del _rows[score.name]
