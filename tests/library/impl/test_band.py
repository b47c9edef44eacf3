"""``offset`` and ``window`` of ``attention``: which earlier keys a query sees, by every implementation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.scores import SCORES
from helpers import oracle
from helpers.bridge import array
from helpers.layers import refused, tokens
from helpers.registry import computing

B, N, G, H, V = 2, 4, 2, 6, 5
BANDS = list(product((0, 3, 11), (None, 1, 4, 29)))
"""Offset and window: no key, some keys and all keys before the first query; one key, some, and more than there are."""
SIZES = [(1, 13), (7, 13), (13, 7)]
CASES = [(score, impl) for score in SCORES for impl in computing(score)]


def inputs(L: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tokens(B, N, L, H), tokens(B, G, S, H), tokens(B, G, S, V)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize(("score", "impl"), CASES)
@pytest.mark.parametrize(("L", "S"), SIZES)
def test_the_oracle_agrees(score: str, impl: str, L: int, S: int) -> None:
    q, k, v = inputs(L, S)
    keep = torch.rand(L, S) < 0.8
    for offset, window in BANDS:
        expected, _ = oracle.attention(
            *map(array, (q, k, v)), score=score, causal=True, offset=offset, window=window,
            keep=np.broadcast_to(keep.numpy(), (B, N, L, S)),
        )  # fmt: skip
        found = ba.attention(
            q,
            k,
            v,
            score=score,
            attn_mask=keep,
            is_causal=True,
            offset=offset,
            window=window,
            enable_gqa=True,
            impl=impl,
        )
        np.testing.assert_allclose(array(found), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("score", "impl"), CASES)
def test_gradients_are_those_of_the_same_mask(score: str, impl: str) -> None:
    L, S = 7, 13
    for offset, window in BANDS:
        keep = torch.tensor(oracle.see(L, S, True, None, None, offset, window))
        gradients = []
        for options in (
            {"attn_mask": keep, "impl": "reference"},
            {"is_causal": True, "offset": offset, "window": window},
        ):
            torch.manual_seed(5)
            q, k, v = inputs(L, S)
            output = ba.attention(q, k, v, score=score, enable_gqa=True, **{"impl": impl, **options})
            gradients.append(torch.autograd.grad(output.square().sum(), (q, k, v)))
        for expected, found in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("score", SCORES)
def test_weights_of_all_keys_are_returned(score: str) -> None:
    q, k, v = inputs(3, 7)
    _, weights = ba.attention(
        q, k, v, score=score, is_causal=True, offset=2, window=2, enable_gqa=True, need_weights=True
    )
    assert weights.shape == (B, N, 3, 7)
    assert torch.equal(weights > 0, torch.tensor(oracle.see(3, 7, True, None, None, 2, 2)).expand_as(weights))


@pytest.mark.parametrize(("score", "impl"), CASES)
def test_keys_outside_the_band_never_count(score: str, impl: str) -> None:
    """Neither their numbers nor NaN there change a bit."""
    L, S, offset, window = 7, 17, 5, 3
    q, k, v = (x.detach() for x in inputs(L, S))

    def output(k: Tensor, v: Tensor) -> Tensor:
        return ba.attention(
            q, k, v, score=score, is_causal=True, offset=offset, window=window, enable_gqa=True, impl=impl
        )

    before = output(k, v)
    for spoiled in (17.0, torch.nan):
        for outside in (slice(0, offset - window + 1), slice(offset + L, S)):
            k_other, v_other = k.clone(), v.clone()
            k_other[:, :, outside] = v_other[:, :, outside] = spoiled
            assert torch.equal(output(k_other, v_other), before)
        # The last query's window begins where the first one's has ended.
        k_other, v_other = k.clone(), v.clone()
        k_other[:, :, : offset + L - window] = v_other[:, :, : offset + L - window] = spoiled
        assert torch.equal(output(k_other, v_other)[:, :, -1], before[:, :, -1])


def test_one_query_at_the_end_of_a_cache_is_a_call_without_restrictions() -> None:
    q, k, v = inputs(1, 13)
    assert ba.explain(q, k, v, is_causal=True, offset=12, enable_gqa=True).reasons == (
        ba.explain(q, k, v, enable_gqa=True).reasons
    )
    torch.testing.assert_close(
        ba.attention(q, k, v, is_causal=True, offset=12, window=4, enable_gqa=True),
        ba.attention(q, k[:, :, 9:], v[:, :, 9:], enable_gqa=True),
    )


def test_what_means_nothing_is_refused() -> None:
    q, k, v = inputs(3, 7)
    for options, words in (
        ({"offset": 2}, ("offset=2", "is_causal=True")),
        ({"window": 2}, ("window=2", "is_causal=True")),
        ({"is_causal": True, "offset": -1}, ("offset", ">= 0", "-1")),
        ({"is_causal": True, "window": 0}, ("window", ">= 1", "0")),
        ({"is_causal": True, "window": 2.5}, ("window", "whole number", "2.5")),
        ({"is_causal": True, "offset": torch.tensor(1)}, ("offset", "whole number", "tensor")),
    ):
        refused(lambda options=options: ba.attention(q, k, v, enable_gqa=True, **options), *words)


def test_one_graph_for_a_growing_cache() -> None:
    run = torch.compile(
        lambda q, k, offset: ba.attention(q, k, k, score="expressive", is_causal=True, offset=offset, window=4),
        fullgraph=True,
        backend="eager",
    )
    torch._dynamo.reset()
    for S in (9, 10, 11, 12):
        q, k = tokens(1, 2, 3, H), tokens(1, 2, S, H)
        expected = ba.attention(q, k, k, score="expressive", is_causal=True, offset=S - 3, window=4)
        torch.testing.assert_close(run(q, k, S - 3), expected)
