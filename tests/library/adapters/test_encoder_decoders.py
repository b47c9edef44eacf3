"""T5 and Whisper: an encoder, a decoder with a cache of its own and one of the encoder's output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.adapters.host_attention import HostAttention
from helpers import hosts
from helpers.layers import refused

pytestmark = pytest.mark.hosts
B, L, T, NEW = 3, 7, 5, 6
MECHANISMS = ["standard", "optimised", "efficient", "efficient+expressive"]


def ids(length: int = L) -> Tensor:
    return torch.randint(5, hosts.VOCABULARY, (B, length))


def padding() -> Tensor:
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, 5:] = 0
    return mask


def t5_inputs(padded: bool) -> dict[str, Tensor]:
    given = {"input_ids": ids(), "decoder_input_ids": ids(T)}
    return {**given, "attention_mask": padding()} if padded else given


def whisper_inputs(padded: bool) -> dict[str, Tensor]:
    return {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": ids(T)}


HOSTS = {
    "t5": (hosts.t5, t5_inputs, lambda result: result.logits),
    "whisper": (hosts.whisper, whisper_inputs, lambda result: result.last_hidden_state),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [(24, 3), (64, 4)], ids=["small", "larger"])
@pytest.mark.parametrize("name", list(HOSTS))
def test_standard_gives_the_hosts_outputs_and_gradients(
    name: str, size: tuple[int, int], attention: str, padded: bool, training: bool
) -> None:
    make, inputs, output = HOSTS[name]
    model = make(*size, attention=attention).train(training)
    twin, given = copy.deepcopy(model), inputs(padded)
    report = ba.convert(model, "standard")
    assert report.exact
    assert len(report.layers) == 6
    outputs = [output(one(**given)) for one in (model, twin)]
    hosts.assert_same(*outputs, 1e-5)
    for one in outputs:
        one.sin().sum().backward()
    grads = [hosts.gradients(m) for m in (model, twin)]
    for key, grad in grads[0].items():
        hosts.assert_same(grad, grads[1][key], 1e-4)


def test_the_bias_of_relative_positions_keeps_its_gradient() -> None:
    model = hosts.t5(24, 3)
    twin, given = copy.deepcopy(model), t5_inputs(padded=True)
    ba.convert(model, "standard")
    for one in (model, twin):
        one(**given).logits.sin().sum().backward()
    for side in ("encoder", "decoder"):
        name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        grads = [dict(one.named_parameters())[name].grad for one in (model, twin)]
        hosts.assert_same(*grads, 1e-4)


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super"])
@pytest.mark.parametrize("name", list(HOSTS))
def test_one_head_is_exact_in_every_mechanism(name: str, mechanism: str) -> None:
    make, inputs, output = HOSTS[name]
    model, given = make(24, 1).eval(), inputs(True)
    want = output(model(**given))
    assert ba.convert(model, mechanism, max_len=10 if mechanism == "super" else None).exact
    hosts.assert_same(output(model(**given)), want, 1e-5)


@torch.no_grad()
def by_hand(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Greedy tokens by the whole decoder at each step."""
    x = torch.zeros(B, 1, dtype=torch.long)
    for _ in range(NEW):
        logits = model(**given, decoder_input_ids=x, use_cache=False).logits[:, -1]
        x = torch.cat([x, logits.argmax(-1, keepdim=True)], dim=1)
    return x


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_t5_generates_with_a_cache_as_without(mechanism: str, attention: str, cache: str) -> None:
    model = hosts.t5(24, 3, attention=attention).eval()
    ba.convert(model, mechanism, exact=False)
    given = {"input_ids": ids(), "attention_mask": padding()}
    options = {"cache_implementation": "static"} if cache == "static" else {}
    got = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
    assert torch.equal(got, by_hand(model, given))


def test_super_in_the_encoder_of_t5_generates() -> None:
    model = hosts.t5(24, 3).eval()
    ba.convert(model, "super", layers="encoder.*", exact=False, max_len=L)
    given = {"input_ids": ids(), "attention_mask": padding()}
    got = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, by_hand(model, given))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_whisper_decodes_step_by_step_as_at_once(mechanism: str) -> None:
    model = hosts.whisper(24, 3).eval()
    ba.convert(model, mechanism, exact=False)
    given = whisper_inputs(False)
    x = given.pop("decoder_input_ids")
    with torch.no_grad():
        whole = model(**given, decoder_input_ids=x, use_cache=False).last_hidden_state
        states, cache, steps = model.encoder(**given), None, []
        for t in range(T):
            result = model(encoder_outputs=states, decoder_input_ids=x[:, t : t + 1], cache=cache, use_cache=True)
            cache = result.cache
            steps.append(result.last_hidden_state)
    hosts.assert_same(torch.cat(steps, dim=1), whole, 1e-5)


def test_heads_that_do_not_fill_the_width_cannot_be_slices() -> None:
    model = hosts.t5(24, 3, head_dim=5).eval()
    given = t5_inputs(padded=True)
    want = model(**given).logits
    refused(lambda: ba.convert(model, "efficient", exact=False), "24 wide", "3 heads of 5 need 15", kind=ValueError)
    ba.convert(model, "standard")
    hosts.assert_same(model(**given).logits, want, 1e-5)


def test_only_the_encoder_of_whisper() -> None:
    model, given = hosts.whisper(24, 3).eval(), whisper_inputs(False)
    samples = [whisper_inputs(False) for _ in range(3)]
    report = ba.convert(model, "efficient", layers="encoder.*", exact=False, calibration=samples)
    assert [row.name for row in report.layers] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert all(row.error_after < row.error_before for row in report.layers)
    assert not any(isinstance(m, HostAttention) for m in model.decoder.modules())
    assert model(**given).last_hidden_state.isfinite().all()
