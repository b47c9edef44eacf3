"""The paper's figures 2 to 4, from :func:`better_attention.costs.cost`: eq. 24, and the exact count of a real layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator
from numpy.typing import NDArray

from better_attention.costs import cost
from better_attention.errors import check_choice
from better_attention.lab.files import write_atomic
from better_attention.lab.report.plot_style import SIGNATURE, bare, blank, line, saved, style
from better_attention.lab.report.style import LIGHT, look
from better_attention.lab.runs.overwrite_guard import check_file

FORMS = ("paper", "exact")
HEADS = (1, 2, 4, 8)
POWERS = tuple(2**k for k in range(11))
"""The eleven powers of two, 1 ... 1024, on both axes of figure 3."""
PAPER_OVERHEADS = {1: 0.30, 2: 0.25, 4: 0.20, 8: 0.16}
"""Number of heads -> the average overhead that the paper prints with figure 3 (its caption has them the other way)."""

_SHOWN = ("standard", "optimised", "efficient", "super")
_FORM_TITLES = {"paper": "eq. 24 of arXiv 2403.01643", "exact": "exact count"}


def flops(form: str, mechanism: str, embed_dim: int, heads: int, length: int) -> float:
    """FLOPs of a forward and backward pass on one sequence; NaN where no such layer can be counted.

    Args:
        form: ``"paper"``, eq. 24, defined for every size; or ``"exact"``, the matrix products of a real layer, whose
            heads divide its width.
        mechanism: name of a mechanism.
        embed_dim: model width d_m.
        heads: number of heads h.
        length: number of tokens ℓ.
    """
    check_choice(form, "form", FORMS)
    record = cost(embed_dim, heads, length, mechanism=mechanism)
    if form == "paper":
        return float(record.flops_paper)
    return float(record.flops) if embed_dim % heads == 0 else math.nan


def cost_ratio(heads: int, form: str = "paper") -> NDArray[np.float64]:
    """Figure 3's panel for ``heads``: FLOPs of standard over those of efficient attention, (ℓ, d_m) over powers of two.

    NaN where a real layer of that width cannot have that many heads.
    """
    return np.array(
        [[flops(form, "standard", d, heads, n) / flops(form, "efficient", d, heads, n) for d in POWERS] for n in POWERS]
    )


def average_overheads(form: str = "paper") -> dict[int, float]:
    """Number of heads -> what standard needs more than efficient attention, averaged over figure 3's panel.

    On a grid of powers of two eq. 24 gives the paper's averages, 30, 25, 20 and 16 %; on a linear grid it does not. The
    exact count does not depend on the number of heads, the pairs that it is averaged over do: ``heads`` divides d_m.

    >>> {heads: f"{overhead:.1%}" for heads, overhead in average_overheads().items()}
    {1: '29.7%', 2: '24.9%', 4: '20.3%', 8: '16.2%'}
    """
    return {heads: float(np.nanmean(cost_ratio(heads, form))) - 1 for heads in HEADS}


def cost_figure(number: int, path: str | Path, form: str = "paper") -> None:
    """Draw the paper's figure 2, 3 or 4 to ``path``, atomically.

    2: FLOPs against the model width, ℓ = 64, h = 1. 3: FLOPs of standard over those of efficient attention for
    h = 1, 2, 4, 8. 4: FLOPs over length and width, h = 1.

    Args:
        number: 2, 3 or 4.
        path: where to; ``.png``, ``.svg`` or ``.pdf``.
        form: ``"paper"``: eq. 24; ``"exact"``: the exact count.

    Raises:
        ValueError: another number, form or kind of file, or a file that another program wrote.
    """
    check_choice(form, "form", FORMS)
    draw = {2: _against_width, 3: _heat_maps, 4: _surfaces}.get(number)
    if draw is None:
        raise ValueError(f"figure must be 2, 3 or 4 (the paper's figures of cost), received {number!r}.")
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"{Path(path).name!r} names no kind of picture: end it in .png, .svg or .pdf.")
    check_file(Path(path), "--out", lambda content: SIGNATURE.encode() in content)
    with style():
        write_atomic(path, saved(draw(form), kind, signed=True))


def _against_width(form: str) -> Figure:
    figure = blank(6.4, 4.2)
    axes = figure.add_subplot()
    widths = np.arange(16, 1025, 16)
    for name in _SHOWN:
        values = [flops(form, name, int(d), 1, 64) for d in widths]
        # Dashes on top of solid lines, so that of two equal curves both are seen.
        axes.plot(
            widths, values, label=name, zorder=3 + bool(look(name).dashes), **line(look(name), dark=False, width=2)
        )
    axes.set(xlabel="model width $d_m$", ylabel="FLOPs, forward + backward", xlim=(0, 1024), ylim=(0, None))
    axes.set_title(f"Figure 2. One sequence of $\\ell = 64$, $h = 1$ ({_FORM_TITLES[form]})", fontsize=9, loc="left")
    axes.xaxis.set_major_locator(FixedLocator([0, 256, 512, 768, 1024]))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(framealpha=1, facecolor="white", edgecolor="none", handlelength=3.2)
    bare(axes, LIGHT.ink, LIGHT.faint)
    return figure


def _heat_maps(form: str) -> Figure:
    figure = blank(7.6, 7.0)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    ticks = range(0, len(POWERS), 2)
    ratios = {heads: cost_ratio(heads, form) for heads in HEADS}
    # One colour scale for the four panels, so that they can be compared.
    top = max(np.nanmax(ratio) for ratio in ratios.values())
    for axes, (heads, ratio) in zip(panels.flat, ratios.items(), strict=True):
        shown = axes.imshow(ratio - 1, origin="lower", cmap="viridis", vmin=0, vmax=top - 1)
        axes.set_title(f"$h = {heads}$: {100 * (np.nanmean(ratio) - 1):.1f} % more on average", fontsize=9, loc="left")
        axes.set_xticks(list(ticks), [str(POWERS[k]) for k in ticks])
        axes.set_yticks(list(ticks), [str(POWERS[k]) for k in ticks])
        axes.set_facecolor(LIGHT.faint)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.supxlabel("model width $d_m$", fontsize=9)
    figure.supylabel("length $\\ell$", fontsize=9)
    title = f"Figure 3. FLOPs that standard attention needs more than efficient ({_FORM_TITLES[form]})"
    if any(np.isnan(ratio).any() for ratio in ratios.values()):
        title += "\nThe count does not depend on $h$. Grey, left out of the average: $h$ does not divide $d_m$"
    figure.suptitle(title, fontsize=9)
    bar = figure.colorbar(shown, ax=panels, shrink=0.6, aspect=30, format=lambda value, _: f"+{100 * value:.0f} %")
    bar.outline.set_visible(False)
    return figure


def _surfaces(form: str) -> Figure:
    figure = blank(7.6, 7.2)
    points = np.arange(64, 1025, 64)
    grids = {
        name: np.array([[flops(form, name, int(d), 1, int(n)) for d in points] for n in points]) for name in _SHOWN
    }
    # One scale for all surfaces, so that their heights can be compared.
    top = max(grid.max() for grid in grids.values())
    widths, lengths = np.meshgrid(points, points)
    for place, (name, grid) in enumerate(grids.items(), start=1):
        axes: Any = figure.add_subplot(2, 2, place, projection="3d")
        axes.plot_surface(widths, lengths, grid, cmap="viridis", vmin=0, vmax=top, rstride=1, cstride=1, linewidth=0.2)
        axes.set(xlabel="$d_m$", ylabel="$\\ell$", zlim=(0, top))
        most = EngFormatter(places=1, sep=" ")(grid[-1, -1])
        axes.set_title(f"{name}: {most} at $d_m = \\ell = 1024$", fontsize=9, y=1.0)
        axes.xaxis.set_major_locator(FixedLocator([256, 512, 768, 1024]))
        axes.yaxis.set_major_locator(FixedLocator([256, 512, 768, 1024]))
        axes.zaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.tick_params(labelsize=7, pad=0)
        axes.view_init(elev=24, azim=-128)
    figure.suptitle(f"Figure 4. FLOPs, forward + backward, $h = 1$ ({_FORM_TITLES[form]})", fontsize=9)
    return figure
