"""The text classifier: size, padding, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from better_attention import MECHANISMS, MultiheadAttention
from better_attention.lab.models.text_classifier import TextClassifier

VOCABULARY, LENGTH, WIDTH, HEADS = 19, 7, 6, 3


def build(mechanism: str, **changes: int) -> TextClassifier:
    sizes = {"vocabulary": VOCABULARY, "length": LENGTH, "width": WIDTH, "layers": 2, "heads": HEADS} | changes
    return TextClassifier(mechanism=mechanism, **sizes).double().eval()


def tokens(*lengths: int) -> Tensor:
    """Random texts of the given numbers of tokens, padded on the left."""
    rows = torch.randint(1, VOCABULARY, (len(lengths), LENGTH))
    for row, length in zip(rows, lengths, strict=True):
        row[: LENGTH - length] = 0
    return rows


@pytest.mark.parametrize(
    ("mechanism", "attention"),
    [("standard", 4_224), ("optimised", 3_168), ("efficient", 2_112), ("super", 3_168), ("expressive", 4_224)],
)
def test_has_the_parameters_of_the_papers_imdb_model(mechanism: str, attention: int) -> None:
    model = TextClassifier(vocabulary=20_000, length=32, width=32, layers=1, heads=4, mechanism=mechanism)
    assert sum(p.numel() for p in model.parameters()) == 647_693 - 4_224 + attention
    (layer,) = (m for m in model.modules() if isinstance(m, MultiheadAttention))
    assert sum(p.numel() for p in layer.parameters()) == attention


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_texts_result_does_not_depend_on_its_neighbours_padding(mechanism: str) -> None:
    model = build(mechanism)
    full, padded = tokens(LENGTH, LENGTH), tokens(3, 1)
    together = model(torch.cat([full, padded]))
    torch.testing.assert_close(together, torch.cat([model(full), model(padded)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_padding_reaches_no_result(mechanism: str) -> None:
    model, rows = build(mechanism), tokens(4, 4, 4)
    before = model(rows)
    with torch.no_grad():
        model.tokens.weight[0] += 100.0
        model.positions.weight[: LENGTH - 4] -= 50.0
    assert torch.equal(model(rows), before)
    with torch.no_grad():
        model.tokens.weight[1:] *= 2
    assert not torch.allclose(model(rows), before)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_empty_text_gives_a_finite_result_and_finite_gradients(mechanism: str) -> None:
    model = build(mechanism)
    logits = model(tokens(0, 5))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_parameter_is_trained(mechanism: str) -> None:
    model = build(mechanism)
    model(tokens(7, 5, 7)).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if "k_proj.bias" in name and MECHANISMS[mechanism].score == "softmax":
            continue  # it shifts every score of a query alike, which softmax takes out
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_weights_are_not_asked_for_and_the_mask_only_where_there_is_padding(mechanism: str) -> None:
    model, calls = build(mechanism, layers=1), []

    def note(_: nn.Module, __: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        calls.append((kwargs["need_weights"], kwargs["key_padding_mask"] is not None))

    layer = next(m for m in model.modules() if isinstance(m, MultiheadAttention))
    layer.register_forward_pre_hook(note, with_kwargs=True)
    model(tokens(LENGTH))
    model(tokens(2))
    assert calls == [(False, False), (False, True)]


def test_more_outputs_and_an_empty_batch() -> None:
    model = build("super", outputs=5)
    assert model(tokens(7, 3)).shape == (2, 5)
    assert model(tokens()).shape == (0, 5)


def test_the_tokens_order_matters() -> None:
    model = build("standard")
    rows = tokens(LENGTH)
    assert not torch.allclose(model(rows), model(rows.flip(1)))
