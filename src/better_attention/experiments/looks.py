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
_MARKERS = {"expressive": "o", "align": "^"}


def look(mechanism: str) -> Look:
    """The look of a mechanism: that of the one it varies, with a marker for ``+expressive`` or ``+align``.

    >>> look("super+expressive").light == look("super").light, look("super+expressive").marker
    (True, 'o')
    """
    base, *modifiers = mechanism.split("+")
    marker = next((_MARKERS[m] for m in modifiers if m in _MARKERS), "")
    return replace(_LOOKS.get(base, _OTHER), marker=marker)


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of a ground and of what is written on it."""

    ground: str
    ink: str
    faint: str


LIGHT = Theme(ground="#fffefb", ink="#2b2b29", faint="#d9d7d0")
DARK = Theme(ground="#191a1b", ink="#d8d6d0", faint="#3d3e40")
