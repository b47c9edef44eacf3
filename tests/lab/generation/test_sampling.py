"""Which token comes next: the distribution computed exactly, and tokens picked in exactly its proportions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from better_attention.lab.generation.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, pick

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.25, 0.05, 0.2], [0.02, 0.03, 0.9, 0.04, 0.01]], dtype=torch.float64))


def of(kept: dict[int, float]) -> Tensor:
    """Probabilities over five tokens, in proportion to these."""
    row = torch.zeros(5, dtype=torch.float64)
    for token, weight in kept.items():
        row[token] = weight
    return row / row.sum()


def oracle(logits: np.ndarray, temperature: float, k: int | None, p: float | None, m: float | None) -> np.ndarray:
    """One row, token by token: temperature, the k likeliest, the mass p, the share m of the likeliest."""
    weight = {token: math.exp((z - logits.max()) / temperature) for token, z in enumerate(logits)}
    ranked = sorted(weight, key=lambda token: (-weight[token], token))
    ranked = ranked[:k]
    if p is not None:
        total, kept = sum(weight[token] for token in ranked), []
        for token in ranked:
            if sum(weight[other] for other in kept) / total >= p:
                break
            kept.append(token)
        ranked = kept
    if m is not None:
        ranked = [token for token in ranked if weight[token] >= m * weight[ranked[0]]]
    total = sum(weight[token] for token in ranked)
    return np.array([weight[token] / total if token in ranked else 0.0 for token in range(len(logits))])


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.25, 3: 0.05, 4: 0.2}, {0: 0.02, 1: 0.03, 2: 0.9, 3: 0.04, 4: 0.01}),
        ({"temperature": 0.0}, {1: 1}, {2: 1}),
        ({"temperature": 0.5}, {0: 0.01, 1: 0.16, 2: 0.0625, 3: 0.0025, 4: 0.04}, {0: 4, 1: 9, 2: 8100, 3: 16, 4: 1}),
        ({"top_k": 2}, {1: 0.4, 2: 0.25}, {2: 0.9, 3: 0.04}),
        ({"top_p": 0.6}, {1: 0.4, 2: 0.25}, {2: 1}),
        ({"top_p": 0.66}, {1: 0.4, 2: 0.25, 4: 0.2}, {2: 1}),
        ({"min_p": 0.3}, {1: 0.4, 2: 0.25, 4: 0.2}, {2: 1}),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, {1: 0.4, 2: 0.25, 4: 0.2}, {2: 1}),
        # Of the two that are left by top_k, the first has 0.4/0.65 = 0.62 of the probability.
        ({"top_k": 2, "top_p": 0.6}, {1: 1}, {2: 1}),
    ],
)
def test_probabilities_by_hand(options: dict[str, Any], first: dict[int, float], second: dict[int, float]) -> None:
    found = Sampling(**options).probabilities(LOGITS)
    torch.testing.assert_close(found, torch.stack([of(first), of(second)]))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("k", [None, 1, 4, 50])
@pytest.mark.parametrize("p", [None, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("m", [None, 0.0, 0.2, 1.0])
def test_probabilities_are_those_of_the_oracle(
    temperature: float, k: int | None, p: float | None, m: float | None
) -> None:
    logits = 2 * torch.randn(3, 11, dtype=torch.float64)
    found = Sampling(temperature, k, p, m).probabilities(logits)
    expected = np.stack([oracle(row.numpy(), temperature, k, p, m) for row in logits])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_of_equal_logits_the_first_are_kept() -> None:
    equal = torch.zeros(1, 4)
    assert keep_top_k(equal, 2).tolist() == [[0, 0, -math.inf, -math.inf]]
    assert keep_top_p(equal, 0.5).tolist() == [[0, 0, -math.inf, -math.inf]]
    assert Sampling(temperature=0).probabilities(equal).tolist() == [[1, 0, 0, 0]]
    assert keep_min_p(equal, 1.0).tolist() == [[0, 0, 0, 0]]


def test_tokens_that_are_excluded_stay_so_and_no_temperature_overflows() -> None:
    logits = torch.tensor([[-math.inf, 1e4, 1e4 - 1.0]])
    assert Sampling(temperature=1e-300).probabilities(logits).tolist() == [[0, 1, 0]]
    hot = Sampling(temperature=1e300).probabilities(logits)
    torch.testing.assert_close(hot, torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64))


def test_every_token_is_picked_in_exactly_its_proportion() -> None:
    """Of 1,000 numbers at equal distances in [0, 1), each token gets its thousandths; none is left to chance."""
    shares = [Fraction(n, 1000) for n in (125, 0, 500, 0, 250, 125, 0)]
    probabilities = torch.tensor([[float(share) for share in shares]], dtype=torch.float64).expand(1000, -1)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = pick(probabilities, uniform).bincount(minlength=7)
    assert counts.tolist() == [int(1000 * share) for share in shares]


def test_the_ends_of_the_unit_interval() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 3, dtype=torch.float64)
    just_below_one = 1 - 2**-53
    assert pick(probabilities, torch.tensor([0.0, 0.5, just_below_one], dtype=torch.float64)).tolist() == [1, 2, 2]
    short = probabilities * (1 - 1e-9)  # rounding may leave a sum below one
    assert pick(short, torch.full((3,), just_below_one, dtype=torch.float64)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1"),
        ({"min_p": -1.0}, "min_p must be between 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
