"""The causal decoder: size, causality, positions, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from better_attention import MECHANISMS, MultiheadAttention, assert_causal
from better_attention.lab.models.causal_decoder import POSITIONS, CausalDecoder
from helpers import hosts

VOCABULARY, LENGTH, WIDTH, HEADS = 7, 11, 12, 3


def build(mechanism: str = "standard", **changes: object) -> CausalDecoder:
    sizes: dict[str, object] = {"vocabulary": VOCABULARY, "length": LENGTH, "width": WIDTH, "layers": 2, "heads": HEADS}
    model = hosts.random(CausalDecoder(mechanism=mechanism, **(sizes | changes)).double().eval())
    assert isinstance(model, CausalDecoder)
    return model


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", [*MECHANISMS, "super+expressive", "standard+align"])
def test_no_logit_knows_a_later_token(mechanism: str, positions: str) -> None:
    model = build(mechanism, positions=positions)
    assert_causal(model, tokens())
    assert_causal(lambda x: model.float()(x), tokens())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_parameter_is_trained(mechanism: str, positions: str) -> None:
    model = build(mechanism, positions=positions, scale="learned")
    model(tokens()).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if "k_proj.bias" in name and MECHANISMS[mechanism].score == "softmax" and positions != "rotary":
            continue  # it shifts every score of a query alike, which softmax takes out; turned, it does not
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert sum("log_scale" in name for name, _ in model.named_parameters()) == 2


def test_the_number_of_parameters() -> None:
    block = 4 * (12 * 12 + 12) + 2 * 24 + (12 * 48 + 48) + (48 * 12 + 12)
    rest = 7 * 12 + 24 + (12 * 7 + 7)
    for positions, more in (("learned", 11 * 12), ("rotary", 0), ("alibi-weight", 0), ("alibi-score", 0)):
        model = build(positions=positions)
        assert sum(p.numel() for p in model.parameters()) == 2 * block + rest + more


@pytest.mark.parametrize(
    ("positions", "rotary", "alibi"),
    [
        ("learned", None, None),
        ("rotary", 10_000.0, None),
        ("alibi-weight", None, "weight"),
        ("alibi-score", None, "score"),
    ],
)
def test_positions_that_are_not_learned_are_the_layers(positions: str, rotary: float | None, alibi: str | None) -> None:
    layers = [m for m in build(positions=positions).modules() if isinstance(m, MultiheadAttention)]
    assert [(m.rotary, m.alibi) for m in layers] == [(rotary, alibi)] * 2


def test_the_place_of_alibi_is_a_matter_of_the_expressive_score_alone() -> None:
    x = tokens()
    for mechanism, same in (("standard", True), ("expressive", False)):
        one, two = (build(mechanism, positions=f"alibi-{place}") for place in ("score", "weight"))
        two.load_state_dict(one.state_dict())
        assert torch.allclose(one(x), two(x), atol=1e-10) == same


def test_one_hot_tokens_are_unit_vectors_that_are_not_trained() -> None:
    model = build(embedding="one-hot", positions="rotary")
    learned = build(positions="rotary")
    assert torch.equal(model.tokens(torch.tensor([[2, 0]])), torch.eye(VOCABULARY, WIDTH)[None, [2, 0]].double())
    assert set(model.state_dict()) == set(learned.state_dict()) - {"tokens.weight"}
    with torch.no_grad():
        learned.load_state_dict(model.state_dict() | {"tokens.weight": torch.eye(VOCABULARY, WIDTH)})
    x = tokens()
    assert torch.equal(model(x), learned(x))


def test_relu_is_another_mlp() -> None:
    gelu, relu = build(), build(activation="relu")
    relu.load_state_dict(gelu.state_dict())
    x = tokens()
    assert not torch.allclose(gelu(x), relu(x))
    block = relu.blocks[0]
    inner = block.norm2(y := torch.randn(2, 3, WIDTH, dtype=torch.float64))
    mixed, _ = block.attention(*[block.norm1(y)] * 3, is_causal=True)
    with torch.no_grad():
        inner = block.norm2(y + mixed)
        expected = y + mixed + block.contract(block.expand(inner).clamp(min=0))
    torch.testing.assert_close(block(y), expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_what_came_before_matters(positions: str) -> None:
    model, row = build(positions=positions, layers=1), torch.tensor([[1, 2, 3, 4, 5]])
    assert not torch.allclose(model(row)[:, -1], model(row[:, [2, 0, 3, 1, 4]])[:, -1])


def test_without_positions_it_would_not() -> None:
    """The control of the test before: one layer whose positions are all alike is blind to the order."""
    model, row = build(positions="learned", layers=1), torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        model.positions.weight.zero_()
    torch.testing.assert_close(model(row)[:, -1], model(row[:, [2, 0, 3, 1, 4]])[:, -1])


def test_dropout_scale_options_and_outputs_arrive() -> None:
    model = build("super", dropout=0.4, scale=1.0, options={"align_heads": "per_head"}, outputs=5)
    layer = next(m for m in model.modules() if isinstance(m, MultiheadAttention))
    assert (layer.dropout, layer.scale, layer.align.weight.shape) == (0.4, 1.0, (HEADS, LENGTH, LENGTH))
    assert layer.align.causal
    x = tokens()
    assert model(x).shape == (3, LENGTH, 5)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_shorter_sequences_are_read_and_longer_ones_refused() -> None:
    model, x = build("super"), tokens()
    torch.testing.assert_close(model(x[:, :4]), model(x)[:, :4])
    assert model(tokens(0)).shape == (0, LENGTH, VOCABULARY)
    with pytest.raises(ValueError, match="length=11, received 12 tokens"):
        model(tokens(1, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "sine"}, "positions must be one of"),
        ({"positions": "rotary", "width": 9}, "must be even"),
        ({"embedding": "one-hot", "width": 6}, "7 tokens need a width of at least that, received 6"),
        ({"embedding": "random"}, "embedding must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
    ],
)
def test_what_cannot_be_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)
