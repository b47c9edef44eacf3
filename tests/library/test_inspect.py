"""Attention maps read off a model: the right numbers, and the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention import attention_maps
from better_attention.inspect import alignment_kernels
from helpers import hosts

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


@pytest.mark.parametrize("score", [None, "expressive"])
@pytest.mark.parametrize("mechanism", ["standard", "optimised"])
def test_query_heads_that_share_keys_have_weights_of_their_own(mechanism: str, score: str | None) -> None:
    model = ba.MultiheadAttention(12, 6, batch_first=True, mechanism=mechanism, num_kv_heads=2).double().eval()
    x = torch.randn(B, L, 12, dtype=torch.float64)
    found = attention_maps(model, x, x, x, score=score)[""]
    keys = model.k_proj(x).view(B, L, 2, 2).transpose(1, 2)
    logits = model.q_proj(x).view(B, L, 6, 2).transpose(1, 2) @ keys.repeat_interleave(3, 1).mT / math.sqrt(2)
    squares = logits**2 / (1 + logits**2)
    expected = logits.softmax(-1) if score is None else squares / squares.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected)


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


# ------------------------------------------------------------------------------------------- torch's layer


def torchs_encoder(**changes: object) -> nn.TransformerEncoder:
    """Two layers of torch's own; nested input and the fast path are on, as by default."""
    one = nn.TransformerEncoderLayer(D, H, 11, batch_first=True, **changes)  # type: ignore[arg-type]
    return nn.TransformerEncoder(one, num_layers=2)


def hooks(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_with_padding(training: bool) -> None:
    model = torchs_encoder(dropout=0.5).train(training)
    x, padding = torch.randn(B, L, D), torch.zeros(B, L, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        before = model.eval()(x, src_key_padding_mask=padding)
        _, first = model.layers[0].self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    model.train(training)
    found = attention_maps(model, x, src_key_padding_mask=padding)
    assert list(found) == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(found["layers.0.self_attn"], first)
    assert (found["layers.1.self_attn"][0, ..., 4:] == 0).all()
    assert all(module.training is training for module in model.modules())
    assert not any(hooks(model))
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert torch.equal(model.eval()(x, src_key_padding_mask=padding), before)  # the fast path again


def test_torchs_decoder_looks_at_itself_and_at_the_encoder() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, 11), num_layers=1)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    found = attention_maps(decoder, torch.randn(5, B, D), torch.randn(L, B, D), tgt_mask=mask)
    assert {name: tuple(w.shape) for name, w in found.items()} == {
        "layers.0.self_attn": (B, H, 5, 5),
        "layers.0.multihead_attn": (B, H, 5, L),
    }
    assert (found["layers.0.self_attn"].triu(1) == 0).all()


def test_a_compiled_model_keeps_its_code() -> None:
    compilations: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    model = torchs_encoder().eval()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(B, L, D)
    with torch.no_grad():
        expected = compiled(x)
        graphs = len(compilations)
        found = attention_maps(compiled, x)
        assert torch.equal(compiled(x), expected)
    assert graphs > 0
    assert len(compilations) == graphs
    assert [tuple(weights.shape) for weights in found.values()] == [(B, H, L, L)] * 2


# --------------------------------------------------------------------------------------- which layers, which score


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["first", "second"]),
        ("first", ["first"]),
        (1, ["second"]),
        ("*", ["first", "second"]),
        ([1, "first"], ["first", "second"]),
    ],
)
def test_only_the_layers_that_are_asked_for(layers: object, expected: list[str]) -> None:
    model, x = Block(), torch.randn(B, L, D)
    found = attention_maps(model, x, layers=layers)  # type: ignore[arg-type]
    assert list(found) == expected
    everything = attention_maps(model, x)
    assert all(torch.equal(found[name], everything[name]) for name in expected)


@pytest.mark.parametrize("layers", ["third", 2, -1, ["first", "drop"]])
def test_a_layer_that_is_not_there(layers: object) -> None:
    with pytest.raises(ValueError, match=r"fits no attention layer .*first.*second"):
        attention_maps(Block(), torch.randn(B, L, D), layers=layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_another_score_of_the_same_queries_and_keys(kind: str) -> None:
    model = nn.MultiheadAttention(D, H, batch_first=True) if kind == "torch" else layer()
    model.double().eval()
    x = torch.randn(B, L, D, dtype=torch.float64)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, 5:] = True
    before = model(x, x, x)[0]
    found = attention_maps(model, x, x, x, score="expressive", key_padding_mask=padding)[""]
    if kind == "torch":
        q, k = (x @ w.T for w in model.in_proj_weight.chunk(3)[:2])  # type: ignore[union-attr,operator]
    else:
        q, k = model.q_proj(x), model.k_proj(x)  # type: ignore[operator]
    z = torch.einsum("blhd,bshd->bhls", *(y.view(B, L, H, D // H) for y in (q, k))) / math.sqrt(D // H)
    shares = (z**2 / (1 + z**2)).masked_fill(padding[:, None, None], 0.0)
    torch.testing.assert_close(found, (shares / shares.sum(-1, keepdim=True)).detach())
    assert torch.equal(model(x, x, x)[0], before)
    assert attention_maps(model, x, x, x, score="softmax")[""].allclose(attention_maps(model, x, x, x)[""])


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="score must be"):
        attention_maps(Block(), torch.randn(B, L, D), score="cosine")


# ------------------------------------------------------------------------------------ models of other libraries


@pytest.mark.hosts
@pytest.mark.parametrize("host", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_a_converted_text_model_shows_what_its_host_would(host: str) -> None:
    model = getattr(hosts, host)(24, 3, attention="eager").train()
    ids, mask = torch.randint(5, hosts.VOCABULARY, (B, L)), torch.ones(B, L, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = model.eval()(ids, attention_mask=mask, output_attentions=True).attentions
    ba.convert(model, "standard")
    model.train()
    with torch.no_grad():
        output = model.eval()(ids, attention_mask=mask)[0]
    model.train()
    before = hooks(model)  # the host's recorder leaves some
    found = attention_maps(model, input_ids=ids, attention_mask=mask)
    assert hooks(model) == before
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, attention_mask=mask)[0], output)


@pytest.mark.hosts
def test_a_converted_encoder_and_decoder_with_position_biases() -> None:
    model = hosts.t5(24, 3, attention="eager").eval()
    ids = {"input_ids": torch.randint(5, hosts.VOCABULARY, (B, L)), "decoder_input_ids": torch.full((B, 5), 3)}
    with torch.no_grad():
        host = model(**ids, output_attentions=True)
    ba.convert(model, "standard")
    found = attention_maps(model, **ids)
    assert len(found) == len(model.encoder.block) + 2 * len(model.decoder.block)
    for side, number, expected in (
        ("encoder", 0, host.encoder_attentions),
        ("decoder", 0, host.decoder_attentions),
        ("decoder", 1, host.cross_attentions),
    ):
        ours = [w for name, w in found.items() if name.startswith(f"{side}.") and f".layer.{number}." in name]
        for weights, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(weights, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.hosts
@pytest.mark.parametrize("mechanism", ["efficient", "super", "optimised+expressive"])
def test_a_converted_picture_model(mechanism: str) -> None:
    model = hosts.timm_vit(24, 3).eval()
    max_len = {"max_len": 5} if "super" in mechanism else {}
    ba.convert(model, mechanism, exact=False, **max_len)
    x = torch.randn(B, 3, 8, 8)
    found = attention_maps(model, x, layers="blocks.1*")
    (weights,) = found.values()
    assert weights.shape == (B, 3, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 3, 5))
    other = attention_maps(model, x, layers=1, score="softmax" if "expressive" in mechanism else "expressive")
    assert not torch.allclose(weights, next(iter(other.values())))
    assert [name for name, _ in alignment_kernels(model)] == (
        ["blocks.0.attn", "blocks.1.attn"] if mechanism == "super" else []
    )


@pytest.mark.hosts
def test_a_host_that_fails_is_left_as_it_was() -> None:
    model = hosts.bert(24, 3)
    ba.convert(model, "standard")
    with pytest.raises(IndexError):
        attention_maps(model.train(), torch.full((B, L), hosts.VOCABULARY))
    assert not any(hooks(model))
    assert model.training


@pytest.mark.hosts
def test_a_host_that_is_not_converted_is_named_with_the_way_out() -> None:
    model = hosts.vit(24, 3)
    with pytest.raises(ValueError, match=r"attention.*convert\(model, 'standard'\)"):
        attention_maps(model, torch.randn(B, 3, 8, 8))
    ba.convert(model, "standard", layers=0)
    assert len(attention_maps(model, torch.randn(B, 3, 8, 8))) == 1
    with pytest.raises(ValueError, match=r"convert\(model, 'standard'\)"):
        attention_maps(model, torch.randn(B, 3, 8, 8), layers=[0, 1])


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
