"""What a score is: how it makes weights of queries and keys, in two forms that share no code, and what it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Slices = tuple[slice, ...]
"""The part of a (B, N, length, width) tensor that a tile reads."""


class Tiles(Protocol):
    """A score computed tile by tile: one object per call, one method call per tile.

    Weights are ``a / total``, where ``total`` sums ``a`` over the keys of a row. Then
    ``dL/dz = slope * (dL/dw - sum(w * dL/dw))``, with ``slope = a' / total``, whatever the score.

    Args:
        q_BNLH: all queries, times scale, contiguous.
        k_BNSH: all keys, contiguous.
    """

    def __init__(self, q_BNLH: Tensor, k_BNSH: Tensor) -> None: ...

    @property
    def q(self) -> Tensor:
        """All queries in the units in which :meth:`slopes` measures them."""

    @property
    def k(self) -> Tensor:
        """All keys in the units in which :meth:`slopes` measures them."""

    def weights(
        self, rows: Slices, keys: Slices, bias: Tensor | None, hide: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``a`` of a tile, and ``total`` as a column, infinite in a row without weight; None: already divided."""

    def slopes(self, rows: Slices, keys: Slices, bias: Tensor | None, hide: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalised weights of a tile, and the slope towards the products of ``q`` and ``k``."""

    def gradients(self, dq_BNLH: Tensor, dk_BNSH: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients towards ``q`` and ``k`` as gradients towards the tensors this was made with."""


@dataclass(frozen=True, slots=True)
class Score:
    """One way to make attention weights from queries and keys, its normaliser included.

    Args:
        name: as ``Mechanism.score``, as the argument ``score`` and behind a plus sign in a mechanism's name.
        label: in drawings and tables, at most 13 characters.
        equations: one line each, ``{z}`` standing for the scaled product of queries and keys.
        source: the paper that defines it.
        lowest_hides: whether a float mask hides a key not only where it is -inf, but also at its dtype's lowest
            number, which several libraries write for padding.
        weights: the reference form, ``(q_BNLH * scale, k_BNSH, bias, hide) -> weights_BNLS``, differentiable by
            autograd in any order. ``bias`` is added to the log weights, ``hide`` is True where a key is hidden; both
            broadcast to (B, N, L, S) and may be None. A row with every key hidden has weights 0.
        tiles: the tiled form for ``impl="chunked"``; None where there is none.
    """

    name: str
    label: str
    equations: tuple[str, ...]
    source: str
    lowest_hides: bool
    weights: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    tiles: type[Tiles] | None = None

    def hides(self, mask: Tensor) -> Tensor:
        """Where a mask hides a key altogether (bool, True = hidden).

        A bias is added in log-weight space. An exponential drowns a very negative finite one among the others, as in
        torch; a score without an exponential cannot, and has ``lowest_hides``.
        """
        if mask.dtype == torch.bool:
            return ~mask
        return mask <= self.hiding(mask.dtype)

    def hiding(self, dtype: torch.dtype) -> float:
        """The number at and below which a float mask that came in ``dtype`` hides a key altogether."""
        # The lowest number of the dtype in which the mask came: in a wider one it is an ordinary number.
        return torch.finfo(dtype).min if self.lowest_hides else -torch.inf
