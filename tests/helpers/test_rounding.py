"""The bounds on rounding errors: from the arithmetic alone, and of the size that arithmetic has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from better_attention.scores import SCORES
from helpers.bridge import array, assert_within_rounding, rounded_attention
from helpers.native_cases import Case, Mask, problem
from helpers.rounding import Rounding, expected_errors


class WideOnly(TorchDispatchMode):
    """Fails where anything is computed in less than float64; conversions and copies are no computations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("mm", "bmm", "exp", "sum", "_softmax", "div", "pow", "sqrt"):
            narrow = [
                x.dtype for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dtype.itemsize < 8
            ]
            assert not narrow, f"{name} in {narrow}: a bound from this machine's arithmetic"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_a_bound_is_not_measured_on_this_machine(score: str, dtype: torch.dtype) -> None:
    case = Case((1, 2, 1, 43, 47, 8, 8), Mask("float32", "1N1S"), causal=True)
    problem.cache_clear()
    with WideOnly():
        found = problem(case, score, dtype)
    problem.cache_clear()
    assert found.error.largest > 0
    assert all(gradient.error.largest > 0 for gradient in found.strict_gradients)


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["signs cancel", "one sign"])
@pytest.mark.parametrize("n", [1, 7, 64, 500, 3000])
def test_sums_are_rounded_as_much_as_they_are(n: int, offset: float, rng: np.random.Generator) -> None:
    """Products added up one after the other in float32, in parts of 512 at most, are off by what is predicted."""
    a, b = (torch.from_numpy(rng.normal(size=(400, n)) + offset).float().double() for _ in range(2))
    exact = (a * b).sum(-1)
    products = (a.float().numpy() * b.float().numpy()).astype(np.float32)
    parts = [products[:, i : i + 512].cumsum(-1, dtype=np.float32)[:, -1] for i in range(0, n, 512)]
    computed = np.cumsum(parts, axis=0, dtype=np.float32)[-1]
    rounding = Rounding(rng)
    errors = [array(rounding.summed(exact, (a * b).square().sum(-1), n) - exact)[:, None] for _ in range(8)]
    predicted, found = np.sqrt(np.mean(np.square(errors))), np.sqrt(np.mean((computed - array(exact)) ** 2))
    assert 0.4 < found / predicted < 1.5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "planted",
    {
        "exponential": lambda w: w * (1 + 3e-6 * torch.sin(1e4 * w)),
        "last key missing": lambda w: w * (torch.arange(w.shape[-1]) < w.shape[-1] - 1),
        "normaliser": lambda w: w * (1 + 1e-6),
        "weights in bfloat16": lambda w: w.bfloat16().double(),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_planted_error_is_beyond_the_bound(planted: Any, score: str, rng: np.random.Generator) -> None:
    q, k, v = (torch.from_numpy(rng.normal(size=(1, 2, n, 16))).float().double() for n in (31, 41, 41))
    z = q @ k.mT / 4
    weights = z.softmax(-1) if score == "softmax" else z**2 / (1 + z**2) / (z**2 / (1 + z**2)).sum(-1, keepdim=True)
    exact = array(weights @ v)
    (allowed,) = expected_errors(lambda: [rounded_attention(q, k, v, score=score, rounding=Rounding(rng))], [exact])
    assert_within_rounding((weights @ v).float(), exact, allowed)
    with pytest.raises(AssertionError, match="error"):
        assert_within_rounding((planted[1](weights) @ v).float(), exact, allowed)
