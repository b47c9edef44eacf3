"""The vision transformer: size, patches, pixels, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from better_attention import MECHANISMS, MultiheadAttention
from better_attention.lab.models.initialisation import keras_
from better_attention.lab.models.vision_transformer import VisionTransformer, patches

SMALL = {"image_size": 6, "patch": 3, "channels": 1, "classes": 5, "width": 6, "layers": 2, "heads": 3}


def build(mechanism: str = "standard", **changes: int) -> VisionTransformer:
    return VisionTransformer(mechanism=mechanism, **(SMALL | changes)).double().eval()


@pytest.mark.parametrize(
    ("mechanism", "attention"),
    [("standard", 66_048), ("optimised", 49_536), ("efficient", 33_024), ("super", 37_184), ("expressive", 66_048)],
)
def test_has_the_attention_parameters_of_the_papers_mnist_model(mechanism: str, attention: int) -> None:
    sizes = {"image_size": 32, "patch": 4, "channels": 1, "classes": 10, "width": 128, "layers": 2, "heads": 4}
    model = VisionTransformer(mechanism=mechanism, **sizes)
    layers = [m for m in model.modules() if isinstance(m, MultiheadAttention)]
    assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == [attention] * 2
    # 276,874 is the "300K" of the paper; a flattened head would alone hold 8,192 weights a class or hidden unit.
    assert sum(p.numel() for p in model.parameters()) == 276_874 - 2 * (66_048 - attention)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_those_of_torch_unfold(channels: int) -> None:
    images = torch.rand(5, 6, 9, channels)
    unfolded = F.unfold(images.permute(0, 3, 1, 2), kernel_size=3, stride=3)  # (B, C * P * P, L), channels first
    expected = unfolded.reshape(5, channels, 9, 6).permute(0, 3, 2, 1).reshape(5, 6, 9 * channels)
    assert torch.equal(patches(images, 3), expected)
    if channels == 1:
        assert torch.equal(patches(images[..., 0], 3), expected)


def test_an_empty_batch_has_no_logits() -> None:
    assert build()(torch.zeros(0, 6, 6)).shape == (0, 5)


def test_pixels_are_read_relative_to_the_peak() -> None:
    model = build(peak=16)
    images = torch.randint(17, (5, 6, 6), dtype=torch.uint8)
    brighter = build(peak=255)
    brighter.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), brighter(images.double() * (255 / 16)))
    assert not torch.allclose(model(images), brighter(images))


def test_a_patch_that_does_not_divide_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size=6 is not a multiple of patch=4"):
        build(patch=4)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_parameter_is_trained_and_weights_are_not_asked_for(mechanism: str) -> None:
    model, asked = build(mechanism), []
    for layer in model.modules():
        if isinstance(layer, MultiheadAttention):
            layer.register_forward_pre_hook(lambda _, __, kw: asked.append(kw["need_weights"]), with_kwargs=True)
    model(torch.randint(256, (7, 6, 6), dtype=torch.uint8)).pow(2).sum().backward()
    assert asked == [False, False]
    for name, parameter in model.named_parameters():
        if "k_proj.bias" in name and MECHANISMS[mechanism].score == "softmax":
            continue  # it shifts every score of a query alike, which softmax takes out
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_place_of_a_patch_matters() -> None:
    model, images = build(), torch.randint(256, (3, 6, 6), dtype=torch.uint8)
    assert not torch.allclose(model(images), model(images.flip(2)))


def test_dropout_acts_in_training_alone() -> None:
    model, images = build(), torch.randint(256, (3, 6, 6), dtype=torch.uint8)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_initial_weights_are_keras_own_outside_attention() -> None:
    model = build()
    glorot = (6 / (9 + 6)) ** 0.5
    assert model.embed.weight.abs().max() <= glorot
    assert model.embed.weight.abs().max() > glorot / 2
    assert torch.equal(model.embed.bias, torch.zeros(6, dtype=torch.float64))
    assert model.positions.weight.abs().max() <= 0.05
    layer = nn.Sequential(MultiheadAttention(6, 3))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    keras_(layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize(
    ("mechanism", "attention"),
    [("standard", 263_168), ("optimised", 197_376), ("efficient", 131_584), ("super", 197_890)],
)
def test_with_a_class_token_it_has_the_attention_parameters_of_the_papers_cifar100_model(
    mechanism: str, attention: int
) -> None:
    sizes = {"image_size": 32, "patch": 2, "channels": 3, "classes": 100, "width": 256, "layers": 8, "heads": 8}
    with torch.device("meta"):
        model = VisionTransformer(mechanism=mechanism, class_token=True, **sizes)
    layers = [m for m in model.modules() if isinstance(m, MultiheadAttention)]
    assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == [attention] * 8


@pytest.mark.parametrize(
    ("mechanism", "width", "layers", "millions"),
    [
        ("standard", 768, 8, "60.54"),
        ("optimised", 816, 8, "60.12"),
        ("efficient", 804, 9, "60.09"),
        ("super", 804, 9, "60.44"),
    ],
)
def test_it_has_the_size_of_the_papers_imagenet_models(mechanism: str, width: int, layers: int, millions: str) -> None:
    sizes = {"image_size": 112, "patch": 8, "channels": 3, "classes": 1000, "heads": 12, "mlp": 3072}
    options = {"head_hidden": 2000, "final_norm": False, "embed_bias": False}
    with torch.device("meta"):
        model = VisionTransformer(mechanism=mechanism, width=width, layers=layers, **sizes, **options)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions


def test_the_class_token_alone_is_read_and_sees_every_patch() -> None:
    model, images = build(class_token=True), torch.randint(256, (3, 6, 6), dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda _, __, normed: seen.append(normed))
    logits = model(images)
    assert seen[0].shape == (3, 5, 6)  # four patches behind the token
    torch.testing.assert_close(logits, seen[0][:, 0] @ model.head.weight.T + model.head.bias)
    for y, x in ((0, 0), (5, 5)):
        other = images.clone()
        other[:, y, x] ^= 128
        assert not torch.allclose(model(other), logits)


def test_without_a_class_token_the_patches_are_averaged() -> None:
    model, images = build(head_hidden=7, final_norm=False), torch.randint(256, (3, 6, 6), dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    logits = model(images)
    hidden = F.gelu(seen[0].mean(dim=1) @ model.head_hidden.weight.T + model.head_hidden.bias)
    torch.testing.assert_close(logits, hidden @ model.head.weight.T + model.head.bias)


def test_every_option_of_the_model_is_trained_too() -> None:
    model = build(class_token=True, mlp=5, head_hidden=7, embed_bias=False)
    assert model.embed.bias is None
    assert model.blocks[0].expand.out_features == 5
    model(torch.randint(256, (7, 6, 6), dtype=torch.uint8)).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if "k_proj.bias" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_options_change_nothing_where_they_are_not_used() -> None:
    """Runs that were trained before the options existed load, and new ones start from the same weights."""
    torch.manual_seed(3)
    plain = build().state_dict()
    torch.manual_seed(3)
    same = build(class_token=False, mlp=12, head_hidden=0, final_norm=True, embed_bias=True).state_dict()
    assert list(plain) == list(same)
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert {name.split(".")[0] for name in plain} == {"embed", "positions", "blocks", "norm", "head"}
