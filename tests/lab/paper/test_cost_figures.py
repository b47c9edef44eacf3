"""The paper's figures of cost, and learning curves: what is drawn is what was computed."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from better_attention.lab.paper import cost_figures
from better_attention.lab.paper.cost_figures import average_overheads, cost_figure, cost_ratio, flops
from better_attention.lab.report import charts, plot_style
from better_attention.lab.report.style import DARK, LIGHT, look
from better_attention.mechanism import MECHANISMS

# --------------------------------------------------------------------------------------------- the paper's figures


@pytest.mark.parametrize(("name", "constant"), [("standard", 15), ("optimised", 12), ("super", 12), ("efficient", 9)])
def test_equation_24(name: str, constant: int) -> None:
    assert flops("paper", name, 37, 5, 11) == constant * 11 * 37 + 15 * 5 * 11**2


def test_the_exact_count() -> None:
    d, n = 24, 7  # 2 · maps · l d² + 4 l² d (+ 2 l² d for W_A), three times that with the backward pass
    assert flops("exact", "standard", d, 3, n) == 3 * (8 * n * d * d + 4 * n * n * d)
    assert flops("exact", "super", d, 3, n) == 3 * (4 * n * d * d + 6 * n * n * d)
    assert np.isnan(flops("exact", "super", d, 5, n))


def test_the_papers_averages_to_a_tenth_of_a_per_cent() -> None:
    found = {heads: round(100 * overhead, 1) for heads, overhead in average_overheads().items()}
    assert found == {1: 29.7, 2: 24.9, 4: 20.3, 8: 16.2}


def test_the_papers_range() -> None:
    for heads in (1, 2, 4, 8):
        ratio = cost_ratio(heads)
        assert ratio.shape == (11, 11)
        assert ratio.min() > 1.0
        assert (1.66 if heads == 1 else 1.65) < ratio.max() < 5 / 3  # "up to 66 %": towards 15/9
        assert ratio[0, -1] == ratio.max()  # ℓ = 1, d = 1024: rows are lengths


def test_exact_ratios_go_from_one_to_two() -> None:
    ratio = cost_ratio(4, "exact")
    assert np.isnan(ratio[:, :2]).all()  # no layer of width 1 or 2 has four heads
    assert not np.isnan(ratio[:, 2:]).any()
    np.testing.assert_allclose(np.diag(cost_ratio(1, "exact")), 1.5)  # (2d + l)/(d + l) at l = d
    assert np.nanmax(ratio) < 2


@pytest.mark.parametrize(("number", "form"), [(2, "paper"), (2, "exact"), (3, "exact"), (4, "paper")])
def test_figures_are_pictures(tmp_path: Path, number: int, form: str) -> None:
    path = tmp_path / "figure.png"
    cost_figure(number, path, form=form)
    with Image.open(path) as image:
        assert image.width >= 1000
        assert len(image.convert("L").getcolors() or []) > 50  # something is drawn
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_equal_figures_are_equal_files(tmp_path: Path, kind: str, start: bytes) -> None:
    for name in ("a", "b"):
        cost_figure(2, tmp_path / f"{name}.{kind}")
    first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("a", "b"))
    assert first == second
    assert first.startswith(start)


def test_figure_2_is_eq_24_at_length_64() -> None:
    lines = {str(line.get_label()): line for line in cost_figures._against_width("paper").axes[0].lines}
    assert list(lines) == ["standard", "optimised", "efficient", "super"]
    for name, constant in zip(lines, (15, 12, 9, 12), strict=True):
        x, y = (np.asarray(values) for values in lines[name].get_data())
        np.testing.assert_allclose(y, constant * 64 * x + 15 * 64**2)


def test_figure_3_shows_the_ratios_and_prints_their_averages() -> None:
    panels = [axes for axes in cost_figures._heat_maps("paper").axes if axes.images]
    titles = [axes.get_title(loc="left") for axes in panels]
    for heads, axes, average in zip((1, 2, 4, 8), panels, ("29.7 %", "24.9 %", "20.3 %", "16.2 %"), strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), cost_ratio(heads) - 1)
        assert axes.images[0].origin == "lower"
        assert average in titles[(1, 2, 4, 8).index(heads)]
    assert len({axes.images[0].get_clim() for axes in panels}) == 1  # one scale for all


def test_figure_4_has_one_height_for_all() -> None:
    panels = cost_figures._surfaces("paper").axes
    assert [axes.get_title().split(":")[0] for axes in panels] == ["standard", "optimised", "efficient", "super"]
    assert len({axes.get_zlim() for axes in panels}) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "x.png"), "figure must be 2, 3 or 4"),
        ((2, "x.jpeg"), "'x.jpeg' names no kind of picture"),
        ((2, "x"), "'x' names no kind of picture"),
        ((2, "x.png", "rough"), "form must be one of 'paper', 'exact', received 'rough'"),
    ],
)
def test_figures_that_cannot_be_drawn(
    tmp_path: Path, arguments: tuple[int, str] | tuple[int, str, str], message: str
) -> None:
    number, name, *form = arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        cost_figure(number, tmp_path / name, *form)
    assert list(tmp_path.iterdir()) == []


def test_pyplot_and_its_global_state_stay_out() -> None:
    trees = [ast.parse(inspect.getsource(module)) for module in (cost_figures, charts, plot_style)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert "Figure" in names
    assert not [name for name in (*names, *modules) if name and "pyplot" in name]


# ---------------------------------------------------------------------------------------------------------- looks


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, other: str) -> float:
    """Contrast ratio, WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", [*MECHANISMS, "custom(q)"])
def test_lines_stand_out_from_both_grounds(name: str) -> None:
    assert contrast(look(name).light, LIGHT.ground) >= 3
    assert contrast(look(name).dark, DARK.ground) >= 3
    assert contrast(LIGHT.ink, LIGHT.ground) >= 7
    assert contrast(DARK.ink, DARK.ground) >= 7


def test_the_five_are_told_apart_without_colour() -> None:
    shapes = [(look(name).dashes, look(name).marker) for name in MECHANISMS]
    # Solid twice: near black and orange, which lightness tells apart.
    assert len(set(shapes)) >= 4
    assert contrast(look("standard").light, look("super").light) >= 2


def test_variants_keep_the_colour_and_get_a_marker() -> None:
    assert look("efficient+expressive").light == look("efficient").light
    assert look("efficient+expressive").marker != look("standard+align").marker != ""


def test_variants_of_one_mechanism_are_told_apart_by_dashes_and_by_markers() -> None:
    names = [
        "",
        "+expressive",
        "+align",
        "+per-head",
        "+identity",
        "+align+expressive",
        "+expressive+identity+per-head",
    ]
    variants = [look(f"super{name}") for name in names]
    assert len({one.dashes for one in variants}) == len({one.marker for one in variants}) == len(names)
