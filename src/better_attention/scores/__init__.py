"""Scores by name, one file each: what code, the command line and the tests read.

A new score is a file here and a row of the table below. Implementations that do not know it refuse it by name until
they are taught; ``reference`` computes every row, and so does ``chunked`` where the score has ``tiles``.

The names are known without torch (``better_attention.keras`` runs without it); the rows are imported with ``SCORES``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .score import Score as Score
    from .score import Tiles as Tiles

    SCORES: Mapping[str, Score]
    """Every score by its name, the default first."""

__all__ = ["DEFAULT_SCORE", "SCORES", "Score", "Tiles", "registered", "score_names"]

_FILES = ("softmax", "expressive")
"""The table: every score by its file here, which holds the row under the same name in capitals; the default first."""

DEFAULT_SCORE = _FILES[0]
"""The score of a mechanism whose name does not say otherwise. It is that of PyTorch's own attention, too."""

_rows: dict[str, Score] = {}  # written to below alone; everybody else reads it through the proxy


def score_names() -> tuple[str, ...]:
    """The names of all scores, the default first. Needs no torch."""
    return tuple(_rows) or _FILES


def __getattr__(name: str) -> Any:
    if name in ("Score", "Tiles"):
        return getattr(import_module(f"{__name__}.score"), name)
    if name != "SCORES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for file in _FILES:
        _rows[file] = getattr(import_module(f"{__name__}.{file}"), file.upper())
    globals()[name] = MappingProxyType(_rows)
    return globals()[name]


@contextmanager
def registered(score: Score) -> Iterator[Score]:
    """Have one score more while the context lasts, for experiments and tests.

    Args:
        score: a row for :data:`SCORES`.

    Raises:
        ValueError: there is a score of that name.

    >>> import torch
    >>> from better_attention.scores import Score
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
    from . import SCORES  # fills the table, where nobody has asked for it yet

    if score.name in SCORES:
        raise ValueError(f"there is a score {score.name!r} already: choose another name than {', '.join(SCORES)}.")
    _rows[score.name] = score
    try:
        yield score
    finally:
        del _rows[score.name]
