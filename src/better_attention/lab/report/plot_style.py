"""The means of every drawing: our style on top of matplotlib's own, and equal files for equal numbers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from better_attention.lab.report.style import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    # Letters as outlines: the drawing looks the same where the font is not installed.
    "svg.fonttype": "path",
    "svg.hashsalt": "better-attention",  # equal figures are equal files
    "mathtext.fontset": "dejavusans",
}


@contextmanager
def style() -> Iterator[None]:
    """Our settings on top of matplotlib's own, whatever the user's are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


SIGNATURE = "better-attention"
"""Who made a picture that stands alone, within it: what may be drawn over."""


def saved(figure: Figure, kind: str, *, transparent: bool = False, signed: bool = False) -> bytes:
    """The bytes of ``figure`` as ``kind``: png, svg or pdf; ``signed``: they say that better-attention made them."""
    buffer = io.BytesIO()
    # Without date and creator: the same numbers give the same file, and no address stands in it.
    dated = {"svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate", "Creator", "Producer")}
    # None makes matplotlib leave an entry out, which it would otherwise fill in itself.
    metadata: dict[str, str | None] = dict.fromkeys(dated.get(kind, ("Software",)))
    if signed:
        metadata["Software" if kind == "png" else "Creator"] = SIGNATURE
    figure.savefig(buffer, format=kind, dpi=200, metadata=metadata, transparent=transparent)
    return buffer.getvalue()


def blank(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot and its global state stay out of it
    return figure


def line(drawn: Look, *, dark: bool, width: float) -> dict[str, Any]:
    """What matplotlib's ``plot`` takes to draw a line with this look."""
    # A fraction of the diagonal and not a number of points: the distance of markers does not depend on the epochs.
    marked: dict[str, Any] = {"marker": drawn.marker, "markersize": 4, "markevery": 0.1} if drawn.marker else {}
    return {
        "color": drawn.colour(dark=dark),
        "linestyle": (0, drawn.dashes) if drawn.dashes else "solid",
        "linewidth": width,
        **marked,
    }


def bare(axes: Axes, ink: str, faint: str) -> None:
    """Axes with as little ink as carries the numbers: no box, faint horizontal lines."""
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(ink)
    axes.grid(axis="y", color=faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=ink, labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
