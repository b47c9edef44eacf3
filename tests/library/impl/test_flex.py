"""FlexAttention's route: its score and its masks, on a CPU, in float64, against the oracle.

``flex_attention`` itself has no derivative on a CPU, so that these tests call the operator below it, which has one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as operator
from torch.nn.attention.flex_attention import _create_empty_block_mask, create_block_mask

from better_attention.call.call import Call
from better_attention.impl import flex
from helpers import oracle
from helpers.bridge import array, assert_close
from helpers.native_cases import Mask, draw_mask, exact_gradients, oracle_masks

SCORES = ("softmax", "expressive")
SIZES = (2, 4, 2, 19, 23, 17, 16)
"""B, N, G, L, S, H, W."""


def on_cpu(
    q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """``flex_attention`` without its refusal of derivatives on a CPU."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    blocks = _create_empty_block_mask(q, k) if block_mask is None else block_mask
    output: Tensor = operator(q, k, v, score_mod or (lambda score, *_: score), blocks.as_tuple(), scale, {})[0]
    return output


def call_of(score: str, rng: np.random.Generator, **options: Any) -> Call:
    B, N, G, L, S, H, W = SIZES
    q, k, v = (
        torch.from_numpy(rng.normal(size=size)).requires_grad_() for size in ((B, N, L, H), (B, G, S, H), (B, G, S, W))
    )
    return Call(q, k, v, score=score, scale=H**-0.5, **options)


def check(call: Call, rng: np.random.Generator) -> None:
    """Output and gradients are the oracle's."""
    (B, N, L, _), S = call.q_BNLH.shape, call.k_BNSH.shape[2]
    keep, bias = oracle_masks(call.masks, (B, N, L, S), call.score)
    arrays = [array(x) for x in (call.q_BNLH, call.k_BNSH, call.v_BNSH)]
    exact, weights = oracle.attention(
        *arrays, score=call.score, keep=keep, bias=bias, causal=call.causal, offset=call.offset, window=call.window,
        scale=call.scale,
    )  # fmt: skip
    output = flex.attend(call, on_cpu, create_block_mask)
    assert_close(output, exact, tolerance=1e-10)
    upstream = rng.normal(size=exact.shape)
    found = torch.autograd.grad(output, (call.q_BNLH, call.k_BNSH, call.v_BNSH), torch.from_numpy(upstream))
    for ours, theirs in zip(found, exact_gradients(*arrays, weights, upstream, call.score, call.scale), strict=True):
        assert_close(ours, theirs, tolerance=1e-9)


RESTRICTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "triangle": {"causal": True},
    "window": {"causal": True, "offset": 5, "window": 7},
    "bool mask": {"mask_BNLS": Mask("bool", "1NLS", "rows")},
    "bool mask of samples": {"mask_BNLS": Mask("bool", "B1LS")},
    "additive mask": {"mask_BNLS": Mask("float32", "BNLS", "rows")},
    "lowest number": {"mask_BNLS": Mask("float32", "11LS", lowest=True)},
    "padding and triangle": {"padding_B11S": Mask("bool", "B11S"), "causal": True},
    "additive padding and mask": {"padding_B11S": Mask("float32", "B11S"), "mask_BNLS": Mask("bool", "11LS")},
}


@pytest.mark.parametrize("name", RESTRICTIONS)
@pytest.mark.parametrize("score", SCORES)
def test_output_and_gradients_are_those_of_the_oracle(score: str, name: str, rng: np.random.Generator) -> None:
    B, N, _, L, S, _, _ = SIZES
    options = {
        key: draw_mask(value, rng, (B, N, L, S)) if isinstance(value, Mask) else value
        for key, value in RESTRICTIONS[name].items()
    }
    check(call_of(score, rng, **options), rng)


def test_rows_without_weight_are_zero_and_have_finite_gradients(rng: np.random.Generator) -> None:
    """A zero query, keys that are all orthogonal, and an orthogonal key among others."""
    call = call_of("expressive", rng)
    q, k, v = (x.detach() for x in (call.q_BNLH, call.k_BNSH, call.v_BNSH))
    k[..., 0] = 0
    k[:, :, 5] = 0
    q[:, :, 2] = 0
    q[:, :, 3] = 0
    q[:, :, 3, 0] = 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output = flex.attend(replace(call, q_BNLH=q, k_BNSH=k, v_BNSH=v), on_cpu, create_block_mask)
    assert not output[:, :, [2, 3]].any()
    dq, dk, dv = torch.autograd.grad(output.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert not dq[:, :, 2].any()
    assert not dv[:, :, 5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_weight_is_exact_and_finite_at_any_size(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-30, 30, 61, dtype=torch.float64)
    z = torch.cat([-sizes, sizes]).to(dtype).requires_grad_()
    exact = array(z)
    found = flex.log_expressive(z)
    large = np.maximum(np.abs(exact), 1)
    expected = np.where(np.abs(exact) <= 1, 2 * np.log(np.abs(exact)) - np.log1p(exact**2), -np.log1p(large**-2.0))
    # Below the smallest normal number there are fewer digits.
    tiny = torch.finfo(dtype).tiny
    np.testing.assert_allclose(array(found), expected, rtol=4 * torch.finfo(dtype).eps, atol=tiny)
    (slope,) = torch.autograd.grad(found.sum(), z)
    np.testing.assert_allclose(
        array(slope), np.where(np.abs(exact) < 1e12, 2 / (exact * (1 + np.minimum(exact**2, 1e30))), array(slope)),
        rtol=20 * torch.finfo(dtype).eps, atol=tiny,
    )  # fmt: skip
    zero = torch.zeros(1, dtype=dtype, requires_grad=True)
    assert flex.log_expressive(zero).item() == -np.inf
    assert torch.autograd.grad(flex.log_expressive(zero), zero)[0].item() == 0


def test_the_mask_of_a_triangle_is_made_once() -> None:
    made = []

    def counting(*arguments: Any) -> Any:
        made.append(arguments)
        return create_block_mask(*arguments)

    rng = np.random.default_rng(0)
    for _ in range(3):
        flex.attend(call_of("softmax", rng, causal=True), on_cpu, counting)
    assert len(made) == 1


def test_hidden_blocks_are_skipped() -> None:
    """The window's block mask leaves most blocks of a long call out."""
    mask = flex._band_mask(create_block_mask, 1024, 1024, 0, 128, torch.device("cpu"))
    assert mask.sparsity() > 70


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
def test_a_compiled_graph_has_the_gradients_of_its_masks_too(score: str, rng: np.random.Generator) -> None:
    """As on a GPU, with the graph run as it is: what is captured, such as a learned bias, is an input of the graph."""
    mask = torch.from_numpy(rng.normal(size=(1, SIZES[1], SIZES[3], SIZES[4]))).float().requires_grad_()
    call = call_of(score, rng, mask_BNLS=mask, causal=True)
    leaves = (call.q_BNLH, call.k_BNSH, call.v_BNSH, mask)
    from better_attention.impl import reference

    expected, _ = reference.compute(replace(call, mask_BNLS=mask.double()))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*_: Tensor) -> Tensor:
        return flex.attend(call, on_cpu, create_block_mask)

    output = compiled(*leaves)
    assert_close(output, expected, tolerance=1e-10)
    found = torch.autograd.grad(output.square().sum(), leaves)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        assert_close(ours, theirs, tolerance=1e-6 if ours.dtype == torch.float32 else 1e-9)
