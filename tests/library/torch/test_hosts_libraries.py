"""The layer inside other people's libraries; each test is skipped where its library is missing (`make test-hosts`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from helpers import hosts
from helpers.layers import NAMED, layer

pytestmark = [
    pytest.mark.hosts,
    # The libraries' own warnings, at import and of other code than ours.
    pytest.mark.filterwarnings("ignore"),
]

B, S, N, E = 3, 5, 2, 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def library(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name} is in the `hosts` extra", exc_type=ImportError)


def outputs(module: nn.Module, *, need_weights: bool = False) -> Tensor:
    x = torch.linspace(-1, 1, B * S * E, dtype=torch.float64).sin().view(B, S, E).float()
    return module(x, x, x, need_weights=need_weights)[0]


def close(found: Tensor, expected: Tensor, share: float) -> None:
    """Within a share of the largest output, and not equal to it: quantisation has to have happened."""
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=share * expected.abs().max().item())


# --- adapters and quantisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_peft_lora(name: str, tmp_path: Path) -> None:
    peft = hosts.library("peft")
    module = layer(name, E, N, spread=0.1, max_len=S).eval()
    before = outputs(module).detach()
    learned = [p for p in PROJECTIONS if isinstance(getattr(module, p), nn.Linear)]
    config = peft.LoraConfig(target_modules=learned, r=2, init_lora_weights=False)
    model = peft.get_peft_model(nn.ModuleDict({"attention": copy.deepcopy(module)}), config).eval()
    adapted = outputs(model.base_model.model["attention"])
    assert not torch.allclose(adapted, before, atol=1e-3)
    adapted.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(learned)
    assert all(p.grad is not None for p in trained)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(nn.ModuleDict({"attention": copy.deepcopy(module)}), tmp_path).eval()
    assert torch.equal(outputs(loaded.base_model.model["attention"]), adapted)
    with torch.no_grad():
        merged = model.merge_and_unload()["attention"]
        torch.testing.assert_close(outputs(merged), adapted.detach(), rtol=1e-4, atol=1e-4)
        assert type(merged.q_proj) is nn.Linear


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("name", NAMED)
def test_torchao_int8(name: str, config: str) -> None:
    quantization = library("torchao.quantization")
    module = layer(name, E, N, spread=0.1, max_len=S).eval()
    expected = outputs(module).detach()
    quantization.quantize_(module, getattr(quantization, config)())
    with torch.no_grad():
        for need_weights in (False, True):
            close(outputs(module, need_weights=need_weights), expected, 0.05)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
@pytest.mark.parametrize("name", NAMED)
def test_bitsandbytes(name: str, kind: str) -> None:
    bnb = library("bitsandbytes")
    module = layer(name, E, N, spread=0.1, max_len=S).eval().requires_grad_(False)
    expected = outputs(module)
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"compute_dtype": torch.float32}
    for attribute in PROJECTIONS:
        if isinstance(child := getattr(module, attribute), nn.Linear):
            quantised = getattr(bnb.nn, kind)(E, E, **options)
            quantised.load_state_dict(child.state_dict())
            setattr(module, attribute, quantised.to("cpu"))
    assert module.q_proj.weight.dtype in (torch.int8, torch.uint8)
    with torch.no_grad():
        for need_weights in (False, True):
            close(outputs(module, need_weights=need_weights), expected, 0.05 if kind == "Linear8bitLt" else 0.4)


# --- gradients per sample -------------------------------------------------------------------------------------------

PER_SAMPLE: dict[str, dict[str, object]] = {
    **{name: {} for name in NAMED},
    "super causal": {},
    "super per head": {},
    "standard with extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "efficient with extra keys and a scale": {"add_bias_kv": True, "scale": "learned"},
    "expressive with a scale": {"scale": "learned"},
}


@pytest.mark.parametrize("case", PER_SAMPLE)
def test_opacus_has_every_parameters_gradient_per_sample(case: str) -> None:
    grad_sample = library("opacus.grad_sample")
    name = case.split(" with ")[0]
    module = layer(name, E, N, spread=0.1, max_len=S, **PER_SAMPLE[case])
    x = torch.randn(B, S, E)
    expected = []
    for sample in x.split(1):
        module.zero_grad()
        module(sample, sample, sample, need_weights=False)[0].square().sum().backward()
        expected.append({key: parameter.grad.clone() for key, parameter in module.named_parameters()})
    module.zero_grad()
    wrapped = grad_sample.GradSampleModule(module, batch_first=True, loss_reduction="sum")
    wrapped(x, x, x, need_weights=False)[0].square().sum().backward()
    for key, parameter in module.named_parameters():
        for found, sample in zip(parameter.grad_sample, expected, strict=True):
            torch.testing.assert_close(
                found, sample[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


# --- models of transformers, built with this class in the place of torch's --------------------------------------------


def siglip(name: str) -> nn.Module:
    transformers = library("transformers")
    config = getattr(transformers, f"{name}VisionConfig")(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        **({"num_patches": 4} if name == "Siglip2" else {}),
    )  # fmt: skip
    return getattr(transformers, f"{name}VisionModel")(config)


def bridgetower() -> nn.Module:
    modeling = library("transformers.models.bridgetower.modeling_bridgetower")
    config = library("transformers").BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        text_config={
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "vocab_size": 11,
        },
    )  # fmt: skip
    return modeling.BridgeTowerModel(config)


def swin() -> object:
    return library("transformers").SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


SEGMENTER = {
    "hidden_dim": 64,
    "num_attention_heads": 2,
    "num_queries": 3,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
}


def mask2former() -> nn.Module:
    transformers = library("transformers")
    sizes = {"feature_size": 64, "mask_feature_size": 64, "encoder_feedforward_dim": 32}
    return transformers.Mask2FormerModel(transformers.Mask2FormerConfig(backbone_config=swin(), **SEGMENTER, **sizes))


def oneformer() -> nn.Module:
    transformers = library("transformers")
    text = {"text_encoder_width": 64, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 11}
    sizes = {"mask_dim": 64, "conv_dim": 64, "is_training": True}
    return transformers.OneFormerModel(
        transformers.OneFormerConfig(backbone_config=swin(), **SEGMENTER, **sizes, **text)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SigLIP": lambda: siglip("Siglip"),
    "SigLIP 2": lambda: siglip("Siglip2"),
    "BridgeTower": bridgetower,
    "Mask2Former": mask2former,
    "OneFormer": oneformer,
}


@pytest.mark.parametrize("model", MODELS)
def test_transformers_models_initialise_the_layer_as_torchs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention weight has the spread that torch's layer has in the same model, and every bias is as there."""
    torch.manual_seed(1)
    stock = MODELS[model]()
    expected = {key: m for key, m in stock.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert expected
    monkeypatch.setattr(nn, "MultiheadAttention", ba.MultiheadAttention)
    torch.manual_seed(1)
    ours = MODELS[model]()
    if model in ("Mask2Former", "OneFormer"):  # their decoders draw every matrix in one loop
        ba.MultiheadAttention.redraw(ours.transformer_module.decoder)
    found = {key: m for key, m in ours.named_modules() if isinstance(m, ba.MultiheadAttention)}
    assert set(found) == set(expected)
    for key, attention in found.items():
        for attribute in ("in_proj_weight", "in_proj_bias"):
            wanted, got = getattr(expected[key], attribute), getattr(attention, attribute)
            assert got.std().item() == pytest.approx(wanted.std().item(), rel=0.1, abs=1e-9), (key, attribute)
        for attribute in ("weight", "bias"):
            wanted, got = getattr(expected[key].out_proj, attribute), getattr(attention.out_proj, attribute)
            assert got.std().item() == pytest.approx(wanted.std().item(), rel=0.1, abs=1e-9), (key, attribute)
    monkeypatch.undo()
    for key, attention in found.items():
        attention.load_state_dict(expected[key].state_dict())


def test_every_library_of_the_extra_is_tried() -> None:
    """Says which of them are here."""
    here = []
    for name in ("bitsandbytes", "opacus", "peft", "transformers"):
        try:
            import_module(name)
        except ImportError:
            continue
        here.append(name)
    if len(here) < 4:
        pytest.skip(f"here are {here or 'none'} of the libraries of the `hosts` extra: `make test-hosts` installs them")
