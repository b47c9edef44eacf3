"""The causal decoder: size, causality, positions, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from better_attention import MECHANISMS, MultiheadAttention, assert_causal
from better_attention.lab.models.causal_decoder import POSITIONS, CausalDecoder

VOCABULARY, LENGTH, WIDTH, HEADS = 7, 11, 12, 3


def build(mechanism: str = "standard", **changes: object) -> CausalDecoder:
    sizes: dict[str, object] = {"vocabulary": VOCABULARY, "length": LENGTH, "width": WIDTH, "layers": 2, "heads": HEADS}
    model = CausalDecoder(mechanism=mechanism, **(sizes | changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
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
    for positions, more in (("learned", 11 * 12), ("rotary", 0), ("alibi", 0)):
        model = build(positions=positions)
        assert sum(p.numel() for p in model.parameters()) == 2 * block + rest + more


def test_alibi_is_a_falling_bias_and_rotary_a_turning_of_the_layer() -> None:
    seen = []
    model = build(positions="alibi")
    layer = next(m for m in model.modules() if isinstance(m, MultiheadAttention))
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(tokens(2, 5))
    (call,) = seen
    assert call["is_causal"]
    assert not call["need_weights"]
    bias = call["attn_mask"].view(2, HEADS, 5, 5)
    assert torch.equal(bias[0], bias[1])
    assert bias[0, 0, 4].tolist() == [-4 / 16, -3 / 16, -2 / 16, -1 / 16, 0]  # slopes of 3 heads: 1/16, 1/256, 1/4
    assert bias[0, 2, 4, 0] == -1.0
    assert layer.rotary is None
    assert all(m.rotary == 10_000.0 for m in build(positions="rotary").modules() if isinstance(m, MultiheadAttention))


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
    [({"positions": "sine"}, "positions must be one of"), ({"positions": "rotary", "width": 9}, "must be even")],
)
def test_what_cannot_be_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)
