"""The expressive score where squares of scores underflow or overflow: right by the formula in float64, or exactly 0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.native.library import missing
from better_attention.scores import SCORES
from helpers.bridge import array
from helpers.layers import layer, tokens
from helpers.registry import computing

B, N, L, S, H = 1, 2, 6, 6, 4
POSITIONS = torch.arange(6.0)
MASKS: dict[str, Tensor | None] = {
    "none": None,
    "ALiBi": -(POSITIONS - POSITIONS[:, None]).abs(),
    "causal": torch.ones(L, S, dtype=torch.bool).tril(),
}
IMPLEMENTATIONS = {dtype: computing("expressive", dtype) for dtype in (torch.float32, torch.float64)}
SIZES: dict[torch.dtype, list[tuple[float, float]]] = {
    torch.float32: [
        *((10.0 ** (e / 2), 10.0 ** (e / 2)) for e in (-74, -45, -30, -18, 0, 7, 15, 30)),
        *((1e-36, 1.0), (1.0, 1e-36), (1e-36, 1e15), (1e15, 1e-36), (1e18, 1e18)),
    ],
    torch.float64: [
        *((10.0 ** (e / 2), 10.0 ** (e / 2)) for e in (-300, -45, -16, 0, 9, 30, 200)),
        *((1e-306, 1.0), (1.0, 1e-306), (1e-306, 1e100)),
    ],
}
"""Of queries and keys: both ends of the documented range, and z from 1e-74 to 1e36."""
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
"""That of float64 is the oracle's: its logarithms reach 1400."""
CELLS = [(dtype, impl, *sizes) for dtype, impls in IMPLEMENTATIONS.items() for impl in impls for sizes in SIZES[dtype]]


def usable(impl: str) -> str:
    if impl == "native" and missing():
        pytest.skip("the compiled kernels are missing")
    return impl


def by_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, grad: Tensor) -> list[np.ndarray]:
    """Output and gradients in float64, the logarithm of the weights in place of squares."""
    q, k, v, grad = (array(x.detach()) for x in (q, k, v, grad))
    z = q @ k.swapaxes(-1, -2) * scale
    # log(1 + z^2), and 1 / (1 + z^2), of numbers whose squares float64 does not hold
    growth = np.logaddexp(0.0, 2.0 * np.log(np.abs(z)))
    logarithm = 2.0 * np.log(np.abs(z)) - growth
    if mask is not None:
        logarithm = np.where(mask, logarithm, -np.inf) if mask.dtype == torch.bool else logarithm + array(mask)
    weights = np.exp(logarithm - logarithm.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dw = grad @ v.swapaxes(-1, -2)
    dz = weights * (dw - (weights * dw).sum(-1, keepdims=True)) * 2.0 * np.exp(-growth) / z * scale
    return [weights @ v, dz @ k, dz.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ grad]


@pytest.mark.parametrize(("dtype", "impl", "size_q", "size_k"), CELLS)
def test_outputs_and_gradients_are_right_at_every_size(
    dtype: torch.dtype, impl: str, size_q: float, size_k: float
) -> None:
    for name, mask in MASKS.items():
        # No sum of q.k cancels: what is asked is about sizes.
        q, k, v = ((torch.rand(B, N, n, H, dtype=dtype) + 0.5) * tokens(B, N, n, 1).sign().to(dtype) for n in (L, S, S))
        q, k, v = ((x * size).requires_grad_() for x, size in ((q, size_q), (k, size_k), (v, 1.0)))
        grad = tokens(B, N, L, H, dtype=dtype)
        given = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
        output = ba.attention(q, k, v, score="expressive", attn_mask=given, impl=usable(impl))
        found = [output, *torch.autograd.grad(output, (q, k, v), grad)]
        for of, a, b in zip(("output", "q", "k", "v"), found, by_formula(q, k, v, mask, H**-0.5, grad), strict=True):
            nothing = 16 * float(torch.finfo(dtype).tiny)  # what the dtype cannot tell from 0
            bound = TOLERANCE[dtype] * np.abs(b).max() + nothing
            np.testing.assert_allclose(array(a.detach()), b, rtol=0, atol=bound, err_msg=f"{of}, mask {name}")


ALONE: dict[str, Callable[[torch.dtype], tuple[int, dict[str, object], slice]]] = {
    "one key": lambda dtype: (1, {}, slice(None)),
    "one key with a bias": lambda dtype: (1, {"attn_mask": torch.full((1, 1), -2.5, dtype=dtype)}, slice(None)),
    "one key not hidden": lambda dtype: (S, {"attn_mask": torch.arange(S) == 2}, slice(None)),
    "one key with a finite bias": lambda dtype: (
        S,
        {"attn_mask": torch.full((S,), -torch.inf, dtype=dtype).index_fill(0, torch.tensor(2), 1.5)},
        slice(None),
    ),
    "the first query under the triangle": lambda dtype: (S, {"is_causal": True}, slice(0, 1)),
}
"""Number of keys, arguments, and the queries that see one key only."""


@pytest.mark.parametrize("form", ALONE)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("dtype", "impl"),
    [
        *((dtype, impl) for dtype, impls in IMPLEMENTATIONS.items() for impl in impls),
        *((dtype, impl) for dtype in (torch.bfloat16, torch.float16) for impl in computing("expressive", dtype)),
    ],
)
def test_one_key_has_all_the_weight_whatever_the_query_is(dtype: torch.dtype, impl: str, score: str, form: str) -> None:
    keys, options, alone = ALONE[form](dtype)
    for size in (1e-5, 1.0):
        q, k, v = (tokens(2, 3, n, H, dtype=dtype) for n in (L, keys, keys))
        q, k, v = q.mul(size).requires_grad_(), k.mul(size).requires_grad_(), v.requires_grad_()
        output = ba.attention(q, k, v, score=score, impl=usable(impl), **options)[:, :, alone]
        output.backward(tokens(*output.shape, dtype=dtype))
        assert not q.grad.any()
        assert not k.grad.any()


@pytest.mark.parametrize("causal", [False, True])
def test_the_projections_of_query_and_key_learn_nothing_from_one_token(causal: bool) -> None:
    module = layer("expressive", 8, 2).float()
    x = tokens(3, 1, 8, dtype=torch.float32)
    module(x, x, x, need_weights=False, is_causal=causal)[0].square().sum().backward()
    for projection in (module.q_proj, module.k_proj):
        assert not projection.weight.grad.any()
    assert module.v_proj.weight.grad.any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_higher_derivatives_are_right(size: float) -> None:
    q, k, v = (tokens(1, 1, n, 3).requires_grad_() for n in (2, 4, 4))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ba.attention(q * size, k, v, score="expressive", impl="reference")

    torch.autograd.gradgradcheck(call, (q, k, v), eps=1e-6, atol=1e-4)
