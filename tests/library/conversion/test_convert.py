"""convert() and revert() on whole models: what is found, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from helpers.layers import padding, refused, tokens, triangle

B, L, E = 3, 5, 6


def encoder(heads: int = 1, layers: int = 2, **options: object) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0, **options}
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, heads, 11, **options), layers, enable_nested_tensor=False
    )


def inputs(*shape: int) -> Tensor:
    return tokens(*(shape or (B, L, E)), dtype=torch.float32)


def unchanged(model: nn.Module, before: dict[str, object]) -> bool:
    return dict(model.named_modules()) == before


# --- torch's hosts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_gives_the_same_outputs_and_gradients(heads: int, training: bool, norm_first: bool) -> None:
    model = encoder(heads, norm_first=norm_first).train(training)
    twin, x = copy.deepcopy(model), inputs()
    assert ba.convert(model, "standard").exact
    for masks in ({}, {"mask": triangle(L)}, {"src_key_padding_mask": padding(B, L)}):
        real = ~masks.get("src_key_padding_mask", torch.zeros(B, L, dtype=torch.bool))
        new, old = (m(x, **masks)[real] for m in (model, twin))
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
        grads = [torch.autograd.grad(out.sin().sum(), m.layers[0].linear1.weight)[0] for out, m in
                 ((new, model), (old, twin))]  # fmt: skip
        torch.testing.assert_close(*grads, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mechanism", ["optimised", "efficient", "super"])
def test_the_fast_path_of_the_encoder_does_not_bypass_the_new_layer(mechanism: str) -> None:
    """In inference nn.TransformerEncoder reads the weights off torch's layer and computes standard attention itself."""
    row = ba.Mechanism.of(mechanism)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 11, batch_first=True), 2).eval()
    x, hidden = inputs(), padding(B, L)
    ba.convert(model, mechanism, exact=False, max_len=L if row.aligned else None)
    with torch.no_grad():
        quick = model(x, src_key_padding_mask=hidden)
    slow = model(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(quick[~hidden], slow[~hidden], rtol=0, atol=1e-5)
    with torch.no_grad():
        model.layers[0].self_attn.out_proj.weight.zero_()
        assert not torch.equal(model(x), quick)


def test_every_attention_of_nn_transformer_is_converted_and_stays_the_same_for_one_head() -> None:
    # An encoder of its own, because nn.Transformer's warns of nested tensors and one head.
    model = nn.Transformer(E, 1, 2, 2, 11, dropout=0.0, batch_first=True, custom_encoder=encoder()).eval()
    source, target = inputs(), inputs(B, 4, E)
    masks = {"tgt_mask": triangle(4), "src_key_padding_mask": padding(B, L), "memory_key_padding_mask": padding(B, L)}
    want = model(source, target, **masks)
    report = ba.convert(model, "efficient")
    assert [row.name for row in report.layers] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    torch.testing.assert_close(model(source, target, **masks), want, rtol=0, atol=1e-5)


def test_other_layouts_and_widths_stay() -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, 2, kdim=4, vdim=3, add_bias_kv=True, add_zero_attn=True))
    q, k, v = inputs(L, B, E), inputs(7, B, 4), inputs(7, B, 3)
    want = model[0](q, k, v)
    assert ba.convert(model, "standard").exact
    for new, old in zip(model[0](q, k, v), want, strict=True):
        torch.testing.assert_close(new, old)
    refused(lambda: ba.convert(model, "efficient", exact=False), "4 wide", kind=ValueError)


# --- which layers -----------------------------------------------------------------------------------------------------


def converted(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, ba.MultiheadAttention)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        ([0, 2], [0, 2]),
        ("layers.2.self_attn", [2]),
        (["layers.[01]*"], [0, 1]),
    ],
)
def test_layers_are_chosen_by_name_pattern_and_number(layers: object, expected: list[int]) -> None:
    model = encoder(layers=3)
    report = ba.convert(model, "efficient", layers=layers)
    assert converted(model) == [row.name for row in report.layers] == [f"layers.{i}.self_attn" for i in expected]


def test_layers_that_are_not_there_are_named() -> None:
    refused(lambda: ba.convert(encoder(), "efficient", layers="decoder.*"), "decoder", "layers.0.self_attn", "2")
    refused(lambda: ba.convert(encoder(), "efficient", layers=7), "7", "2")
    refused(lambda: ba.convert(encoder(), "efficient", layers=2.5), "2.5", kind=TypeError)
    refused(lambda: ba.convert(encoder(), "efficient", layers=[True]), "True", kind=TypeError)


# --- shared modules and tied weights ----------------------------------------------------------------------------------


def test_a_module_that_is_used_twice_is_converted_once_and_stays_one() -> None:
    layer = nn.TransformerEncoderLayer(E, 1, 11, batch_first=True)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer.self_attn])})
    report = ba.convert(model, "efficient")
    assert len(report.layers) == 1
    assert model["a"].self_attn is model["b"][0]
    assert isinstance(model["b"][0], ba.MultiheadAttention)
    ba.revert(model)
    assert model["a"].self_attn is model["b"][0]
    assert type(model["b"][0]) is nn.MultiheadAttention


def test_ties_are_kept_where_the_weight_is_and_refused_where_it_would_become_two() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(E, 1), nn.Linear(E, E)])
    model[1].weight = model[0].out_proj.weight
    before = dict(model.named_modules())
    refused(lambda: ba.convert(model, "optimised"), "0.out_proj.weight", "1.weight", "tied", kind=ValueError)
    assert unchanged(model, before)
    ba.convert(model, "standard")
    assert model[1].weight is model[0].out_proj.weight


# --- what the new parameters are --------------------------------------------------------------------------------------


def test_frozen_parameters_stay_frozen() -> None:
    model = encoder()
    for parameter in model.layers[0].self_attn.parameters():
        parameter.requires_grad_(False)
    model.layers[1].self_attn.out_proj.requires_grad_(False)
    ba.convert(model, "super", max_len=L)
    first, second = (layer.self_attn for layer in model.layers)
    assert not any(p.requires_grad for p in first.parameters())
    assert second.q_proj.weight.requires_grad
    assert second.align.weight.requires_grad
    ba.revert(model)
    ba.convert(model, "standard")
    assert not model.layers[1].self_attn.out_proj.weight.requires_grad
    assert model.layers[1].self_attn.v_proj.weight.requires_grad


def test_nothing_random_is_drawn() -> None:
    model = encoder()
    state = torch.get_rng_state()
    ba.convert(model, "super", max_len=L)
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_stay_and_can_still_be_removed() -> None:
    model, seen = encoder(), []
    handle = model.layers[0].self_attn.register_forward_hook(lambda *args: seen.append(1))
    ba.convert(model, "efficient")
    model(inputs())
    handle.remove()
    model(inputs())
    assert seen == [1]


def test_a_converted_model_trains() -> None:
    model, x = encoder(2), inputs()
    ba.convert(model, "super", exact=False, max_len=L)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


# --- again, and back --------------------------------------------------------------------------------------------------


def test_a_converted_model_can_be_converted_on_and_reverted_to_the_first() -> None:
    model, x = encoder().eval(), inputs()
    want = model(x)
    ba.convert(model, "efficient")
    report = ba.convert(model, "standard")
    assert [(row.before, row.after) for row in report.layers] == [("efficient", "standard")] * 2
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
    assert ba.revert(model) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert torch.equal(model(x), want)


def test_reverted_modules_come_to_the_dtype_and_mode_of_the_converted_ones() -> None:
    model = encoder()
    ba.convert(model, "efficient")
    model.double().eval()
    ba.revert(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(m.training for m in model.modules())


def test_nothing_to_revert_is_an_error() -> None:
    refused(lambda: ba.revert(encoder()), "no converted layer", kind=ValueError)
    model = encoder()
    ba.convert(model, "efficient", keep_original=False)
    refused(lambda: ba.revert(model), "keep_original", "layers.1.self_attn", kind=ValueError)


def test_the_old_weights_are_not_in_the_state_dict() -> None:
    model = encoder(layers=1)
    ba.convert(model, "efficient")
    names = {name for name in model.state_dict() if "self_attn" in name}
    assert names == {f"layers.0.self_attn.{p}.{w}" for p in ("q_proj", "out_proj") for w in ("weight", "bias")}


# --- refusals ---------------------------------------------------------------------------------------------------------


class HomeMadeAttention(nn.Module):
    """An architecture that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)


def test_unknown_architectures_are_named() -> None:
    refused(lambda: ba.convert(nn.Sequential(HomeMadeAttention()), "efficient"), "HomeMadeAttention", "Adapter")
    refused(lambda: ba.convert(nn.Linear(3, 3), "efficient"), "Linear", "torch", kind=ValueError)
    mixed = nn.ModuleList([nn.MultiheadAttention(E, 1), HomeMadeAttention()])
    report = ba.convert(mixed, "efficient")
    assert [name for name, _ in report.left] == ["1"]
    assert "HomeMadeAttention" in str(report)


def test_a_bare_attention_layer_cannot_be_replaced_in_itself() -> None:
    refused(lambda: ba.convert(nn.MultiheadAttention(E, 1), "efficient"), "container", kind=ValueError)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (lambda: encoder(device="meta"), {}, "meta"),
        (encoder, {"mechanism": "super"}, "max_len"),
        (encoder, {"mechanism": "efficient", "max_len": 4}, "max_len=4"),
        (encoder, {"mechanism": "clever"}, "clever"),
        (encoder, {"mechanism": ba.Mechanism(frozenset("q"))}, "W_O"),
    ],
)
def test_bad_arguments_change_nothing(model, options: dict[str, object], words: str) -> None:
    built = model()
    before = dict(built.named_modules())
    refused(lambda: ba.convert(built, **{"mechanism": "efficient", **options}), words, kind=ValueError)
    assert unchanged(built, before)


def test_arguments_of_the_wrong_kind() -> None:
    refused(lambda: ba.convert("model", "efficient"), "nn.Module", kind=TypeError)
    refused(lambda: ba.convert(encoder(), 3), "mechanism", kind=TypeError)
    refused(lambda: ba.convert(encoder(), "efficient", exact=1), "exact", kind=TypeError)
    refused(lambda: ba.convert(nn.DataParallel(encoder()), "efficient"), "DataParallel", kind=TypeError)


def test_an_error_in_a_later_layer_takes_everything_back() -> None:
    model = encoder(layers=3)
    tied = nn.Linear(E, E)
    tied.weight = model.layers[2].self_attn.out_proj.weight
    both = nn.ModuleList([model, tied])
    before = dict(both.named_modules())
    refused(lambda: ba.convert(both, "efficient"), "0.layers.2.self_attn.out_proj.weight", kind=ValueError)
    assert unchanged(both, before)


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_became_of_each_tensor() -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, 2))
    report = ba.convert(model, "super", exact=False, max_len=L)
    statuses = {change.tensor: change.status for change in report.layers[0].changes}
    assert statuses == {
        "q_proj": "approximated",
        "k_proj": "dropped",
        "v_proj": "dropped",
        "out_proj": "approximated",
        "align": "new",
    }
    assert json.loads(report.to_json())["layers"][0]["after"] == "super"
    text = str(report)
    assert all(word in text for word in ("super", "approximated", "2 heads", "parameters", "cache bytes"))


@pytest.mark.parametrize("mechanism", ["standard", "optimised", "efficient", "super"])
def test_sizes_agree_with_cost(mechanism: str) -> None:
    aligned = ba.Mechanism.of(mechanism).aligned
    model = nn.Sequential(nn.MultiheadAttention(E, 1))
    row = ba.convert(model, mechanism, max_len=L if aligned else None)
    length = row.length
    before, after = (ba.cost(E, 1, length, mechanism=m, backward=False) for m in ("standard", mechanism))
    for size, cost in ((row.layers[0].size_before, before), (row.layers[0].size_after, after)):
        assert (size.parameters, size.flops, size.cache_bytes) == (cost.params, cost.flops, cost.cache_bytes_per_token)
    assert row.layers[0].size_after.parameters == sum(p.numel() for p in model.parameters())
