"""Attention maps and alignment kernels of a report: gathered by run, without padding, named for the reader."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap
from better_attention.lab.report import heatmaps, map_gallery
from better_attention.lab.report.gallery import Album
from better_attention.lab.report.map_gallery import folds, kernels, layer_name, without_padding
from helpers.studies import attention_map

ROOM = 10**9


def pixels(address: str) -> NDArray[np.uint8]:
    """A picture of a page as (H, W, 3)."""
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def text_map(tokens: list[str], **changes: Any) -> AttentionMap:
    """Weights that are all different, so that each row and column is known again."""
    weights = np.arange(1.0, 1 + len(tokens) ** 2).reshape(1, len(tokens), len(tokens))
    fields: dict[str, Any] = {"run": "super-h1-s0", "layer": "blocks.0.attention", "label": "a text", "tokens": tokens}
    return AttentionMap(**({**fields, "weights": weights} | changes))


# ------------------------------------------------------------------------------------------------------------ folds


def test_maps_are_gathered_by_run_then_by_input() -> None:
    maps = [
        attention_map(f"{name}-h2-s0", label=label, layer=f"blocks.{number}.attention", predicted=f"{name} {label}")
        for name in ("standard", "super")
        for label in ("a 3", "a 7")
        for number in (0, 1)
    ]
    found = folds(maps, Album(ROOM))
    assert [fold.run.mechanism for fold in found] == ["standard", "super"]
    assert [[sample.label for sample in fold.samples] for fold in found] == [["a 3", "a 7"]] * 2
    assert [sample.predicted for sample in found[1].samples] == ["super a 3", "super a 7"]
    assert [layer.name for layer in found[0].samples[1].layers] == ["layer 1", "layer 2"]
    assert [len(layer.heads) for layer in found[0].samples[1].layers] == [2, 2]
    assert found[0].samples[0].picture == found[1].samples[0].picture  # the same input, stored once an address


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.0.attention", "layer 1"),
        ("blocks.11.attention", "layer 12"),
        ("encoder.0.attention", "encoder layer 1"),
        ("decoder.0.attention", "decoder layer 1"),
        ("decoder.2.cross", "decoder layer 3, to the encoder"),
        ("blocks.0.attention#2", "layer 1, call 2"),
        ("my.attention", "my.attention"),
        ("", ""),
    ],
)
def test_layers_are_named_for_the_reader(name: str, told: str) -> None:
    assert layer_name(name) == told


def test_a_heads_words_are_its_numbers() -> None:
    weights = np.zeros((1, 2, 3))
    weights[0, :, 1], weights[0, 0, 0] = (0.25, 1.0), 0.75
    one = AttentionMap("super-h1-s0", "a", "x", weights, tokens=("not", "so", "bad"))
    (found,) = folds([one], Album(ROOM))
    (sample,) = found.samples
    head = sample.layers[0].heads[0]
    assert head.caption == "head 1, up to 1"
    assert head.alt == (
        "Attention weights of head 1, 2 queries (rows) by 3 keys (columns); greatest weight 1, key 2 receives most"
    )
    assert head.shades == [("not", "0.60"), ("so", "1.00"), ("bad", "0.00")]
    assert head.over is None
    assert pixels(head.matrix)[1, 1].tolist() == list(colormaps["viridis"](255, bytes=True)[:3])
    assert sample.size == "3 tokens, asked by 2"


@pytest.mark.parametrize(("heads", "shown"), [(1, 1), (8, 8), (12, 8)])
def test_up_to_eight_heads_are_shown_and_counted(heads: int, shown: int) -> None:
    (one,) = folds([attention_map("super-h12-s0", heads=heads)], Album(ROOM))
    (layer,) = one.samples[0].layers
    assert (len(layer.heads), layer.total) == (shown, heads)
    assert [head.caption.split(",")[0] for head in layer.heads] == [f"head {k + 1}" for k in range(shown)]
    (kernel,) = kernels([AlignmentPicture("super-h12-s0", "a", np.ones((heads, 3, 3)))], Album(ROOM))
    assert (len(kernel.heads), kernel.total) == (shown, heads)


def test_heads_without_room_are_counted_as_missing() -> None:
    one = attention_map("super-h4-s0", heads=4, picture=None)
    sizes = [len(heatmaps.data_uri(heatmaps.heat(weights), "image/png")) for weights in one.weights]
    (found,) = folds([one], Album(room=sum(sizes[:2])))
    (layer,) = found.samples[0].layers
    assert (len(layer.heads), layer.total) == (2, 4)
    assert folds([one], Album(room=10)) == []


# ---------------------------------------------------------------------------------------------------------- padding


def test_rows_and_columns_of_padding_are_left_out() -> None:
    one = text_map(["not", "bad", "", ""])
    found = without_padding(one)
    assert found.weights[0].tolist() == one.weights[0, :2, :2].tolist()
    assert found.tokens == ["not", "bad"]
    (fold,) = folds([one], Album(ROOM))
    assert fold.samples[0].size == "2 tokens"
    head = fold.samples[0].layers[0].heads[0]
    assert pixels(head.matrix).shape == (2, 2, 3)
    assert [token for token, _ in head.shades] == ["not", "bad"]


def test_queries_are_cropped_by_their_own_tokens() -> None:
    one = text_map(["der", "Hund", ""], queries=["", "the", "dog"])  # padding may lie anywhere
    found = without_padding(one)
    assert found.weights[0].tolist() == one.weights[0, 1:, :2].tolist()
    assert found.queries == ["the", "dog"]


def test_other_queries_than_keys_without_tokens_are_all_kept() -> None:
    one = text_map(["der", "Hund", ""], weights=np.ones((1, 2, 3)))
    assert without_padding(one).weights.shape == (1, 2, 2)


def test_a_text_of_nothing_but_padding_and_a_picture_are_left_as_they_are() -> None:
    assert without_padding(text_map(["", ""])).weights.shape == (1, 2, 2)
    one = attention_map("super-h2-s0")
    assert without_padding(one) is one


# ---------------------------------------------------------------------------------------------------------- kernels


def test_kernels_of_every_head() -> None:
    alignments = [
        AlignmentPicture("super-h2-s0", "blocks.0.attention", np.eye(3)),
        AlignmentPicture("super-h2-s0", "b", np.stack([np.eye(3), -2 * np.eye(3)])),
    ]
    shared, each = kernels(alignments, Album(ROOM))
    assert (shared.layer, each.layer) == ("layer 1", "b")
    assert [[one.caption for one in head] for head in shared.heads] == [["all heads, after training, ±1"]]
    assert [head[0].caption for head in each.heads] == ["head 1, after training, ±1", "head 2, after training, ±2"]


@pytest.mark.parametrize("heads", [None, 2])
def test_what_training_changed_is_drawn_beside_it(heads: int | None) -> None:
    shape = (3, 3) if heads is None else (heads, 3, 3)
    initial = np.full(shape, 0.27)
    trained = initial.copy()
    trained[..., 0, 2] -= 0.0321
    (kernel,) = kernels([AlignmentPicture("super-h2-s0", "a", trained, initial)], Album(ROOM))
    for after, change in kernel.heads:
        assert after.caption.endswith("after training, ±0.27")
        assert change.caption.endswith("change, ±0.032")
        drawn = pixels(change.matrix)
        assert drawn[0, 2].tolist() == list(colormaps["RdBu_r"](0, bytes=True)[:3])  # the one negative change
        assert drawn[1, 1].min() > 240  # the rest is as it was
    assert len(kernel.heads) == (heads or 1)


def test_a_kernel_and_its_change_find_room_together_or_not_at_all() -> None:
    one = AlignmentPicture("super-h2-s0", "a", np.eye(3), np.zeros((3, 3)))
    size = len(heatmaps.data_uri(heatmaps.diverging(np.eye(3))[0], "image/png"))
    assert kernels([one], Album(room=size + 1)) == []
    assert len(map_gallery.kernels([one], Album(room=2 * size))[0].heads[0]) == 2


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.zeros((1, 2, 9, 9))}, r"weights of an attention map are \(heads, L, S\)"),
        ({"tokens": ["a"] * 8}, "received 8 tokens for 9 keys"),
        ({"queries": ["a"] * 8}, "received 8 query tokens for 9 queries"),
        ({"picture": np.zeros((2, 2))}, "a picture is uint8"),
        ({"picture": np.zeros((2, 2, 4), dtype=np.uint8)}, r"received uint8, shape \(2, 2, 4\)"),
    ],
)
def test_maps_that_fit_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_map("super-h2-s0", **changes)


def test_a_kernel_is_square_and_so_it_was() -> None:
    with pytest.raises(ValueError, match=r"W_A is \(l, l\) or \(heads, l, l\), received shape \(3, 4\)"):
        AlignmentPicture("super-h2-s0", "a", np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"has the shape of the trained one, \(3, 3\), received \(1, 3, 3\)"):
        AlignmentPicture("super-h2-s0", "a", np.zeros((3, 3)), np.zeros((1, 3, 3)))
