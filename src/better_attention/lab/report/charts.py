"""The drawings of a report, as SVG for light or dark pages: learning curves, results over heads, weights by angle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from better_attention.lab.analysis.estimates import Estimate
from better_attention.lab.report.plot_style import bare, blank, line, saved, style
from better_attention.lab.report.style import DARK, LIGHT, Look, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[Sequence[float], Sequence[float]]
"""Epochs and values of one seed."""


def learning_curves(runs: Mapping[str, Sequence[Series]], *, dark: bool, falling: bool = True) -> bytes:
    """One panel of a report as SVG: one line per mechanism, the mean over its seeds, in a band from least to greatest.

    The mean stops at the last epoch that every seed reached; from there each seed has its own thin line, since a mean
    over ever fewer seeds jumps. A single epoch is a dot a mechanism, side by side, with a line from least to greatest.

    Args:
        runs: name of a mechanism -> its seeds. The names choose the looks and are not drawn.
        dark: for a dark ground.
        falling: a loss, whose late differences a logarithmic axis shows where it falls over more than a factor of four.
    """
    theme = DARK if dark else LIGHT
    with style():
        figure = blank(4.6, 2.9)
        axes = figure.add_subplot()
        single = all(len(x) == 1 for seeds in runs.values() for x, _ in seeds)
        for place, (name, seeds) in enumerate(runs.items()):
            if single:
                _plot_dot(axes, look(name), place, [y[0] for _, y in seeds], dark=dark)
            else:
                _plot_seeds(axes, look(name), [(np.asarray(x), np.asarray(y, float)) for x, y in seeds], dark=dark)
        if falling:
            _scale_losses(axes)
        axes.set_xlabel("after one epoch" if single else "epoch")
        if single:
            axes.set_xlim(-1, len(runs))
            axes.set_xticks([])
        else:
            axes.margins(x=0.02)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        bare(axes, theme.ink, theme.faint)
        return saved(figure, "svg", transparent=True)


def _scale_losses(axes: Axes) -> None:
    """A logarithmic axis where the values fall over more than a factor of four: late differences show, too."""
    low, high = axes.dataLim.intervaly
    # A logarithmic axis needs values above zero, and a loss can be zero.
    if 0 < 4 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())


def _plot_seeds(axes: Axes, drawn: Look, seeds: list[tuple[NDArray[np.float64], ...]], *, dark: bool) -> None:
    shared = min(len(x) for x, _ in seeds)
    epochs = seeds[0][0][:shared]
    values = np.stack([y[:shared] for _, y in seeds])
    style = line(drawn, dark=dark, width=1.8)
    if len(seeds) > 1:
        colour = to_rgba(drawn.colour(dark=dark), 0.16)
        axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, linewidth=0)
        for x, y in seeds:
            # From the last shared epoch on, so that no gap opens where the mean ends.
            axes.plot(x[shared - 1 :], y[shared - 1 :], **{**style, "linewidth": 0.7, "marker": "", "alpha": 0.7})
    axes.plot(epochs, values.mean(axis=0), **style)


def _plot_dot(axes: Axes, drawn: Look, place: int, values: Sequence[float], *, dark: bool) -> None:
    axes.plot([place], [np.mean(values)], **_marked(line(drawn, dark=dark, width=1.8)))
    axes.vlines(place, min(values), max(values), color=drawn.colour(dark=dark), linewidth=1.2)


Points = Mapping[int, Estimate]
"""Number of heads -> mean and interval."""


def over_heads(runs: Mapping[str, Points], *, dark: bool) -> bytes:
    """Means with their 95 % intervals over the number of heads as SVG, one line per mechanism.

    The numbers of heads stand at equal distances; mechanisms are moved aside a little, so that no interval hides
    another's.

    Args:
        runs: name of a mechanism -> its points. The names choose the looks and are not drawn.
        dark: for a dark ground.
    """
    theme = DARK if dark else LIGHT
    heads = sorted({number for points in runs.values() for number in points})
    with style():
        figure = blank(4.6, 2.9)
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(runs.items()):
            aside = 0.05 * (place - (len(runs) - 1) / 2)
            shown = {number: one for number, one in sorted(points.items()) if math.isfinite(one.mean)}
            x = [heads.index(number) + aside for number in shown]
            axes.plot(x, [one.mean for one in shown.values()], **_marked(line(look(name), dark=dark, width=1.5)))
            ends = [(at, one.low, one.high) for at, one in zip(x, shown.values(), strict=True)]
            for at, low, high in ends:
                if low is not None and high is not None:
                    axes.vlines(at, low, high, color=look(name).colour(dark=dark), linewidth=1.2)
        axes.set_xticks(range(len(heads)), [str(number) for number in heads])
        axes.set_xlabel("heads")
        axes.margins(x=0.08)
        bare(axes, theme.ink, theme.faint)
        return saved(figure, "svg", transparent=True)


def _marked(drawn: dict[str, Any]) -> dict[str, Any]:
    """Every point of a few has its marker: a dot, where the look has none."""
    return {**drawn, "marker": drawn.get("marker") or ".", "markersize": 6, "markevery": 1}


LENGTHS = (1.0, 2.0, 4.0)
"""|q| |k| times the scale, in the figure of the weights."""


def weights_over_angle(mechanism: str, *, dark: bool) -> bytes:
    """The un-normalised weights over the angle between q and k as SVG, a line for each of :data:`LENGTHS`.

    Args:
        mechanism: ``"standard"`` or ``"expressive"``.
        dark: for a dark ground.
    """
    theme = DARK if dark else LIGHT
    angles = np.linspace(-180, 180, 361)
    with style():
        figure = blank(4.6, 2.9)
        axes = figure.add_subplot()
        for length, dashes in zip(LENGTHS, ((1, 1), (5, 2), ()), strict=True):
            axes.plot(
                angles,
                weight(mechanism, angles, length),
                color=look(mechanism).colour(dark=dark),
                linestyle=(0, dashes) if dashes else "solid",
                label=f"{length:g}",
            )
        # exp z reaches from e⁻⁴ to e⁴, the expressive weight from 0 to 1.
        if mechanism == "standard":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("angle between q and k")
        axes.set_xticks([-180, -90, 0, 90, 180], ["−180°", "−90°", "0°", "90°", "180°"])
        bare(axes, theme.ink, theme.faint)
        place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
        box = axes.legend(
            title="|q| |k| · scale", frameon=False, fontsize=8, labelcolor=theme.ink, handlelength=2.6, **place
        )
        box.get_title().set(color=theme.ink, fontsize=8)
        return saved(figure, "svg", transparent=True)


def weight(mechanism: str, degrees: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    """The un-normalised weight of a key at an angle to the query.

    Args:
        mechanism: ``"standard"``, exp z, or ``"expressive"``, z²/(1 + z²).
        degrees: the angle θ between q and k.
        length: |q| |k| times the scale, so that z = length · cos θ.

    Source: arXiv 2407.18601.

    >>> [round(float(w), 3) for w in weight("expressive", np.array([0.0, 60.0, 90.0, 180.0]), 2.0)]
    [0.8, 0.5, 0.0, 0.8]
    """
    z = length * np.cos(np.deg2rad(degrees))
    return np.exp(z) if mechanism == "standard" else z**2 / (1 + z**2)
