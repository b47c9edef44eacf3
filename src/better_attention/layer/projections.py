"""W_Q, W_K, W_V and W_O: linear maps, or the identity where a mechanism does not learn one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from better_attention.errors import check_int
from better_attention.mechanism import PROJECTIONS, Mechanism

from .part import Part


def projection(learned: bool, in_features: int, out_features: int, bias: bool, **factory: Any) -> nn.Module:
    """A linear map with undrawn weights, or the identity, which is called like one.

    The layer draws the weights itself, in torch's order: one seed gives both classes the same ones.
    """
    # An nn.Identity and not None, so that forward(), hooks and tools treat every mechanism alike.
    if not learned:
        return nn.Identity()
    linear: nn.Linear = _Undrawn(in_features, out_features, bias, **factory)
    linear.__class__ = nn.Linear  # an ordinary one from here on: some tools ask for exactly this class
    return linear


class _Undrawn(nn.Linear):
    """A linear map that draws no random numbers when it is built."""

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""


def check_input_width(width: int | None, name: str, letter: str, embed_dim: int, mechanism: Mechanism) -> int:
    """Width of the input that W_K or W_V, given by its letter, is applied to; ``embed_dim`` where ``width`` is None.

    Raises:
        ValueError, TypeError: no whole number; or another width than ``embed_dim`` where nothing projects it.
    """
    if width is None:
        return embed_dim
    width = check_int(width, name)
    # Without the map, heads read slices of the input, which therefore has to be as wide as the model.
    if width != embed_dim and letter not in mechanism.projections:
        raise ValueError(
            f"{name}={width} must equal embed_dim={embed_dim}: mechanism {mechanism.name!r} has no W_{letter.upper()}, "
            "its heads read slices of the input itself. Project the input first, or use a mechanism that learns "
            f"{letter!r}."
        )
    return width


def check_kv_heads(
    num_kv_heads: int | None,
    num_heads: int,
    mechanism: Mechanism,
    names: tuple[str, str] = ("num_kv_heads", "num_heads"),
) -> int:
    """How many query heads share a head of projected keys and values.

    Args:
        num_kv_heads: heads of keys and values; None: as many as queries have.
        num_heads: heads of queries.
        mechanism: what the layer computes.
        names: what the user calls the two numbers.

    Raises:
        ValueError, TypeError: no whole number, or none that divides ``num_heads``; or fewer than those where no keys
            are projected.
    """
    if num_kv_heads is None:
        return 1
    name, of = names
    heads = check_int(num_kv_heads, name)
    if heads > num_heads or num_heads % heads:
        raise ValueError(
            f"{name}={heads} must divide {of}={num_heads}: each head of keys and values serves the same "
            "number of neighbouring query heads."
        )
    if heads != num_heads and "k" not in mechanism.projections:
        raise ValueError(
            f"{name}={heads} groups projected keys, and mechanism {mechanism.name!r} has no W_K: each of its "
            f"{num_heads} heads reads its own slice of the input, of which a cache holds one copy. Leave {name} "
            "out, or use a mechanism that learns 'k'."
        )
    return num_heads // heads


def _part(letter: str) -> Part:
    name, of_head = letter.upper(), "" if letter == "o" else "_i"
    return Part(
        symbol=f"W_{name}",
        module="out_proj" if letter == "o" else f"{letter}_proj",
        stream=letter,
        label=f"Linear  W_{name}",
        legend="Linear: a learned map with a bias, from the right.",
        add=lambda mechanism: replace(mechanism, projections=mechanism.projections | {letter}),
        params=lambda sizes: sizes.width(letter) * (sizes.embed_dim + sizes.bias),
        flops=lambda sizes: 2 * sizes.length * sizes.embed_dim * sizes.width(letter),
        term=lambda factor: f"{factor} W{of_head}^{name}",
        absent="slice",
    )


PROJECTION_PARTS = tuple(_part(letter) for letter in PROJECTIONS)
