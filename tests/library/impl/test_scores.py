"""The registry of scores: a third score is computed right, or refused with a reason that names it, and by all.

The toy score is ``sigmoid(z) / sum sigmoid(z)``, once with a tiled form and once without.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import better_attention as ba
from better_attention.impl import IMPLEMENTATIONS
from better_attention.mechanism import MECHANISMS
from better_attention.scores import DEFAULT_SCORE, SCORES, Score, registered
from helpers.layers import tokens

NAME = "sigmoid"


def weights(q_BNLH: Tensor, k_BNSH: Tensor, bias: Tensor | None, hide: Tensor | None) -> Tensor:
    a_BNLS = torch.sigmoid(q_BNLH @ k_BNSH.transpose(-1, -2))
    if bias is not None:
        a_BNLS = a_BNLS * bias.exp()
    if hide is not None:
        a_BNLS = a_BNLS.masked_fill(hide, 0.0)
    total_BNL1 = a_BNLS.sum(dim=-1, keepdim=True)
    return a_BNLS / total_BNL1.masked_fill(total_BNL1 == 0.0, 1.0)


class Tiles:
    """The same formula, tile by tile, its derivative a (1 - a) written out."""

    def __init__(self, q_BNLH: Tensor, k_BNSH: Tensor) -> None:
        self.q, self.k = q_BNLH, k_BNSH

    def weights(
        self, rows: tuple[slice, ...], keys: tuple[slice, ...], bias: Tensor | None, hide: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a, _ = self._weights_and_derivative(rows, keys, bias, hide)
        return a, a.sum(dim=-1, keepdim=True).clamp(min=1e-30)

    def slopes(
        self, rows: tuple[slice, ...], keys: tuple[slice, ...], bias: Tensor | None, hide: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a, derivative = self._weights_and_derivative(rows, keys, bias, hide)
        total = a.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        return a / total, derivative / total

    def gradients(self, dq_BNLH: Tensor, dk_BNSH: Tensor) -> tuple[Tensor, Tensor]:
        return dq_BNLH, dk_BNSH

    def _weights_and_derivative(
        self, rows: tuple[slice, ...], keys: tuple[slice, ...], bias: Tensor | None, hide: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a = torch.sigmoid(self.q[rows] @ self.k[keys].transpose(-1, -2))
        factor = torch.ones_like(a) if bias is None else bias.exp().expand_as(a)
        if hide is not None:
            factor = factor.masked_fill(hide, 0.0)
        return a * factor, a * (1.0 - a) * factor


TOYS = [
    Score(NAME, "Sigmoid", ("S_i = σ({z}), each row divided by its sum",), "none", True, weights, tiles)
    for tiles in (Tiles, None)
]


@pytest.fixture(params=TOYS, ids=["tiled", "not tiled"])
def toy(request: pytest.FixtureRequest) -> Iterator[Score]:
    with registered(request.param) as score:
        yield score


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """The toy score written down once more, one query at a time."""
    B, N, L, H = q.shape
    rows = []
    for query in range(L):
        z = sum(q[:, :, query, None, h] * k[:, :, :, h] for h in range(H)) / math.sqrt(H)
        a = 1.0 / (1.0 + torch.exp(-z))
        if causal:
            a = a * (torch.arange(k.shape[2]) <= query)
        if mask is not None:
            seen = mask.expand(B, N, L, -1)[:, :, query]
            a = a * (seen if mask.dtype == torch.bool else seen.exp())
        rows.append((a[..., None] * v).sum(dim=2) / a.sum(dim=2)[..., None])
    return torch.stack(rows, dim=2)


def inputs(requires_grad: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tokens(2, 3, n, w, dtype=dtype, requires_grad=requires_grad) for n, w in ((5, 7), (11, 7), (11, 2)))
    return q, k, v


def masks() -> dict[str, dict[str, object]]:
    """What restricts a call; with each, every query sees some key."""
    shown = torch.rand(2, 1, 5, 11) > 0.4
    shown[..., 0] = True
    bias = tokens(1, 3, 5, 11)
    hiding = bias.masked_fill(torch.rand(1, 1, 5, 11) > 0.7, -math.inf)
    hiding[..., 0] = 0.5
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": shown},
        "float": {"attn_mask": bias},
        "-inf": {"attn_mask": hiding},
        "causal and float": {"is_causal": True, "attn_mask": bias},
    }


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_implementation_computes_a_third_score_right_or_refuses_it_by_name(
    toy: Score, impl: str, kind: str
) -> None:
    restriction = masks()[kind]
    q, k, v = inputs(requires_grad=True)
    expected = by_definition(
        q,
        k,
        v,
        restriction.get("attn_mask"),  # type: ignore[arg-type]
        bool(restriction.get("is_causal")),
    )
    try:
        output = ba.attention(q, k, v, score=NAME, impl=impl, **restriction)  # type: ignore[call-overload]
    except ValueError as refusal:
        (line,) = (line for line in str(refusal).splitlines() if line.startswith(f"  {impl}: "))
        assert repr(NAME) in line
        assert impl != "reference"
        assert impl != "chunked" or toy.tiles is None
        return
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (q, k, v), grad)
    for ours, direct in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(ours, direct)


def test_some_implementation_computes_it_tile_by_tile_and_some_refuse_it() -> None:
    """So that the test above has both cases."""
    q, k, v = inputs()
    with registered(TOYS[0]):
        reasons = ba.explain(q, k, v, score=NAME, impl="chunked").reasons
    assert reasons["chunked"] == []
    assert all(any(repr(NAME) in reason for reason in reasons[impl]) for impl in ("native", "sdpa"))


def test_the_reference_differentiates_it_to_any_order(toy: Score) -> None:
    q, k, v = (tokens(1, 2, n, 3, requires_grad=True) for n in (2, 4, 4))

    def attend(*tensors: Tensor) -> Tensor:
        output: Tensor = ba.attention(*tensors, score=NAME, impl="reference")
        return output

    assert gradcheck(attend, (q, k, v))
    assert gradgradcheck(attend, (q, k, v))


def test_a_query_that_sees_nothing_gets_zero(toy: Score) -> None:
    q, k, v = inputs(requires_grad=True)
    shown = torch.ones(5, 11, dtype=torch.bool)
    shown[2] = False
    output = ba.attention(q, k, v, score=NAME, attn_mask=shown)
    assert (output[:, :, 2] == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [5, 64, 700])
def test_the_choice_falls_on_an_implementation_that_knows_it(toy: Score, length: int, dtype: torch.dtype) -> None:
    x = tokens(1, 2, length, 8, dtype=dtype)
    explanation = ba.explain(x, x, x, score=NAME, is_causal=True)
    assert explanation.chosen in ("chunked", "reference")
    assert explanation.chosen == "reference" or toy.tiles is not None
    assert f"score={NAME!r}" in str(explanation)
    for impl in ("native", "sdpa"):
        assert any(repr(NAME) in reason for reason in explanation.reasons[impl])
    output = ba.attention(x, x, x, score=NAME, is_causal=True)
    reference = ba.attention(x, x, x, score=NAME, is_causal=True, impl="reference")
    torch.testing.assert_close(output, reference)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_small_layer_computes_it(toy: Score, mechanism: str, training: bool) -> None:
    """In inference small layers have a kernel of their own, which has to leave a score alone that it does not know."""
    options = {"max_len": 9} if MECHANISMS[mechanism].aligned else {}
    layer = ba.MultiheadAttention(8, 2, batch_first=True, mechanism=f"{mechanism}+{NAME}", **options).train(training)
    x = tokens(3, 9, 8, dtype=torch.float32)
    with torch.set_grad_enabled(training):
        output, none = layer(x, x, x, need_weights=False)
        expected, weights_BNLS = layer(x, x, x, average_attn_weights=False)
    assert none is None
    torch.testing.assert_close(output, expected)
    q, k = (p(x).view(3, 9, 2, 4).transpose(1, 2).double() for p in (layer.q_proj, layer.k_proj))
    one_hot = torch.eye(9, dtype=torch.float64).expand(3, 2, 9, 9)
    torch.testing.assert_close(weights_BNLS.double(), by_definition(q, k, one_hot), rtol=1e-5, atol=1e-6)


def test_a_mechanism_can_name_it(toy: Score) -> None:
    mechanism = ba.Mechanism.of(f"efficient+{NAME}")
    assert mechanism == ba.Mechanism(frozenset("qo"), score=NAME)
    assert mechanism.name == f"efficient+{NAME}"
    assert ba.Mechanism.of(f"standard+{NAME}+align").name == f"standard+{NAME}+align"
    assert ba.Mechanism(frozenset("v"), score=NAME).name == f"custom(v+{NAME})"
    layer = ba.MultiheadAttention(8, 2, mechanism=mechanism)
    assert copy.deepcopy(layer).mechanism == mechanism
    with pytest.raises(ValueError, match=NAME):
        layer.to_torch_state_dict()
    with pytest.raises(ValueError, match=rf"\+expressive or \+{NAME} or \+align"):
        ba.Mechanism.of("efficient+softplus")


def test_a_registration_ends_with_its_context() -> None:
    before = tuple(SCORES)
    with registered(TOYS[0]):
        assert tuple(SCORES) == (*before, NAME)
        with pytest.raises(ValueError, match="already"), registered(TOYS[1]):
            pass
        assert SCORES[NAME] is TOYS[0]
    assert tuple(SCORES) == before
    q, k, v = inputs()
    with pytest.raises(ValueError, match=NAME):
        ba.attention(q, k, v, score=NAME)
    with pytest.raises(ValueError, match=NAME):
        ba.Mechanism.of(f"efficient+{NAME}")


@pytest.mark.parametrize("name", SCORES)
def test_every_row_is_complete(name: str) -> None:
    score = SCORES[name]
    assert score.name == name
    assert 0 < len(score.label) <= 13, "a block of a drawing has room for 13 characters"
    assert any("{z}" in equation for equation in score.equations)
    assert "arXiv" in score.source


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_what_hides(name: str, dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([-math.inf, lowest, lowest / 2, 0.0, math.inf, math.nan], dtype=dtype)
    assert SCORES[name].hides(mask).tolist() == [True, SCORES[name].lowest_hides, False, False, False, False]
    assert SCORES[name].hides(torch.tensor([True, False])).tolist() == [False, True]


def test_the_default_score_is_that_of_torch() -> None:
    assert next(iter(SCORES)) == DEFAULT_SCORE == ba.Mechanism(frozenset()).score
    q, k, v = inputs()
    torch.testing.assert_close(
        ba.attention(q, k, v, score=DEFAULT_SCORE), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    )
