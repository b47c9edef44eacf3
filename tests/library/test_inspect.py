"""Attention maps read off a model: the right numbers, and the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.inspect import alignment_kernels, attention_maps

MECHANISMS = (*ba.MECHANISMS, "super+expressive", "standard+align")
B, L, D, H = 3, 7, 10, 2


def layer(mechanism: str = "standard", **changes: object) -> ba.MultiheadAttention:
    sizes = {"max_len": L} if ba.Mechanism.of(mechanism).aligned else {}
    return ba.MultiheadAttention(D, H, batch_first=True, mechanism=mechanism, **{**sizes, **changes})  # type: ignore[arg-type]


class Block(nn.Module):
    """Two residual attention layers; the sum is made in place, as memory-minded code does."""

    def __init__(self, mechanism: str = "standard", dropout: float = 0.5) -> None:
        super().__init__()
        self.first = layer(mechanism, dropout=dropout)
        self.second = layer(mechanism, dropout=dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.clone()
        x += self.drop(self.first(x, x, x, mask, need_weights=False)[0])
        x += self.second(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return x


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_weights_are_the_layers_own(mechanism: str) -> None:
    model = Block(mechanism).eval()
    x = torch.randn(B, L, D)
    with torch.no_grad():
        _, expected1 = model.first(x, x, x, average_attn_weights=False)
        y = x + model.first(x, x, x, need_weights=False)[0]  # another implementation: the last bits differ
        _, expected2 = model.second(y, y, y, average_attn_weights=False)
    found = attention_maps(model, x)
    assert list(found) == ["first", "second"]
    assert found["first"].shape == (B, H, L, L)
    torch.testing.assert_close(found["first"], expected1, rtol=0, atol=0)
    torch.testing.assert_close(found["second"], expected2, rtol=0, atol=0)
    torch.testing.assert_close(found["second"].sum(-1), torch.ones(B, H, L))


def test_against_the_formula() -> None:
    model = layer("efficient").double().eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    q = model.q_proj(x).view(B, L, H, D // H)
    k = x.view(B, L, H, D // H)
    scores = torch.einsum("blhd,bshd->bhls", q, k) / math.sqrt(D // H)
    torch.testing.assert_close(attention_maps(model, x, x, x)[""], scores.softmax(-1).detach())


def test_the_model_is_left_as_it_was() -> None:
    model = Block()
    model.train()
    model.drop.eval()  # training flags of every sort
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(B, L, D, requires_grad=True)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = model(x)
    torch.set_rng_state(state)
    found = attention_maps(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(weights.requires_grad for weights in found.values())
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.manual_seed(3)
    assert torch.equal(model(x), expected)


def test_a_model_that_fails_is_left_as_it_was_too() -> None:
    model = Block().train()
    with pytest.raises(ValueError, match="last size"):
        attention_maps(model, torch.zeros(B, L, D + 1))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off() -> None:
    model = Block(dropout=0.9).train()
    x = torch.randn(B, L, D)
    first, second = attention_maps(model, x), attention_maps(model, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["first"] > 0).all()


def test_masks_given_by_position_or_by_name_count() -> None:
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[:, -2:] = True
    for weights in attention_maps(Block(), torch.randn(B, L, D), mask=padding).values():
        assert (weights[..., -2:] == 0).all()
        assert (weights[..., :-2] > 0).all()


def test_inside_torchs_encoder_in_eval() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, H, 11, batch_first=True), num_layers=2, enable_nested_tensor=False
    )
    for one in encoder.layers:
        one.self_attn = layer("optimised")
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0, 4:] = True
    found = attention_maps(encoder.eval(), torch.randn(B, L, D), src_key_padding_mask=padding)
    assert list(found) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert (found["layers.0.self_attn"][0, ..., 4:] == 0).all()
    assert (found["layers.0.self_attn"][1] > 0).all()


def test_cross_attention_and_unbatched_input() -> None:
    model = layer()
    query, keys = torch.randn(4, D), torch.randn(L, D)
    assert attention_maps(model, query, keys, keys)[""].shape == (H, 4, L)


def test_a_layer_called_again_is_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.attention(x, x, x, need_weights=False)[0]
            return x

    found = attention_maps(Twice(), torch.randn(B, L, D))
    assert list(found) == ["attention", "attention#2", "attention#3"]
    assert not torch.equal(found["attention"], found["attention#2"])


def test_other_hooks_fire_once() -> None:
    model, calls = layer(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    attention_maps(model, *[torch.randn(B, L, D)] * 3)
    assert calls == [1]


def test_a_model_without_attention_has_no_maps() -> None:
    assert attention_maps(nn.Linear(2, 2), torch.zeros(1, 2)) == {}


def test_alignment_kernels() -> None:
    model = nn.ModuleDict(
        {
            "shared": layer("super"),
            "plain": layer("efficient"),
            "each": layer("standard+align", align_heads="per_head"),
            "causal": layer("super", align_causal=True),
        }
    )
    with torch.no_grad():
        model["causal"].align.weight.add_(1.0)  # type: ignore[union-attr,operator]
    found = alignment_kernels(model)
    assert [(name, tuple(weight.shape)) for name, weight in found] == [
        ("shared", (L, L)),
        ("each", (H, L, L)),
        ("causal", (L, L)),
    ]
    assert torch.equal(found[2][1], found[2][1].tril())
    before = found[0][1].clone()
    found[0][1].zero_()  # a copy: the model's own stays
    assert torch.equal(alignment_kernels(model)[0][1], before)
