"""A class for timm's ``attn_layer=``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.adapters.timm import timm_attention
from helpers import hosts
from helpers.layers import refused
from helpers.registry import scored_mechanisms

B, TOKENS, WIDTH, HEADS = 3, 5, 24, 3


def model(layer: type[nn.Module] | str, **options: object) -> nn.Module:
    timm = hosts.library("timm")
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, num_classes=5, embed_dim=WIDTH, depth=2, num_heads=HEADS, mlp_ratio=1.5,
        attn_layer=layer, **options,
    )  # fmt: skip


def with_weights_of(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    """``ours``, standard attention, with the weights of timm's own model."""
    state = dict(theirs.state_dict())
    for name in [name for name in state if ".attn." in name]:
        value, (block, _, part) = state.pop(name), name.partition(".attn.")
        kind = part.rpartition(".")[2]
        if part.startswith("qkv"):
            for letter, chunk in zip("qkv", value.chunk(3), strict=True):
                state[f"{block}.attn.attention.{letter}_proj.{kind}"] = chunk
        else:
            state[f"{block}.attn.attention.out_proj.{kind}"] = value
    ours.load_state_dict(state)
    return ours


@pytest.mark.hosts
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("proj_bias", [True, False])
def test_standard_equals_timms_own_layer(qkv_bias: bool, proj_bias: bool) -> None:
    theirs = hosts.random(model("attn", qkv_bias=qkv_bias, proj_bias=proj_bias)).eval()
    ours = with_weights_of(model(timm_attention(), qkv_bias=qkv_bias, proj_bias=proj_bias), theirs).eval()
    x = torch.randn(B, 3, 8, 8)
    for inference in (True, False):  # in one compiled call, and step by step
        with torch.inference_mode(inference):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    a, b = (torch.autograd.grad(m(x).square().sum(), m.patch_embed.proj.weight)[0] for m in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.hosts
@pytest.mark.parametrize("name", scored_mechanisms())
def test_every_mechanism_trains_inside_a_vision_transformer(name: str) -> None:
    layer = timm_attention(name, **ba.Mechanism.of(name).layer_options(TOKENS))
    made = model(layer, qkv_bias=True, drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1)
    made(torch.randn(B, 3, 8, 8)).square().sum().backward()
    idle = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in idle if "k_proj.bias" not in n] == []  # which cancels in softmax, up to rounding


def hides(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


@pytest.mark.parametrize("lead", [(), (B,), (B, 1), (1, HEADS), (B, HEADS)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_mean_what_they_mean_in_timm(lead: tuple[int, ...], kind: str) -> None:
    layer = timm_attention("standard")(WIDTH, num_heads=HEADS)
    x = torch.randn(B, TOKENS, WIDTH)
    keep = torch.rand(*lead, TOKENS, TOKENS) < 0.6
    keep[..., 0] = True
    q, k, v = (
        part(x).view(B, TOKENS, HEADS, -1).transpose(1, 2)
        for part in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
    )
    wide = keep[:, None] if keep.dim() == 3 else keep
    heads = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=wide)
    expected = layer.attention.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, keep if kind == "bool" else hides(keep)), expected)


def test_causal() -> None:
    layer = timm_attention("efficient+expressive")(WIDTH, num_heads=HEADS)
    x = torch.randn(B, TOKENS, WIDTH)
    changed = x.clone()
    changed[:, -1] = 7.0
    a, b = layer(x, is_causal=True), layer(changed, is_causal=True)
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_what_the_layer_does_not_have_is_refused() -> None:
    refused(lambda: timm_attention("super"), "max_len")
    refused(lambda: timm_attention("efficient", max_len=5), "max_len", "efficient")
    refused(lambda: timm_attention("softest"), "softest")
    refused(lambda: timm_attention()(WIDTH, num_heads=HEADS, qk_norm=True), "qk_norm")
    refused(lambda: timm_attention()(WIDTH, num_heads=HEADS, scale_norm=True), "scale_norm")
    refused(
        lambda: timm_attention()(WIDTH, num_heads=HEADS)(torch.ones(1, 5, WIDTH), torch.ones(5)), "attn_mask", "(5,)"
    )
    layer = timm_attention("super", max_len=TOKENS)(WIDTH, num_heads=HEADS)
    refused(lambda: layer(torch.ones(1, TOKENS + 1, WIDTH)), "max_len", TOKENS)


def test_dropout_acts_in_training_alone() -> None:
    layer = timm_attention("efficient")(WIDTH, num_heads=HEADS, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(B, TOKENS, WIDTH)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
