"""Every picture of the pages and of the README, as SVG that is readable on light and dark ground.

    python -m docs.pictures            # write docs/assets/*.svg
    python -m docs.pictures --check    # say which are out of date

Text and lines take the colour ``--ink``, which follows the reader's colour scheme. Data are the committed results,
read through the same functions as the tables.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

import better_attention as ba
from docs import tables

ASSETS = Path(__file__).parent / "assets"
INK, SOFT = "#101010", "#808081"
"""Stand for the colours of text and of faint lines until the picture is written."""
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3f7fd9", "#d9772b", "#2f9e6e", "#9a62c7", "#85858c"
COLOURS = {"standard": GREY, "optimised": GREEN, "efficient": BLUE, "super": ORANGE, "expressive": PURPLE}
STYLE = (
    "<style>:root{--ink:#1c1c21;--soft:#8b8b93;--card:#f3f4f8}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e4e4e9;--soft:#8b8b93;--card:#2b2e3a}}</style>"
)
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "better-attention",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": SOFT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "figure.dpi": 72,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def svg(figure: Figure) -> str:
    """A figure as a document without background, date or fonts of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "var(--ink)").replace(SOFT, "var(--soft)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", rf"\1 {FONT}", text)
    text = re.sub(r"(?m)^ +|[ ]+$", "", text)
    return re.sub(r"(<svg[^>]*>)", rf"\1{STYLE}", text, count=1)


def drawing(width: int, height: int, parts: Sequence[str], title: str) -> str:
    """A document drawn by hand."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" font-size="15" role="img">'
    return "\n".join([f"{head}{STYLE}<title>{title}</title>", *parts, "</svg>", ""])


def label(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 15,
    anchor: str = "start",
    colour: str = "var(--ink)",
    weight: int = 400,
) -> str:
    """A line of text."""
    font = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {font} fill="{colour}">{text}</text>'


def box(
    x: float, y: float, w: float, h: float, *, fill: str = "var(--card)", stroke: str = "var(--soft)", dash: str = ""
) -> str:
    """A rounded rectangle."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="{stroke}"{dashed}/>'


def arrow(x: float, y: float, to: float) -> str:
    """An arrow downwards."""
    return (
        f'<path d="M{x:g} {y:g}V{to - 1:g}M{x - 5:g} {to - 7:g}L{x:g} {to - 1:g}L{x + 5:g} {to - 7:g}" '
        'fill="none" stroke="var(--ink)" stroke-width="1.4"/>'
    )


# --- the layer --------------------------------------------------------------------------------------------------------


def layer() -> str:
    """The five steps, and which parts each mechanism keeps."""
    steps = (
        ("project", "W_Q, W_K, W_V: each learned or left out"),
        ("align", "W_A mixes the positions of the values: super"),
        ("score", "weights from q and k: softmax or expressive"),
        ("mix", "weights times v, head by head; heads joined"),
        ("output", "W_O"),
    )
    parts = [label(190, 22, "query, key, value", anchor="middle")]
    for i, (name, what) in enumerate(steps):
        y = 46 + i * 66
        parts += [arrow(190, y - 18, y), box(8, y, 364, 44), label(22, y + 27, name, weight=700)]
        parts.append(label(92, y + 27, what, size=12))
    parts += [arrow(190, 354, 376), label(190, 394, "output", anchor="middle")]
    columns = ("W_Q", "W_K", "W_V", "W_A", "W_O", "score")
    left, top = 410, 66
    parts.append(label(left, 22, "what each mechanism keeps", weight=700))
    for j, column in enumerate(columns):
        parts.append(
            label(left + 126 + j * 52 + (14 if column == "score" else 0), top - 14, column, size=12, anchor="middle")
        )
    for i, (name, row) in enumerate(ba.MECHANISMS.items()):
        y = top + i * 58
        parts.append(label(left, y + 24, name, weight=700))
        kept = [
            "q" in row.projections,
            "k" in row.projections,
            "v" in row.projections,
            row.aligned,
            "o" in row.projections,
        ]
        for j, there in enumerate(kept):
            x = left + 106 + j * 52
            colour = COLOURS[name] if there else "none"
            parts.append(
                box(x, y, 40, 36, fill=colour, stroke=colour if there else "var(--soft)", dash="" if there else "3 3")
            )
        parts.append(label(left + 402, y + 24, row.score, size=12, anchor="middle", colour="var(--ink)"))
    share = {n: ba.cost(128, 4, 64, mechanism=n).params / ba.cost(128, 4, 64).params for n in ba.MECHANISMS}
    text = ", ".join(f"{name} {100 * share[name]:.0f} %" for name in ("optimised", "efficient", "super"))
    parts.append(label(left, 378, "parameters, of standard&#8217;s (width 128, 64 tokens):", size=12))
    parts.append(label(left, 396, text, size=12))
    return drawing(852, 408, parts, "The layer in five steps, and what each mechanism keeps of it")


# --- speed and quality ------------------------------------------------------------------------------------------------


def _speeds(who: str, mode: str) -> list[float]:
    table, _ = tables.suite("layer")
    return [float(row["ratio_median"]) for row in tables.only(table, contender=who, mode=mode)]


def benefit() -> str:
    """What is gained in speed, and what it costs in accuracy: two panels, one row for each mechanism."""
    figure = Figure(figsize=(8.4, 2.9))
    speed, quality = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.1})
    study = tables.only(tables.rows(tables.RESULTS / "imdb" / "results.csv"), heads="4")
    names = ("efficient", "super", "optimised", "standard", "expressive")
    standard = ba.cost(32, 4, 32).params
    for y, name in enumerate(reversed(names)):
        for mode, marker, shift in (("inference", "o", 0.16), ("training", "D", -0.16)):
            values = _speeds(name, mode)
            mean = statistics.geometric_mean(values)
            speed.plot([min(values), max(values)], [y + shift] * 2, color=COLOURS[name], lw=2.5, alpha=0.45)
            speed.plot(mean, y + shift, marker, color=COLOURS[name], ms=7)
            speed.annotate(f"{mean:.1f}", (max(values), y + shift), (4, -3), textcoords="offset points", fontsize=8.5)
        row = tables.one(study, mechanism=name)
        if name == "standard":
            quality.plot(0, y, "o", color=COLOURS[name], ms=7)
        else:
            quality.errorbar(
                float(row["test_accuracy_gain"]),
                y,
                xerr=float(row["test_accuracy_gain_interval"]),
                fmt="o",
                color=COLOURS[name],
                ms=7,
                lw=2.5,
                capsize=0,
            )
    params = {name: int(tables.one(study, mechanism=name)["attention_params"]) for name in names}
    speed.set_yticks(
        range(len(names)), [f"{name}\n{100 * params[name] / standard:.0f} % of parameters" for name in reversed(names)]
    )
    speed.axvline(1, color=SOFT, lw=1)
    speed.set_xlim(0.8, 3.8)
    speed.set_title("times as fast as nn.MultiheadAttention\n● inference  ◆ training; line: seven sizes", fontsize=9.5)
    quality.axvline(0, color=SOFT, lw=1)
    quality.set_xlim(-1.5, 1.5)
    quality.set_title("test accuracy − standard, points\nIMDB, 5 seeds, 95 % interval", fontsize=9.5)
    for axes in (speed, quality):
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
    return svg(figure)


def speed() -> str:
    """Layers against nn.MultiheadAttention at every shape, inference above and training below."""
    table, _ = tables.suite("layer")
    shapes = list(dict.fromkeys(tables.shape(row) for row in table))
    figure = Figure(figsize=(8.6, 5.2))
    panels = figure.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.28})
    names = ("efficient", "super", "optimised", "standard", "expressive", "fused QKV on SDPA")
    for axes, mode in zip(panels, ("inference", "training"), strict=True):
        for i, name in enumerate(names):
            picked = [tables.one([r for r in table if tables.shape(r) == s], contender=name, mode=mode) for s in shapes]
            middle = [float(r["ratio_median"]) for r in picked]
            low = [m - float(r["ratio_low"]) for m, r in zip(middle, picked, strict=True)]
            high = [float(r["ratio_high"]) - m for m, r in zip(middle, picked, strict=True)]
            x = np.arange(len(shapes)) + (i - 2.5) * 0.14
            colour = COLOURS.get(name, INK)
            hollow = name not in COLOURS
            axes.bar(x, middle, 0.12, color="none" if hollow else colour, edgecolor=colour, lw=0.8, label=name)
            axes.errorbar(x, middle, yerr=[low, high], fmt="none", ecolor=INK, elinewidth=0.7, alpha=0.7)
        axes.axhline(1, color=INK, lw=0.8)
        axes.set_title(f"{mode}: times as fast as nn.MultiheadAttention", fontsize=10)
        axes.grid(axis="y")
        axes.tick_params(length=0)
    panels[1].set_xticks(
        range(len(shapes)),
        [s.replace(", ", "×", 1).replace(", ", "\n×", 1).replace(", ", "×") for s in shapes],
        fontsize=8.5,
    )
    panels[1].set_xlabel("batch × tokens × width × heads")
    panels[0].legend(ncols=3, fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.015, 1.42))
    return svg(figure)


def accuracy() -> str:
    """Mechanism minus standard on every study: difference and interval."""
    figure = Figure(figsize=(8.4, 4.6))
    axes = figure.subplots()
    ticks, y = [], 0.0
    for folder, (title, metric, unit) in reversed(tables.STUDIES.items()):
        table = tables.only(tables.rows(tables.RESULTS / folder / "results.csv"), heads="4")
        start = y
        for name in ("expressive", "super", "efficient", "optimised"):
            found = tables.only(table, mechanism=name)
            if not found:
                continue
            gain, half = float(found[0][f"{metric}_gain"]), float(found[0][f"{metric}_gain_interval"])
            shown = found[0][f"{metric}_verdict"] != "no difference shown"
            axes.errorbar(
                gain,
                y,
                xerr=half,
                fmt="o",
                mfc=COLOURS[name] if shown else "none",
                color=COLOURS[name],
                ms=6,
                lw=2,
                label=name,
            )
            y += 1
        ticks.append(((start + y - 1) / 2, title + (", BLEU" if unit == "BLEU" else "")))
        y += 1
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks([place for place, _ in ticks], [text.replace(", ", ",\n", 1) for _, text in ticks], fontsize=8.5)
    axes.set_xlabel("difference to standard: points of test accuracy, or BLEU; filled: shown after correction")
    axes.grid(axis="x")
    axes.tick_params(length=0)
    handles = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = ("optimised", "efficient", "super", "expressive")
    axes.legend([handles[n] for n in order], order, ncols=4, fontsize=9, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    return svg(figure)


def cache() -> str:
    """Bytes that a cache keeps for each token, in a layer of width 768."""
    figure = Figure(figsize=(7.2, 2.3))
    axes = figure.subplots()
    for y, name in enumerate(reversed(ba.MECHANISMS)):
        layer_ = ba.MultiheadAttention(96, 4, mechanism=name, **ba.Mechanism.of(name).layer_options(8, causal=True))
        size = ba.cost(768, 12, 64, mechanism=name).cache_bytes_per_token
        axes.barh(y, size, 0.6, color=COLOURS[name])
        axes.annotate(
            f"{size:,}: {' and '.join(layer_.cache_streams)}",
            (size, y),
            (5, -3),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_yticks(range(len(ba.MECHANISMS)), list(reversed(ba.MECHANISMS)))
    axes.set_xlim(0, 9600)
    axes.set_xticks([0, 3072, 6144])
    axes.set_xlabel("bytes per token and layer, width 768, float32")
    axes.tick_params(length=0)
    return svg(figure)


# --- expressive attention ---------------------------------------------------------------------------------------------


def score_functions() -> str:
    """The un-normalised weight over z, and the weight over the angle between q and k."""
    figure = Figure(figsize=(8.4, 2.9))
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.24})
    z = np.linspace(-4, 4, 401)
    left.plot(z, z**2 / (1 + z**2), color=PURPLE, lw=2)
    left.plot(z, np.exp(z) / math.exp(4), color=GREY, lw=2)
    left.set_title("weight before normalisation over z = scale · q·k")
    left.annotate("expressive\nz² / (1 + z²)", (0, 0.76), color=PURPLE, fontsize=9, ha="center")
    left.annotate("softmax\nexp(z) / exp(4)", (-3.9, 0.1), color=GREY, fontsize=9)
    degrees = np.linspace(0, 180, 361)
    cosine = torch.tensor(np.cos(np.radians(degrees)), dtype=torch.float64)
    for name, colour, score in (("softmax", GREY, "softmax"), ("expressive", PURPLE, "expressive")):
        # One query and 361 keys of equal length on a half circle: the library's own weights.
        keys = torch.stack([cosine, (1 - cosine**2).clamp(min=0).sqrt()], dim=-1)[None, None] * 2.0
        query = torch.tensor([[[[2.0, 0.0]]]], dtype=torch.float64)
        weights = ba.attention(query, keys, keys, score=score, need_weights=True, scale=1.0)[1][0, 0, 0]
        right.plot(degrees, (weights / weights.max()).numpy(), color=colour, lw=2, label=name)
    right.set_xticks([0, 45, 90, 135, 180])
    right.set_title("weight over the angle of q and k, in degrees (largest = 1)")
    for axes in (left, right):
        axes.grid()
        axes.tick_params(length=0)
    return svg(figure)


def score_planes() -> str:
    """How much a key anywhere in the plane weighs for one query, for both scores."""
    figure = Figure(figsize=(8.4, 3.7))
    grid = np.linspace(-3, 3, 121)
    x, y = np.meshgrid(grid, grid)
    query = np.array([1.3, 0.75])
    z = query[0] * x + query[1] * y
    panels = figure.subplots(1, 2, gridspec_kw={"wspace": 0.12})
    maps = (
        ("softmax: one direction counts", np.exp(z) / np.exp(z).max(), "Greys"),
        ("expressive: both directions count, a right angle does not", z**2 / (1 + z**2), "Purples"),
    )
    for axes, (title, values, colours) in zip(panels, maps, strict=True):
        axes.contourf(
            x, y, values, levels=[0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0], cmap=colours
        ).set_edgecolor("face")
        axes.annotate("", query, (0, 0), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 2.4})
        axes.annotate("q", query + 0.1, color=ORANGE, fontsize=12, fontweight="bold")
        axes.set_title(title, fontsize=9.5)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    return svg(figure)


# --- masks ------------------------------------------------------------------------------------------------------------


def causal_masks() -> str:
    """Which keys a query sees: is_causal, is_causal with an offset, and a window."""
    cases = (
        ("is_causal=True", {"is_causal": True}, 4, 6),
        ("is_causal=True, offset=2", {"is_causal": True, "offset": 2}, 4, 6),
        ("… offset=2, window=3", {"is_causal": True, "offset": 2, "window": 3}, 4, 6),
    )
    parts, left, side = [], 60, 30
    for title, arguments, L, S in cases:
        q, k = torch.ones(1, 1, L, 4), torch.ones(1, 1, S, 4)
        weights = ba.attention(q, k, k, need_weights=True, **arguments)[1][0, 0]  # type: ignore[call-overload]
        parts.append(label(left, 24, title, size=13, weight=700))
        for row in range(L):
            for column in range(S):
                seen = bool(weights[row, column] > 0)
                parts.append(
                    box(
                        left + column * side,
                        58 + row * side,
                        side - 4,
                        side - 4,
                        fill=BLUE if seen else "none",
                        dash="" if seen else "2 3",
                    )
                )
        parts += [label(left + (S * side) / 2, 48, "keys 0 … 5", size=12, anchor="middle")]
        left += S * side + 96
    parts.append(
        f'<g transform="translate(44 118) rotate(-90)">{label(0, 0, "queries 0 … 3", size=12, anchor="middle")}</g>'
    )
    return drawing(900, 190, parts, "Which keys a query sees: causal, with an offset, and with a window")


PICTURES: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (layer, benefit, speed, accuracy, cache, score_functions, score_planes, causal_masks)
}
"""Name of the file -> what draws it."""


def draw(name: str) -> str:
    """The SVG document called ``name``."""
    with mpl.rc_context(SETTINGS):
        return PICTURES[name]()


def main(arguments: Sequence[str]) -> int:
    """Write the pictures, or with ``--check`` name those that are out of date."""
    stale = []
    for name in PICTURES:
        path, new = ASSETS / f"{name}.svg", draw(name)
        if not path.exists() or path.read_text("utf-8") != new:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(new, "utf-8")
    print("\n".join(stale) or "every picture is up to date")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
