"""How each mechanism is drawn: colour, dashes and marker, the same in every figure and in the report.

The hues are Okabe and Ito's, told apart with any kind of colour vision; their lightness is set so that each has a
contrast of at least 3 : 1 against the ground of its theme. The dashes carry the same distinction without colour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from better_attention.mechanism import MECHANISMS

Dashes = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """A line: its colour on a light and on a dark ground, its dashes in line widths (none: solid), its marker."""

    light: str
    dark: str
    dashes: Dashes = ()
    marker: str = ""

    def colour(self, *, dark: bool) -> str:
        """The colour for one of the two grounds."""
        return self.dark if dark else self.light


# In the order of MECHANISMS; strict=True fails at once where a mechanism is added without a look.
_LOOKS = dict(
    zip(
        MECHANISMS,
        (
            Look("#3b3b3b", "#d6d6d6"),
            Look("#0072b2", "#5cb3e6", (5, 2)),
            Look("#008a62", "#2fc597", (2, 1.5)),
            Look("#c75000", "#ff9248"),
            Look("#a8478a", "#dc95c3", (6, 1.5, 1.5, 1.5)),
        ),
        strict=True,
    )
)
_OTHER = Look("#7a6a00", "#cdbb3c", (1, 1))
_MARKERS: dict[tuple[str, ...], str] = {
    (): "",
    ("expressive",): "o",
    ("align",): "^",
    ("per-head",): "s",
    ("identity",): "D",
    ("align", "expressive"): "v",
    ("align", "per-head"): "<",
    ("align", "identity"): ">",
    ("identity", "per-head"): "P",
}
"""What a name adds to the mechanism it varies, sorted -> its marker; "X" for what is not here."""
_DASHES: dict[tuple[str, ...], Dashes] = {
    ("expressive",): (3, 1, 1, 1, 1, 1),
    ("align",): (9, 2),
    ("per-head",): (4, 1.2),
    ("identity",): (1.5, 1.5),
    ("align", "expressive"): (9, 2, 1, 2),
    ("align", "per-head"): (9, 2, 4, 2),
    ("align", "identity"): (9, 2, 1.5, 1.5),
    ("identity", "per-head"): (4, 1.2, 1.5, 1.2),
}
"""Likewise -> its dashes, so that a variant is told from what it varies where no marker is near."""
_MIXED: Dashes = (1, 3)

MARKER_PATHS = {
    "": "",
    "o": "M17 1.6a3.4 3.4 0 1 0 .01 0z",
    "^": "M17 1l3.8 7h-7.6z",
    "v": "M17 9l3.8-7h-7.6z",
    "<": "M13 5l7-3.8v7.6z",
    ">": "M21 5l-7-3.8v7.6z",
    "s": "M14 2h6v6h-6z",
    "D": "M17 .9l4.1 4.1-4.1 4.1-4.1-4.1z",
    "P": "M15.8 1h2.4v2.8H21v2.4h-2.8V9h-2.4V6.2H13V3.8h2.8z",
    "X": "M14.3 1.2L17 3.9l2.7-2.7 1.1 1.1L18.1 5l2.7 2.7-1.1 1.1L17 6.1l-2.7 2.7-1.1-1.1L15.9 5l-2.7-2.7z",
}
"""Marker -> its outline in SVG around (17, 5), for the legends of a page."""

_MODIFIERS = ("align", "expressive", "identity", "per-head")


def look(mechanism: str) -> Look:
    """The look of a mechanism: the colour of the one it varies, with dashes and a marker for what its name adds.

    >>> look("super+expressive").light == look("super").light, look("super+expressive").marker
    (True, 'o')
    >>> look("super+expressive").dashes == look("super").dashes
    False
    """
    base, *modifiers = mechanism.split("+")
    added = tuple(sorted({m for m in modifiers if m in _MODIFIERS}))
    own = _LOOKS.get(base, _OTHER)
    return replace(own, marker=_MARKERS.get(added, "X"), dashes=_DASHES.get(added, _MIXED)) if added else own


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of a ground and of what is written on it."""

    ground: str
    ink: str
    faint: str


LIGHT = Theme(ground="#fffefb", ink="#2b2b29", faint="#d9d7d0")
DARK = Theme(ground="#191a1b", ink="#d8d6d0", faint="#3d3e40")
