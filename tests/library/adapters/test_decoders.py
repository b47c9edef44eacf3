"""Decoders of transformers: GPT-2 and Llama, with their caches, padding and generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.adapters.host_attention import HostAttention
from helpers import hosts
from helpers.layers import refused

pytestmark = pytest.mark.hosts
B, L, NEW = 3, 7, 6
MODELS = {
    "gpt2": lambda heads=3, **o: hosts.gpt2(24, heads, **o),
    "llama": lambda heads=3, **o: hosts.llama(24, heads, **o),
    "llama, grouped": lambda heads=4, **o: hosts.llama(32, heads, groups=max(heads // 2, 1), **o),
}
MECHANISMS = ["standard", "optimised", "efficient", "super", "efficient+expressive"]


def ids(length: int = L) -> Tensor:
    return torch.randint(5, hosts.VOCABULARY, (B, length))


def padding(left: bool) -> Tensor:
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, : 2 if left else 0] = 0
    mask[2, slice(0, 3) if left else slice(L - 3, L)] = 0
    return mask


def converted(name: str, mechanism: str, attention: str = "sdpa") -> Any:
    model = MODELS[name](attention=attention).eval()
    aligned = ba.Mechanism.of(mechanism).aligned
    ba.convert(model, mechanism, exact=False, max_len=L + NEW if aligned else None)
    with torch.no_grad():
        for layer in layers(model):
            if layer.mechanism.aligned:
                layer.align.weight.add_(0.3 * torch.randn_like(layer.align.weight))
                if layer.align.bias is not None:
                    layer.align.bias.normal_()
    return model


def layers(model: Any) -> list[HostAttention]:
    return [m for m in model.modules() if isinstance(m, HostAttention)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_standard_gives_the_hosts_outputs_and_gradients(name: str, heads: int, attention: str, training: bool) -> None:
    width = {"width": 24, "heads": heads} if heads == 2 else {"width": 64, "heads": 4}
    make = hosts.gpt2 if name == "gpt2" else hosts.llama
    groups = {"groups": 2} if "grouped" in name else {}
    model = make(**width, **groups, attention=attention).train(training)
    twin, x = copy.deepcopy(model), ids()
    assert ba.convert(model, "standard").exact
    for mask in (None, padding(left=True), padding(left=False)):
        results = []
        for one in (model, twin):
            one.zero_grad()
            logits = one(x, attention_mask=mask).logits
            logits = logits if mask is None else logits[mask.bool()]
            logits.sin().sum().backward()
            results.append((logits, hosts.gradients(one)))
        hosts.assert_same(results[0][0], results[1][0], 1e-5)
        for key, grad in results[0][1].items():
            hosts.assert_same(grad, results[1][1][key], 1e-4)


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super"])
def test_one_head_of_gpt2_is_exact_in_every_mechanism(mechanism: str) -> None:
    model, x, mask = MODELS["gpt2"](heads=1).eval(), ids(), padding(left=False)
    want = model(x, attention_mask=mask).logits[mask.bool()]
    assert ba.convert(model, mechanism, max_len=L if mechanism == "super" else None).exact
    got = model(x, attention_mask=mask).logits[mask.bool()]
    hosts.assert_same(got, want, 1e-5)


def test_one_head_of_llama_is_exact_without_w_v_and_refused_without_w_k() -> None:
    model, x = MODELS["llama"](heads=1).eval(), ids()
    want = model(x).logits
    refused(lambda: ba.convert(model, "efficient"), "rotary", kind=ValueError)
    assert ba.convert(model, "optimised").exact
    hosts.assert_same(model(x).logits, want, 1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", list(MODELS))
def test_no_token_sees_a_later_one(name: str, mechanism: str) -> None:
    model, x = converted(name, mechanism), ids()
    other = x.clone()
    other[:, 4:] = ids(L - 4)
    one, two = (model(y).logits[:, :4] for y in (x, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


# --- caches and generation --------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Greedy tokens by the whole sequence at each step."""
    for _ in range(NEW):
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        x = torch.cat([x, logits.argmax(-1, keepdim=True)], dim=1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(B, 1)], dim=1)
    return x


def generate(model: Any, x: Tensor, **options: Any) -> Tensor:
    return model.generate(x, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", list(MODELS))
def test_generation_with_a_cache_equals_generation_without(name: str, mechanism: str, attention: str) -> None:
    model, x = converted(name, mechanism, attention), ids()
    assert torch.equal(generate(model, x), by_hand(model, x))


@pytest.mark.parametrize("mechanism", ["standard", "efficient", "super"])
@pytest.mark.parametrize("name", list(MODELS))
def test_generation_from_padded_prompts(name: str, mechanism: str) -> None:
    model, mask = converted(name, mechanism), padding(left=True)
    x = ids().masked_fill(mask == 0, 0)
    assert torch.equal(generate(model, x, attention_mask=mask), by_hand(model, x, mask))


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super"])
@pytest.mark.parametrize("name", list(MODELS))
def test_beams_and_caches_of_fixed_length(name: str, mechanism: str) -> None:
    model, x = converted(name, mechanism), ids()
    beams = generate(model, x, num_beams=3)
    assert torch.equal(beams, generate(model, x, num_beams=3, use_cache=False))
    if mechanism == "super":  # a fixed cache is as long as W_A
        return
    assert torch.equal(generate(model, x, cache_implementation="static"), by_hand(model, x))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_cache_of_efficient_holds_one_tensor_and_as_many_bytes_as_reported(name: str) -> None:
    model = MODELS[name]().eval()
    report = ba.convert(model, "efficient", exact=False)
    cache = model(ids(), use_cache=True).cache
    for row, layer in zip(report.layers, cache.layers, strict=True):
        held = (layer.keys.numel() + layer.values.numel()) * layer.keys.itemsize
        assert held == B * L * row.size_after.cache_bytes
        assert layer.get_seq_length() == L


@pytest.mark.parametrize("name", list(MODELS))
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = converted(name, "super"), ids()
    ba.save_converted(model, tmp_path)
    loaded = ba.load_converted(MODELS[name]().eval(), tmp_path)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded.get_output_embeddings().weight.shape == model.get_output_embeddings().weight.shape


@pytest.mark.parametrize("name", list(MODELS))
def test_calibration_comes_closer(name: str) -> None:
    """With rotary positions too, whose distances stand between query and key."""
    model, samples = MODELS[name]().eval(), [{"input_ids": ids()} for _ in range(8)]
    report = ba.convert(model, "efficient", exact=False, calibration=samples)
    assert all(row.error_after < 0.95 * row.error_before for row in report.layers)
    assert all(0 < head.residual < 1 for row in report.layers for head in row.heads)


def test_super_longer_than_its_kernel_says_what_to_do() -> None:
    model = converted("gpt2", "super")
    refused(lambda: model(ids(L + NEW + 1)), "max_len=13", "14", kind=ValueError)


def test_a_full_kernel_in_a_causal_layer_is_refused() -> None:
    options = {"exact": False, "max_len": L, "align_causal": False}
    refused(lambda: ba.convert(MODELS["gpt2"](), "super", **options), "causal", "later tokens", kind=ValueError)


def test_tied_embeddings_stay_tied() -> None:
    model = MODELS["gpt2"]().eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    ba.convert(model, "efficient", exact=False)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_cross_attention_of_gpt2() -> None:
    model = hosts.gpt2(24, 3, add_cross_attention=True).eval()
    x, states = ids(), torch.randn(B, 5, 24)
    want = model(x, encoder_hidden_states=states, use_cache=True)
    report = ba.convert(model, "standard")
    assert len(report.layers) == 4
    got = model(x, encoder_hidden_states=states, use_cache=True)
    hosts.assert_same(got.logits, want.logits, 1e-5)
    after = [model(ids(1) * 0 + 7, encoder_hidden_states=states, cache=r.cache).logits for r in (got,)]
    ba.revert(model)
    before = model(ids(1) * 0 + 7, encoder_hidden_states=states, cache=want.cache).logits
    hosts.assert_same(after[0], before, 1e-5)
