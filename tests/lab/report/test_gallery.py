"""The pictures of a report: each pixel where and what it should be, each picture with its words."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from better_attention.lab.analysis.summary import summarise
from better_attention.lab.report import gallery, heatmaps
from better_attention.lab.report.gallery import Album
from better_attention.lab.runs.name import RunName
from helpers.studies import curve, record


def pixels(content: bytes) -> NDArray[np.uint8]:
    """A PNG as (H, W, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def colour(name: str, value: float) -> list[int]:
    """The colour of ``value``, 0 to 1, on a scale."""
    return [int(part) for part in colormaps[name](round(value * 255), bytes=True)[:3]]


# -------------------------------------------------------------------------------------------------------- matrices


def test_heat_goes_from_zero_to_the_greatest() -> None:
    found = pixels(heatmaps.heat(np.array([[0.0, 0.1, 0.2], [0.4, 0.2, 0.0]])))
    assert found.shape == (2, 3, 3)
    assert found[0, 0].tolist() == found[1, 2].tolist() == colour("viridis", 0)
    assert found[1, 0].tolist() == colour("viridis", 1)
    assert found[0, 2].tolist() == found[1, 1].tolist() == colour("viridis", 0.5)


def test_zero_is_white_and_signs_are_told_apart() -> None:
    content, reach = heatmaps.diverging(np.array([[0.0, -0.5], [2.0, -2.0]]))
    found = pixels(content)
    assert reach == 2.0
    assert found[0, 0].min() > 240  # white: the scale is centred on zero, whatever the values' mean
    assert found[1, 0].tolist() == colour("RdBu_r", 1)
    assert found[1, 1].tolist() == colour("RdBu_r", 0)
    assert found[1, 0][0] > found[1, 0][2]  # positive is red
    assert found[1, 1][2] > found[1, 1][0]  # negative is blue


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_matrices_of_nothing_are_drawn_quietly(value: float) -> None:
    matrix = np.full((2, 2), value)
    assert (pixels(heatmaps.heat(matrix)) == colour("viridis", 0)).all()
    content, reach = heatmaps.diverging(matrix)
    assert reach == 0.0
    assert pixels(content).min() > 240


def test_large_matrices_are_averaged_by_blocks() -> None:
    matrix = np.zeros((300, 257))
    matrix[:150] = 1.0
    found = pixels(heatmaps.heat(matrix))
    assert found.shape == (heatmaps.LARGEST, heatmaps.LARGEST, 3)
    assert found[0, 0].tolist() == colour("viridis", 1)
    assert found[-1, -1].tolist() == colour("viridis", 0)
    small = heatmaps._shrunk(np.arange(256.0)[:, None].repeat(3, axis=1))
    np.testing.assert_array_equal(small[:, 0], np.arange(0.5, 256, 2))


# ----------------------------------------------------------------------------------------- attention over a picture


def brightest(content: bytes | None) -> tuple[int, int]:
    """Row and column of the greenest pixel: the picture below is black, so that is the most attended patch."""
    assert content is not None
    row, column = np.unravel_index(pixels(content)[..., 1].astype(int).argmax(), pixels(content).shape[:2])
    return int(row), int(column)


def test_patches_run_row_by_row() -> None:
    received = np.zeros(9)
    received[5] = 1.0  # second row, third column of 3 x 3 patches
    assert brightest(heatmaps.over_picture(received, np.zeros((6, 9), dtype=np.uint8))) == (2, 6)


def test_a_class_token_is_left_out() -> None:
    received = np.zeros(10)
    received[0], received[4] = 5.0, 1.0  # the class token receives most; then patch 3, second row, first column
    assert brightest(heatmaps.over_picture(received, np.zeros((6, 6, 3), dtype=np.uint8))) == (2, 0)


@pytest.mark.parametrize(("patches", "side"), [(7, 6), (64, 6), (1, 0)])
def test_what_is_no_grid_is_not_laid_over(patches: int, side: int) -> None:
    assert heatmaps.over_picture(np.ones(patches), np.zeros((side, side), dtype=np.uint8)) is None


def test_the_picture_shows_through() -> None:
    picture = np.zeros((4, 4), dtype=np.uint8)
    picture[0, 0] = 255
    content = heatmaps.over_picture(np.ones(4), picture)
    assert content is not None
    assert pixels(content)[0, 0].sum() > pixels(content)[0, 1].sum()


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_photographs_are_the_input(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    picture = rng.integers(0, 256, shape, dtype=np.uint8)
    found = pixels(heatmaps.photograph(picture))
    np.testing.assert_array_equal(found if len(shape) == 3 else found[..., 0], picture)


# --------------------------------------------------------------------------------------------------------- gallery


def test_an_album_has_room_for_so_much() -> None:
    album = Album(room=200)
    assert album.add(b"x" * 60) is not None  # 22 + 80 characters
    assert album.add(b"x" * 60, b"y") is None  # belong together, find no room together
    assert album.left_out == 1
    assert album.add(b"x" * 6) is not None


def test_curves_are_grouped_by_heads_in_the_order_of_the_tables() -> None:
    names = ("super", "standard", "custom(q)")
    curves = {f"{name}-h{h}-s{s}": curve(keys=("train_loss",)) for name in names for h in (4, 1) for s in (0, 1)}
    groups = gallery.curve_groups(curves, Album(10**9))
    assert [(group.heads, group.mechanisms) for group in groups] == [
        (h, ["standard", "super", "custom(q)"]) for h in (1, 4)
    ]
    assert [panel.title for panel in groups[0].panels] == ["Training loss"]
    assert groups[0].panels[0].alt == (
        "Training loss, by epoch. Last values, mean over seeds: standard 0.3333, super 0.3333, custom(q) 0.3333."
    )
    assert groups[0].panels[0].light != groups[0].panels[0].dark


def test_a_run_of_another_name_still_has_its_curve() -> None:
    (group,) = gallery.curve_groups({"my run": curve()}, Album(10**9))
    assert (group.heads, group.mechanisms) == (None, ["my run"])


@pytest.mark.parametrize("missing", [[], [{"epoch": 1, "seconds": 1.0}], [{"epoch": 1, "train_loss": None}]])
def test_curves_without_values_are_left_out(missing: list[dict[str, float]]) -> None:
    assert gallery.curve_groups({"super-h1-s0": missing}, Album(10**9)) == []


def test_results_over_heads_need_two_of_them() -> None:
    rows = summarise(record(name, s, h) for name in ("standard", "super") for h in (1, 4) for s in (0, 1))
    names, (panel,) = gallery.ablation(rows, Album(10**9))
    assert names == ["standard", "super"]
    # 97 + seed + heads / 8: t(0.975, 1) / 2 = 6.353
    assert panel.alt == (
        "Test acc. % by number of heads. standard: 97.62 ± 6.35 with 1, 98.00 ± 6.35 with 4; "
        "super: 97.62 ± 6.35 with 1, 98.00 ± 6.35 with 4."
    )
    assert panel.light != panel.dark
    assert gallery.ablation([row for row in rows if row.heads == 4], Album(10**9)) == ([], [])
    assert gallery.ablation(rows, Album(10)) == ([], [])


def test_the_weights_over_the_angle_in_words() -> None:
    softmax, expressive = gallery.angle_panels(Album(10**9))
    assert (
        "for |q| |k| · scale of 1: 2.718, 1.000, 0.368; 2: 7.389, 1.000, 0.135; 4: 54.598, 1.000, 0.018." in softmax.alt
    )
    assert "scale of 1: 0.500, 0.000, 0.500; 2: 0.800, 0.000, 0.800; 4: 0.941, 0.000, 0.941." in expressive.alt


@pytest.mark.parametrize("name", ["super-h4-s0", "super+expressive-h12-s3", "custom(q+align)-h1-s0", "a-h1-s2-h3-s4"])
def test_run_names_there_and_back(name: str) -> None:
    run = RunName.of(name)
    assert str(run) == name
    assert run.heads is not None
    assert name.endswith(f"-h{run.heads}-s{run.seed}")


@pytest.mark.parametrize("name", ["", "super", "super-h4", "super-h4-s", "super-h٤-s0x"])
def test_other_names_are_kept_whole(name: str) -> None:
    assert RunName.of(name) == RunName(name, None, None)
