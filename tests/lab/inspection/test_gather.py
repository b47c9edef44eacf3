"""A model looked into: weights by every score, without padding, with words for keys and queries; entropy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.lab.inspection.gather import ModelInput, RunInput, look_into_model, look_into_run
from better_attention.lab.inspection.inspection import entropy
from better_attention.lab.runs.load import load_run
from helpers import tiny

L, D, H = 7, 10, 2
WORDS = ["one", "two", "three", "four", "five", "", ""]


class Reader(nn.Module):
    """Torch's layer, then ours; takes a padding mask by name."""

    def __init__(self, mechanism: str = "super+expressive") -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(D, H, batch_first=True)
        self.second = ba.MultiheadAttention(D, H, batch_first=True, mechanism=mechanism, max_len=L)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x + self.first(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.second(x, x, x, key_padding_mask=padding, need_weights=False)[0]  # type: ignore[no-any-return]


def padded() -> ModelInput:
    padding = torch.tensor([[word == "" for word in WORDS]])
    return ModelInput({"x": torch.randn(1, L, D), "padding": padding}, "a text", WORDS)


def test_every_layer_by_both_scores_the_models_own_marked() -> None:
    model, one = Reader(), padded()
    found = look_into_model(model, "reader", [one])
    (sample,) = found.samples
    assert [(layer.name, layer.own) for layer in sample.layers] == [("first", "softmax"), ("second", "expressive")]
    own = ba.attention_maps(model, **one.inputs)
    for layer in sample.layers:
        assert set(layer.maps) == {"softmax", "expressive"}
        shown = {score: one.weights for score, one in layer.maps.items()}
        np.testing.assert_allclose(shown[layer.own], own[layer.name][0, :, :5, :5].numpy(), atol=1e-6)
        assert not np.allclose(shown["softmax"], shown["expressive"], atol=1e-3)
        assert layer.maps["softmax"].tokens == WORDS[:5]  # padding is left out
    assert found.facts["attention"] == "standard, super+expressive"
    assert [(one.layer, one.weight.shape) for one in found.kernels] == [("second", (L, L))]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_inputs_of_every_form_are_numbered_where_they_have_no_words(form: str) -> None:
    x = torch.randn(1, L, D)
    inputs = {"tensor": x, "tuple": (x, None), "dict": {"x": x}}[form]
    (sample,) = look_into_model(Reader(), "reader", [inputs], layers="second").samples
    assert sample.title == "input 1"
    (layer,) = sample.layers
    assert layer.maps["softmax"].tokens == [str(number) for number in range(1, L + 1)]


def test_what_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one input"):
        look_into_model(Reader(), "reader", [])
    with pytest.raises(ValueError, match="received 2: pass them one by one"):
        look_into_model(Reader(), "reader", [torch.randn(2, L, D)])
    with pytest.raises(TypeError, match="must be a list of what the model takes, received a float32 tensor"):
        look_into_model(Reader(), "reader", torch.randn(2, L, D))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fits no attention layer .*first.*second"):
        look_into_model(Reader(), "reader", [torch.randn(1, L, D)], layers="third")


def test_a_run_with_its_pictures_predictions_and_trained_kernels(tmp_path: Path) -> None:
    tiny.training(tmp_path / "super-h3-s0").run()
    run = load_run(tmp_path / "super-h3-s0")
    inputs = tiny.splits().test.inputs[:2]
    found = look_into_run(run, [RunInput(f"digit {row}", picture) for row, picture in enumerate(inputs)])
    assert found.title == "super-h3-s0"
    assert found.facts["test accuracy"] == f"{run.result['test_accuracy']:.2f} %"
    assert [sample.title for sample in found.samples] == ["digit 0", "digit 1"]
    sample = found.samples[1]
    best = run.model(inputs[1:2]).softmax(-1)[0].detach()
    assert sample.predicted == f"{int(best.argmax())} ({100 * float(best.max()):.0f} %)"
    assert sample.picture is not None
    assert np.array_equal(sample.picture > 0, inputs[1].numpy() > 0)
    weights = ba.attention_maps(run.model, inputs[1:2])
    assert len(sample.layers) == len(weights)
    for layer in sample.layers:
        np.testing.assert_allclose(layer.maps["softmax"].weights, weights[layer.name][0].numpy(), atol=1e-6)
    assert all(one.initial is not None and (one.initial != one.weight).any() for one in found.kernels)


def test_entropy_in_bits() -> None:
    uniform, one_key, hidden = np.full((5, 4), 0.25), np.eye(5, 4), np.zeros((5, 4))
    one_key[4, 0] = 1.0
    half = np.where(np.arange(4) < 2, 0.5, 0.0)
    partly = np.concatenate([np.tile(half, (2, 1)), np.zeros((3, 4))])  # three queries see nothing
    found = entropy(np.stack([uniform, one_key, hidden, partly]))
    assert found == pytest.approx([math.log2(4), 0.0, 0.0, 1.0])
    assert not np.signbit(found).any()
