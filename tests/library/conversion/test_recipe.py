"""Converted models on disk: the same model comes back, and what is not the same is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import better_attention as ba
from helpers.layers import refused, tokens

pytest.importorskip("safetensors", reason="converted models are saved with safetensors: pip install .[convert]")

B, L, E = 3, 5, 6


def encoder(layers: int = 2, width: int = E) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, 2, 11, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def saved(folder: Path, mechanism: str = "super") -> nn.Module:
    model = encoder()
    aligned = ba.Mechanism.of(mechanism).aligned
    ba.convert(model, mechanism, exact=False, max_len=L if aligned else None, align_causal=aligned or None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # as training would
    ba.save_converted(model, folder)
    return model


@pytest.mark.parametrize("mechanism", ["standard", "optimised", "efficient", "super", "efficient+expressive"])
def test_a_saved_model_comes_back(tmp_path: Path, mechanism: str) -> None:
    model, x = saved(tmp_path, mechanism), tokens(B, L, E, dtype=torch.float32)
    loaded = encoder()
    assert ba.load_converted(loaded, tmp_path) is loaded
    assert torch.equal(loaded(x), model(x))
    for mine, theirs in zip(loaded.modules(), model.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert mine.extra_repr() == theirs.extra_repr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "recipe.json"]


@pytest.mark.parametrize(("before", "after"), [("optimised", "standard"), ("standard", "optimised")])
def test_a_layer_of_shared_heads_comes_back(tmp_path: Path, before: str, after: str) -> None:
    """With as many heads as the conversion left: the identity is a value for each of them."""

    def model() -> nn.Module:
        layer = ba.MultiheadAttention(8, 4, mechanism=before, num_kv_heads=2, batch_first=True)
        return nn.ModuleList([layer])

    made, x = model(), tokens(B, L, 8, dtype=torch.float32)
    ba.convert(made, after, exact=False)
    ba.save_converted(made, tmp_path)
    loaded = ba.load_converted(model(), tmp_path)
    assert loaded[0].num_kv_heads == made[0].num_kv_heads == (4 if after == "standard" else 2)
    assert torch.equal(loaded[0](x, x, x)[0], made[0](x, x, x)[0])


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        layer = nn.TransformerEncoderLayer(E, 1, 11, batch_first=True)
        return nn.ModuleList([layer, layer, nn.MultiheadAttention(E, 1)])

    model = tied()
    ba.convert(model, "efficient")
    ba.save_converted(model, tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["aliases"]["1.linear1.weight"] == "0.linear1.weight"
    loaded = tied()
    ba.load_converted(loaded, tmp_path)
    assert loaded[0].self_attn is loaded[1].self_attn
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_loaded_model_cannot_be_reverted_but_saved_again(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    loaded = ba.load_converted(encoder(), tmp_path / "a")
    refused(lambda: ba.revert(loaded), "keep_original", kind=ValueError)
    ba.save_converted(loaded, tmp_path / "b")
    first, second = (json.loads((tmp_path / n / "recipe.json").read_text()) for n in "ab")
    assert first == second


def test_nothing_converted_is_not_saved(tmp_path: Path) -> None:
    refused(lambda: ba.save_converted(encoder(), tmp_path / "x"), "no converted layer", kind=ValueError)
    assert not (tmp_path / "x").exists()


def test_damage_and_other_formats_are_refused_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path)
    model = encoder()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    weights, recipe = tmp_path / "model.safetensors", tmp_path / "recipe.json"
    good, text = weights.read_bytes(), recipe.read_text()

    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(lambda: ba.load_converted(model, tmp_path), "sha256", "damaged", kind=ValueError)
    weights.write_bytes(good)
    recipe.write_text(text.replace('"format": 1', '"format": 99'))
    refused(lambda: ba.load_converted(model, tmp_path), "99", "format 1", kind=ValueError)
    recipe.unlink()
    refused(lambda: ba.load_converted(model, tmp_path), "recipe.json", kind=FileNotFoundError)

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: encoder(width=8), "difference"),
        (lambda: encoder(layers=1), "layers.1.self_attn"),
        (lambda: encoder(layers=3), "layers.2"),
        (lambda: encoder().double(), "float64"),
        (lambda: nn.Linear(2, 2), "no attention"),
    ],
)
def test_models_that_the_recipe_does_not_fit_are_refused(tmp_path: Path, other, words: str) -> None:
    saved(tmp_path)
    model = other()
    modules = dict(model.named_modules())
    refused(lambda: ba.load_converted(model, tmp_path), words, kind=ValueError)
    assert dict(model.named_modules()) == modules


def test_a_converted_model_is_not_loaded_into(tmp_path: Path) -> None:
    model = saved(tmp_path)
    refused(lambda: ba.load_converted(model, tmp_path), "not yet converted", kind=ValueError)
