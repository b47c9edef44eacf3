"""The drawings of a report: what is drawn is what was computed, and names choose looks and are not drawn."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from better_attention.functional import attention
from better_attention.lab.analysis.estimates import Estimate
from better_attention.lab.report import charts
from better_attention.lab.report.charts import LENGTHS, learning_curves, over_heads, weight, weights_over_angle
from better_attention.lab.report.style import look


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved while the test runs."""
    kept: list[Figure] = []
    save = charts.saved

    def keep(figure: Figure, kind: str, *, transparent: bool = False) -> bytes:
        kept.append(figure)
        return save(figure, kind, transparent=transparent)

    monkeypatch.setattr(charts, "saved", keep)
    return kept


# ------------------------------------------------------------------------------------------------ learning curves


def test_the_mean_ends_where_the_first_seed_ends(drawn: list[Figure]) -> None:
    seeds = [([1.0, 2.0, 3.0, 4.0], [8.0, 6.0, 4.0, 2.0]), ([1.0, 2.0, 3.0], [4.0, 4.0, 2.0])]
    learning_curves({"super": seeds}, dark=False)
    (axes,) = drawn[0].axes
    *thin, mean = axes.lines
    assert np.asarray(mean.get_xdata()).tolist() == [1, 2, 3]
    assert np.asarray(mean.get_ydata()).tolist() == [6, 5, 3]
    assert [np.asarray(line.get_xdata()).tolist() for line in thin] == [[3, 4], [3]]
    (band,) = axes.collections
    corners = band.get_paths()[0].get_extents()
    assert (corners.ymin, corners.ymax) == (2.0, 8.0)


def test_one_seed_has_no_band(drawn: list[Figure]) -> None:
    learning_curves({"super": [([1.0, 2.0], [2.0, 1.0])]}, dark=False)
    (axes,) = drawn[0].axes
    assert len(axes.lines) == 1
    assert not axes.collections


def test_a_single_epoch_is_a_dot_a_mechanism(drawn: list[Figure]) -> None:
    learning_curves({"super": [([1.0], [2.0]), ([1.0], [3.0])], "standard": [([1.0], [4.0])]}, dark=False)
    (axes,) = drawn[0].axes
    dots = [(list(line.get_xdata()), list(line.get_ydata()), line.get_marker()) for line in axes.lines]
    assert dots == [([0], [2.5], "."), ([1], [4.0], ".")]
    low, high = axes.get_ylim()
    assert low < 2.0 < 4.0 < high
    left, right = axes.get_xlim()
    assert left < 0 < 1 < right


@pytest.mark.parametrize(("values", "scale"), [([1.0, 0.2], "log"), ([1.0, 0.5], "linear"), ([1.0, 0.0], "linear")])
def test_a_long_fall_has_a_logarithmic_axis(drawn: list[Figure], values: list[float], scale: str) -> None:
    learning_curves({"super": [([1.0, 2.0], values)]}, dark=False)
    assert drawn[0].axes[0].get_yscale() == scale


def test_accuracies_keep_a_linear_axis(drawn: list[Figure]) -> None:
    learning_curves({"super": [([1.0, 2.0], [10.0, 90.0])]}, dark=False, falling=False)
    assert drawn[0].axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("values", [[np.nan, np.nan], [1.0, np.inf], [1.0, np.nan]])
def test_diverged_runs_can_be_drawn(values: list[float]) -> None:
    assert learning_curves({"super": [([1.0, 2.0], values)]}, dark=True).startswith(b"<?xml")


def test_names_choose_looks_and_are_not_drawn() -> None:
    one = learning_curves({r"$\frac{": [([1.0, 2.0], [2.0, 1.0])]}, dark=False)
    assert b"frac" not in one
    assert one == learning_curves({"\N{PILE OF POO}": [([1.0, 2.0], [2.0, 1.0])]}, dark=False)


def test_curves_hold_no_address_but_names_of_formats() -> None:
    text = learning_curves({"super": [([1.0, 2.0], [2.0, 1.0])]}, dark=False).decode()
    found = set(re.findall(r"\w+://[^\s\"'<>]*", text))
    assert found <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd",
        "http://purl.org/dc/elements/1.1/",
        "http://creativecommons.org/ns#",
        "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    }
    assert "<script" not in text


# --------------------------------------------------------------------------------------------------- results over heads


def test_means_and_intervals_stand_over_their_number_of_heads(drawn: list[Figure]) -> None:
    runs = {
        "standard": {1: Estimate(90.0, 1.0, 3), 8: Estimate(92.0, 0.5, 3)},
        "super": {8: Estimate(95.0, None, 1), 2: Estimate(94.0, 2.0, 3), 1: Estimate(math.nan, None, 3)},
    }
    over_heads(runs, dark=False)
    (axes,) = drawn[0].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "8"]
    standard, ours = axes.lines
    assert np.round(np.asarray(standard.get_xdata())).tolist() == [0, 2]
    assert np.asarray(standard.get_ydata()).tolist() == [90, 92]
    assert np.round(np.asarray(ours.get_xdata())).tolist() == [1, 2]  # a mean that is no number is left out
    assert np.asarray(ours.get_ydata()).tolist() == [94, 95]
    reach = [path.vertices[:, 1].tolist() for bars in axes.collections for path in bars.get_paths()]
    assert reach == [[89, 91], [91.5, 92.5], [92, 96]]  # a single seed has none
    x = {round(float(v), 6) for bars in axes.collections for path in bars.get_paths() for v in path.vertices[:, 0]}
    assert len(x) == 3  # side by side
    assert to_hex(ours.get_color()) == look("super").light


# ----------------------------------------------------------------------------------------------- weights over the angle


@pytest.mark.parametrize("score", ["standard", "expressive"])
@pytest.mark.parametrize("length", LENGTHS)
def test_weights_are_those_of_the_library(score: str, length: float) -> None:
    degrees = np.array([0.0, 30.0, 75.0, 90.0, 110.0, 180.0])
    q = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64) * length
    k = torch.tensor(np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], axis=1))[None]
    mechanism = "softmax" if score == "standard" else "expressive"
    eye = torch.eye(len(degrees), dtype=torch.float64)[None]
    found = attention(q[None], k[None], eye[None], score=mechanism, scale=1.0)[0, 0, 0].numpy()
    ours = weight(score, degrees, length)
    np.testing.assert_allclose(ours / ours.sum(), found, rtol=1e-9, atol=1e-12)


def test_suppressed_where_orthogonal_enhanced_where_parallel_and_antiparallel() -> None:
    angles = np.array([0.0, 90.0, -90.0, 180.0])
    for length in LENGTHS:
        parallel, up, down, antiparallel = weight("expressive", angles, length)
        assert parallel == pytest.approx(antiparallel) == length**2 / (1 + length**2)
        assert abs(up) < 1e-12
        assert abs(down) < 1e-12
        parallel, up, _, antiparallel = weight("standard", angles, length)
        assert antiparallel < up < parallel  # softmax tells the sign


@pytest.mark.parametrize("mechanism", ["standard", "expressive"])
def test_a_line_for_each_length(drawn: list[Figure], mechanism: str) -> None:
    weights_over_angle(mechanism, dark=True)
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["1", "2", "4"]
    for line, length in zip(axes.lines, LENGTHS, strict=True):
        x, y = (np.asarray(values, dtype=float) for values in line.get_data())
        assert (x.min(), x.max()) == (-180, 180)
        np.testing.assert_allclose(y, weight(mechanism, x, length))
    assert len({line.get_linestyle() if isinstance(line.get_linestyle(), str) else 0 for line in axes.lines}) >= 2


def test_figures_do_not_depend_on_the_callers_settings() -> None:
    import matplotlib

    runs = {"super": [([1.0, 2.0], [2.0, 1.0])]}
    plain = learning_curves(runs, dark=False)
    with matplotlib.rc_context(
        {"axes.facecolor": "red", "font.size": 30, "axes.linewidth": 9, "xtick.direction": "in"}
    ):
        assert learning_curves(runs, dark=False) == plain
