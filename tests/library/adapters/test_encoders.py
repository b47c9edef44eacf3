"""Encoders of transformers and timm: ViT, BERT, RoBERTa, DistilBERT, timm's vision transformers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import better_attention as ba
from better_attention.adapters.host_attention import HostAttention
from helpers import hosts
from helpers.layers import refused

pytestmark = pytest.mark.hosts
B, L = 3, 7


def ids(length: int = L) -> Tensor:
    return torch.randint(5, hosts.VOCABULARY, (B, length))


def padding(left: bool = False) -> Tensor:
    """What transformers calls an attention mask: 1 for a token, 0 for padding."""
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1:, : 2 if left else L] = 0
    if not left:
        mask[1:, : L - 2] = 1
    return mask


@dataclass(frozen=True)
class Case:
    """A host: how it is made with some number of heads, its inputs, what it returns, how many tokens it has."""

    make: Callable[..., nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    output: Callable[[Any], Tensor]
    tokens: int
    padded: bool = False


def hidden(result: Any) -> Tensor:
    return result.last_hidden_state


CASES = {
    "vit": Case(hosts.vit, lambda: {"pixel_values": torch.randn(B, 3, 8, 8)}, hidden, 5),
    "bert": Case(hosts.bert, lambda: {"input_ids": ids()}, hidden, L, True),
    "roberta": Case(hosts.roberta, lambda: {"input_ids": ids()}, hidden, L, True),
    "distilbert": Case(hosts.distilbert, lambda: {"input_ids": ids()}, hidden, L, True),
    "timm": Case(hosts.timm_vit, lambda: {"x": torch.randn(B, 3, 8, 8)}, lambda result: result, 5),
}
SIZES = {"small": {"width": 24, "heads": 3}, "larger": {"width": 64, "heads": 4}}
UPWARDS = ("optimised", "standard")


def every_mask(case: Case) -> list[dict[str, Tensor]]:
    masks = [{}]
    return [*masks, {"attention_mask": padding()}, {"attention_mask": padding(left=True)}] if case.padded else masks


def real(mask: dict[str, Tensor], output: Tensor) -> Tensor:
    """The outputs at tokens that are no padding."""
    return output[mask["attention_mask"].bool()] if mask else output


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("name", list(CASES))
def test_standard_gives_the_hosts_outputs_and_gradients(name: str, size: str, attention: str, training: bool) -> None:
    case = CASES[name]
    model = case.make(**SIZES[size], attention=attention).train(training)
    twin, inputs = copy.deepcopy(model), case.inputs()
    report = ba.convert(model, "standard")
    assert report.exact
    assert len(report.layers) == 2
    for mask in every_mask(case):
        outputs, grads = [], []
        for one in (model, twin):
            one.zero_grad()
            output = real(mask, case.output(one(**inputs, **mask)))
            output.sin().sum().backward()
            outputs.append(output)
            grads.append(hosts.gradients(one))
        hosts.assert_same(*outputs, 1e-5)
        assert grads[0].keys() == grads[1].keys()
        for key, grad in grads[0].items():
            hosts.assert_same(grad, grads[1][key], 1e-4)


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super"])
@pytest.mark.parametrize("name", list(CASES))
def test_one_head_is_exact_in_every_mechanism(name: str, mechanism: str) -> None:
    case = CASES[name]
    model, inputs = case.make(width=24, heads=1).eval(), case.inputs()
    aligned = ba.Mechanism.of(mechanism).aligned
    masks = every_mask(case)
    with torch.no_grad():
        want = [real(mask, case.output(model(**inputs, **mask))) for mask in masks]
        assert ba.convert(model, mechanism, max_len=case.tokens if aligned else None).exact
        for mask, old in zip(masks, want, strict=True):
            hosts.assert_same(real(mask, case.output(model(**inputs, **mask))), old, 1e-5)
    assert all(m.mechanism.name == mechanism for m in model.modules() if isinstance(m, HostAttention))


@pytest.mark.parametrize("name", list(CASES))
def test_several_heads_are_approximated_on_request_and_go_upwards_exactly(name: str) -> None:
    case = CASES[name]
    model, inputs = case.make(width=24, heads=3).eval(), case.inputs()
    modules, before = dict(model.named_modules()), case.output(model(**inputs))
    refused(lambda: ba.convert(model, "efficient"), "3 heads", "exact=False", kind=ValueError)
    assert dict(model.named_modules()) == modules
    ba.convert(model, "efficient", exact=False)
    efficient = case.output(model(**inputs))
    assert (efficient - before).abs().max() > 1e-3
    for mechanism in UPWARDS:
        assert ba.convert(model, mechanism).exact
        hosts.assert_same(case.output(model(**inputs)), efficient, 1e-5)
    ba.revert(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(case.output(model(**inputs)), before)


@pytest.mark.parametrize("mechanism", ["optimised", "super"])
@pytest.mark.parametrize("name", list(CASES))
def test_calibration_comes_closer(name: str, mechanism: str) -> None:
    case = CASES[name]
    model, samples = case.make(width=24, heads=3).eval(), [case.inputs() for _ in range(6)]
    max_len = case.tokens if mechanism == "super" else None
    report = ba.convert(model, mechanism, exact=False, calibration=samples, max_len=max_len)
    assert report.length == case.tokens
    assert all(0 < row.error_after < 0.95 * row.error_before for row in report.layers)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mechanism", ["efficient", "super", "efficient+expressive"])
def test_padding_never_reaches_a_token(mechanism: str, attention: str, left: bool) -> None:
    """W_A mixes positions: padded values are zero before it, whatever they hold."""
    model = hosts.bert(width=24, heads=3, attention=attention).eval()
    ba.convert(model, mechanism, exact=False, max_len=L if ba.Mechanism.of(mechanism).aligned else None)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, HostAttention) and layer.mechanism.aligned:
                layer.align.weight.normal_()
        mask, first = padding(left), ids()
        second = torch.where(mask.bool(), first, ids())
        one, two = (model(x, attention_mask=mask).last_hidden_state[mask.bool()] for x in (first, second))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_attention_weights_are_recorded_as_before() -> None:
    model = hosts.bert(width=24, heads=3, attention="eager").eval()
    x = ids()
    want = model(x, output_attentions=True).attentions  # installs the host's hooks
    ba.convert(model, "standard")
    got = model(x, output_attentions=True).attentions
    fresh = hosts.bert(width=24, heads=3, attention="eager").eval()
    fresh.load_state_dict(copy.deepcopy(ba.revert(model) and model.state_dict()))
    ba.convert(fresh, "standard")  # before the host has installed any
    for weights in (got, fresh(x, output_attentions=True).attentions):
        assert len(weights) == len(want) == 2
        for new, old in zip(weights, want, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(CASES))
def test_saved_and_loaded_and_copied(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, inputs = case.make(width=24, heads=3).eval(), case.inputs()
    ba.convert(model, "super", exact=False, max_len=case.tokens)
    want = case.output(model(**inputs))
    ba.save_converted(model, tmp_path)
    loaded = ba.load_converted(case.make(width=24, heads=3).eval(), tmp_path)
    assert torch.equal(case.output(loaded(**inputs)), want)
    assert torch.equal(case.output(copy.deepcopy(model)(**inputs)), want)
    layer = next(m for m in model.modules() if isinstance(m, HostAttention))
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)  # noqa: S301 - our own, of a line before


def test_dropout_behind_the_output_stays() -> None:
    model = hosts.timm_vit(width=24, heads=1)
    for block in model.blocks:
        block.attn.proj_drop.p = 0.5
    ba.convert(model, "efficient")
    x = torch.randn(B, 3, 8, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def whole_numbers() -> nn.Parameter:
    return nn.Parameter(torch.zeros(24, 24, dtype=torch.int8), requires_grad=False)


def changed(what: Callable[[nn.Module], object], *, forward: object = None) -> nn.Module:
    """A DistilBERT whose first W_Q was changed, or whose first forward method was replaced."""
    model = hosts.distilbert(width=24, heads=1)
    attention = model.transformer.layer[0].attention
    what(attention.q_lin)
    if forward is not None:
        attention.forward = forward
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hosts.timm_vit(width=24, heads=1, qk_norm=True), "q_norm"),
        (lambda: hosts.flash(hosts.bert(width=24, heads=1)), "flash_attention_2"),
        (lambda: hosts.wrapped(hosts.vit(width=24, heads=1)), "q_proj is a Wrapped"),
        (lambda: changed(lambda q: q.register_forward_hook(print)), "q_lin has hooks"),
        (lambda: changed(lambda q: weight_norm(q)), "q_lin"),
        (lambda: changed(lambda q: setattr(q, "weight", whole_numbers())), "int8"),
        (lambda: changed(lambda q: None, forward=print), "forward method was replaced"),
    ],
)
def test_what_our_layer_cannot_do_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    model = make()
    modules = dict(model.named_modules())
    refused(lambda: ba.convert(model, "standard"), words, kind=ValueError)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(CASES))
def test_half_precision_stays(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    wide = case.make(width=24, heads=1).eval()
    model = copy.deepcopy(wide).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs().items()}
    want = case.output(model(**inputs))
    ba.convert(model, "efficient")
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = case.output(model(**inputs))
    assert got.dtype == dtype
    assert (got - want).norm() < 0.1 * want.norm()


def test_masks_of_flash_attention_are_refused_in_the_forward_pass() -> None:
    model = hosts.bert(width=24, heads=1).eval()
    ba.convert(model, "efficient")
    layer = next(m for m in model.modules() if isinstance(m, HostAttention))
    refused(lambda: layer(torch.randn(B, L, 24), attention_mask=torch.ones(B, L)), "sdpa", kind=TypeError)
