"""What a comparison compares: a mechanism, and how its alignment kernel is laid out and started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from better_attention.layer.projections import check_kv_heads
from better_attention.mechanism import MECHANISMS, Mechanism

_OPTIONS: Mapping[str, tuple[str, str]] = {
    "per-head": ("align_heads", "per_head"),
    "identity": ("align_init", "identity"),
}
"""Suffix on the command line -> argument of the layer and its value."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a comparison.

    Args:
        mechanism: what the attention layers compute.
        per_head: one W_A for each head instead of one for all; the paper's named generalisation
            (arXiv 2403.01643, section 3.4).
        identity: W_A starts as the identity instead of Glorot uniform, so that super starts as efficient.

    Raises:
        ValueError: a layout of W_A for a mechanism that has none.

    >>> Variant.of("super+per-head").options
    {'align_heads': 'per_head'}
    """

    mechanism: Mechanism
    per_head: bool = False
    identity: bool = False

    def __post_init__(self) -> None:
        if (self.per_head or self.identity) and not self.mechanism.aligned:
            raise ValueError(
                f"{self.name!r}: mechanism {self.mechanism.name!r} has no W_A to lay out. "
                "Take 'super', or add +align, as in 'standard+align+per-head'."
            )

    @classmethod
    def of(cls, value: str | Mechanism | Variant) -> Variant:
        """The variant that ``value`` names: a mechanism's name, then ``+per-head`` and/or ``+identity``.

        Raises:
            ValueError: an unknown name.

        >>> Variant.of("super+identity").name
        'super+identity'
        >>> Variant.of("standard+align").mechanism.aligned
        True
        """
        if isinstance(value, Variant):
            return value
        if isinstance(value, Mechanism):
            return cls(value)
        base, *suffixes = value.split("+")
        try:
            mechanism = Mechanism.of("+".join([base, *(s for s in suffixes if s not in _OPTIONS)]))
        except ValueError as error:
            raise ValueError(f"{error} A mechanism with W_A also takes +per-head and +identity.") from None
        return cls(mechanism, per_head="per-head" in suffixes, identity="identity" in suffixes)

    @property
    def name(self) -> str:
        """The name that :meth:`of` turns back into this variant."""
        return self.mechanism.name + "+per-head" * self.per_head + "+identity" * self.identity

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :class:`~better_attention.MultiheadAttention` beside the mechanism."""
        chosen = {"per-head": self.per_head, "identity": self.identity}
        return dict(_OPTIONS[suffix] for suffix, wanted in chosen.items() if wanted)

    @property
    def projects_keys(self) -> bool:
        """Whether keys are projected, so that their heads can be grouped."""
        return "k" in self.mechanism.projections

    def kv_heads(self, wanted: int | None, heads: int, names: tuple[str, str] = ("kv_heads", "heads")) -> int | None:
        """``wanted`` heads of keys and values where this variant projects keys; None where it has none to group.

        Args:
            wanted: of a whole comparison; None: as many as ``heads``.
            heads: heads of queries.
            names: what the user calls the two numbers.

        Raises:
            ValueError: they do not divide ``heads``; for variants that project no keys too, so that all refuse alike.

        >>> Variant.of("standard").kv_heads(2, 4), Variant.of("efficient").kv_heads(2, 4)
        (2, None)
        """
        check_kv_heads(wanted, heads, MECHANISMS["standard"], names)
        return wanted if self.projects_keys else None
