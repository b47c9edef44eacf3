"""The learned parts that a layer can have: one row each, in the order of every table."""

from __future__ import annotations

from collections.abc import Iterable

from better_attention.mechanism import Mechanism

from .alignment import ALIGNMENT_PART
from .part import Part
from .projections import PROJECTION_PARTS

PARTS: tuple[Part, ...] = (*PROJECTION_PARTS, ALIGNMENT_PART)


def parts_of(mechanism: Mechanism) -> list[Part]:
    """The parts that ``mechanism`` learns.

    >>> [part.symbol for part in parts_of(Mechanism.of("super"))]
    ['W_Q', 'W_O', 'W_A']
    """
    return [part for part in PARTS if part.is_in(mechanism)]


def mechanism_with(parts: Iterable[Part]) -> Mechanism:
    """The mechanism that learns exactly these parts, with the usual score."""
    mechanism = Mechanism(frozenset())
    for part in parts:
        mechanism = part.add(mechanism)
    return mechanism
