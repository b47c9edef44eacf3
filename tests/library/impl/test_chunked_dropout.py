"""Dropout of the tiled implementation: both directions drop the same weights, at the rate asked for, in many tiles."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import better_attention as ba
from better_attention import functional
from better_attention.impl import chunked, dispatch
from better_attention.scores import SCORES
from helpers.layers import tokens

scores = pytest.mark.parametrize("score", SCORES)


@pytest.fixture(autouse=True, params=[1 << 19, 64], ids=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A call fits one tile, or needs one for a head of a sample at most."""
    monkeypatch.setattr(chunked, "TILE", request.param)
    return int(request.param)


def attend(*tensors: Tensor, score: str, p: float, **options: object) -> Tensor:
    output: Tensor = ba.attention(*tensors, score=score, dropout_p=p, impl="chunked", **options)
    return output


@scores
@pytest.mark.parametrize("causal", [False, True])
def test_the_kept_weights_are_scaled_and_the_others_gone(score: str, causal: bool) -> None:
    q, k, v = tokens(3, 4, 150, 8), tokens(3, 4, 150, 8), torch.eye(150, dtype=torch.float64).expand(3, 4, 150, 150)
    weights = ba.attention(q, k, v, score=score, is_causal=causal, impl="reference")
    dropped = attend(q, k, v, score=score, p=0.3, is_causal=causal)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.7)
    n = int((weights != 0).sum())
    assert abs(int(((weights != 0) & ~kept).sum()) - 0.3 * n) < 4.5 * (n * 0.21) ** 0.5
    if not causal:
        masks = kept.flatten(0, 1)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2)), "two heads share a mask"
        assert len({tuple(row.tolist()) for row in kept.reshape(-1, 150)}) == 3 * 4 * 150


@scores
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_mask_drawn(score: str, causal: bool) -> None:
    q, k, v = (tokens(2, 2, n, 2, requires_grad=True) for n in (5, 7, 7))
    bias = tokens(1, 2, 5, 7, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(q, k, v, score=score, p=0.4, attn_mask=bias, is_causal=causal)

    # Along random directions: one input after the other, 222 of them take many times as long.
    assert gradcheck(function, (q, k, v, bias), fast_mode=True)


@scores
def test_everything_dropped(score: str) -> None:
    leaves = [tokens(2, 2, n, 4, requires_grad=True) for n in (5, 9, 9)]
    output = attend(*leaves, score=score, p=1.0)
    assert not output.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(output.sum(), leaves))


@scores
def test_the_seed_decides_and_checkpointing_drops_the_same_again(score: str) -> None:
    leaves = [tokens(2, 2, n, 4, requires_grad=True) for n in (5, 9, 9)]

    def run(seed: int, *, wrapped: bool = False) -> list[Tensor]:
        torch.manual_seed(seed)

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, score=score, p=0.5)

        output = checkpoint(function, *leaves, use_reentrant=False) if wrapped else function(*leaves)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    first = run(1)
    assert all(torch.equal(a, b) for a, b in zip(run(1), first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(1, wrapped=True), first, strict=True))
    assert not torch.allclose(run(2)[0], first[0])
    assert not torch.allclose(attend(*leaves, score=score, p=0.5), attend(*leaves, score=score, p=0.5))


@scores
def test_long_sequences_under_dropout_keep_no_weights(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no compiled kernels, the tiles serve: PyTorch's CPU attention keeps L x S weights for dropout."""
    without = {name: one for name, one in functional.IMPLEMENTATIONS.items() if name != "native"}
    for module in (functional, dispatch):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", without)
    q = torch.empty(1, 2, 1024, 16)
    assert ba.explain(q, q, q, score=score, dropout_p=0.1).chosen == "chunked"
    assert ba.explain(q[:, :, :100], q, q, dropout_p=0.1).chosen == "sdpa"
    assert ba.explain(q, q, q).chosen == "sdpa"


@scores
def test_opcheck(score: str) -> None:
    q, k, v = (tokens(2, 2, n, 4, requires_grad=True) for n in (5, 7, 7))
    arguments = (q, k, v, None, None, torch.tensor(12345), False, 0, None, score, 0.5, 0.25)
    torch.library.opcheck(torch.ops.better_attention.chunked.default, arguments)


@scores
def test_one_tensor_can_be_key_and_value_of_the_operator(score: str) -> None:
    """``impl="chunked"`` passes it twice; the operator takes None for v, as that of the kernels, and sums gradients."""
    q, k = (tokens(2, 2, n, 4, requires_grad=True) for n in (5, 7))
    operator, settings = torch.ops.better_attention.chunked, (None, None, None, True, 0, None, score, 0.5, 0.0)
    once, twice = operator(q, k, None, *settings), operator(q, k, k, *settings)
    torch.testing.assert_close(once, twice)
    for ours, expected in zip(
        torch.autograd.grad(once.sum(), (q, k)), torch.autograd.grad(twice.sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@scores
def test_under_torch_func_it_is_refused_with_the_reason(score: str) -> None:
    q = tokens(3, 2, 5, 4)
    with pytest.raises(ValueError, match=r"torch\.func it has no dropout"):
        torch.vmap(lambda x: attend(x, x, x, score=score, p=0.5), randomness="different")(q)
