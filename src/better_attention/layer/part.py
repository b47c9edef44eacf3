"""What a learned part of a layer says about itself, so that counts, tables, drawings and messages can ask it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from better_attention.mechanism import Mechanism


class Sizes(NamedTuple):
    """The sizes that a part's counts depend on.

    Args:
        embed_dim: model width d.
        num_heads: number of heads h.
        length: number of tokens, and without a window the size of W_A.
        bias: whether maps have biases.
        align_heads: "shared", or "per_head" for one W_A per head.
        window: how many tokens each one sees, at most ``length``, and the size of W_A; None: no window.
        key_heads, value_heads: number of heads of keys, and of values; None: ``num_heads``.
    """

    embed_dim: int
    num_heads: int
    length: int
    bias: bool = True
    align_heads: str = "shared"
    window: int | None = None
    key_heads: int | None = None
    value_heads: int | None = None

    def width(self, letter: str) -> int:
        """Features of all heads together of queries, keys, values or output, ``"q"``, ``"k"``, ``"v"`` or ``"o"``.

        >>> Sizes(8, 4, 5, key_heads=1).width("k")
        2
        """
        heads = {"k": self.key_heads, "v": self.value_heads}.get(letter)
        return self.embed_dim if heads is None else self.embed_dim * heads // self.num_heads

    @property
    def align_size(self) -> int:
        """Rows and columns of W_A."""
        return self.length if self.window is None else self.window

    @property
    def seen(self) -> list[int]:
        """How many keys each query sees: all, or those of its window, of which the first ones have fewer.

        >>> Sizes(8, 2, 5, window=3).seen
        [1, 2, 3, 3, 3]
        """
        if self.window is None:
            return [self.length] * self.length
        return [min(place, self.window) for place in range(1, self.length + 1)]


@dataclass(frozen=True, slots=True)
class Part:
    """One learned linear map of a layer.

    Args:
        symbol: the paper's name, as in ``"W_Q"``.
        module: name of the sub-module of :class:`better_attention.MultiheadAttention` that computes it.
        stream: what it acts on: ``"q"``, ``"k"``, ``"v"``, or ``"o"`` for the joined heads.
        label: the text of its block in drawings, at most 13 characters.
        legend: what that text means.
        add: ``mechanism`` with this part.
        params: number of parameters.
        flops: floating-point operations of a forward pass over one sequence, a multiply-add counted as two.
        term: its product with a factor, as in ``"V"`` to ``"V W_i^V"``.
        absent: what tables say of a mechanism that does not have it.
    """

    symbol: str
    module: str
    stream: str
    label: str
    legend: str
    add: Callable[[Mechanism], Mechanism]
    params: Callable[[Sizes], int]
    flops: Callable[[Sizes], int]
    term: Callable[[str], str]
    absent: str = ""

    def is_in(self, mechanism: Mechanism) -> bool:
        """Whether ``mechanism`` has this part."""
        return self.add(mechanism) == mechanism
