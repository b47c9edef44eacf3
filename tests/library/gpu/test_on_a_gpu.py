"""On a real device: every GPU implementation against the reference, and none waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import better_attention as ba

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SCORES = ("softmax", "expressive")
IMPLS = ("triton", "flex")
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest number of each result. bfloat16 keeps 8 bits, and weights are rounded before they are multiplied."""
B, N, G, L, S = 2, 6, 2, 307, 331


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def leaves_of(dtype: torch.dtype, H: int, W: int, *, shared: bool = False, length: int = L) -> list[Tensor]:
    def draw(heads: int, rows: int, width: int) -> Tensor:
        return torch.randn(B, rows, heads, width, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()

    leaves = [draw(N, length, H), draw(G, S, H)]
    return leaves if shared else [*leaves, draw(G, S, W)]


def results(leaves: list[Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    output = ba.attention(leaves[0], leaves[1], leaves[-1], enable_gqa=True, **options)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


def check(impl: str, leaves: list[Tensor], W: int, **options: Any) -> None:
    upstream = torch.randn(*leaves[0].shape[:3], W, device="cuda", dtype=leaves[0].dtype)
    results(leaves, upstream, impl=impl, **options)  # compiles, and may try several tiles
    torch.cuda.synchronize()
    with nothing_waits():
        found = results(leaves, upstream, impl=impl, **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    exact = results(wide, upstream.double(), impl="reference", attn_mask=mask, **options)
    for ours, theirs in zip(found, exact, strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
        assert error.item() < TOLERANCE[leaves[0].dtype]


def restrictions() -> dict[str, dict[str, Any]]:
    shown = torch.rand(B, 1, L, S, device="cuda") > 0.4
    shown[..., 0] = True
    bias = torch.randn(1, N, L, S, device="cuda")
    return {
        "nothing": {},
        "triangle": {"is_causal": True},
        "window": {"is_causal": True, "offset": 13, "window": 101},
        "bool mask": {"attn_mask": shown},
        "additive mask": {"attn_mask": bias},
        "padding": {"attn_mask": shown[:, :, :1]},
    }


@pytest.mark.parametrize("name", ["nothing", "triangle", "window", "bool mask", "additive mask", "padding"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("impl", IMPLS)
def test_agrees_with_the_reference_and_waits_for_nothing(impl: str, score: str, dtype: torch.dtype, name: str) -> None:
    check(impl, leaves_of(dtype, 64, 64), 64, score=score, **restrictions()[name])


@pytest.mark.parametrize("width", [16, 24, 32, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_every_width(score: str, dtype: torch.dtype, width: int) -> None:
    check("triton", leaves_of(dtype, width, width), width, score=score, is_causal=True)


@pytest.mark.parametrize("length", [L, 3])
@pytest.mark.parametrize("score", SCORES)
def test_one_tensor_as_key_and_value(score: str, length: int) -> None:
    check("triton", leaves_of(torch.bfloat16, 64, 64, shared=True, length=length), 64, score=score)


@pytest.mark.parametrize("score", SCORES)
def test_the_weights_that_are_dropped_are_those_of_the_cpu(score: str) -> None:
    q, k = (torch.randn(1, 2, rows, 32) for rows in (67, 71))
    v = torch.eye(71).expand(1, 2, 71, 71)
    torch.manual_seed(5)
    there = ba.attention(q.cuda(), k.cuda(), v.cuda(), score=score, dropout_p=0.4, impl="triton")
    torch.manual_seed(5)
    here = ba.attention(q, k, v, score=score, dropout_p=0.4, impl="native")
    assert torch.equal(there.cpu() == 0, here == 0)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_the_same_call_gives_the_same_bits(score: str) -> None:
    leaves = leaves_of(torch.bfloat16, 64, 64)
    upstream = torch.randn(B, N, L, 64, device="cuda", dtype=torch.bfloat16)
    first, second = (results(leaves, upstream, score=score, is_causal=True, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("score", SCORES)
def test_chunked_waits_for_nothing(score: str) -> None:
    leaves = leaves_of(torch.float32, 32, 32)
    upstream = torch.randn(B, N, L, 32, device="cuda")
    results(leaves, upstream, score=score, is_causal=True, impl="chunked")
    torch.cuda.synchronize()
    with nothing_waits():
        results(leaves, upstream, score=score, is_causal=True, impl="chunked")


def test_the_choice() -> None:
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 2, 4096, 64, device="cuda", dtype=torch.bfloat16)
    assert ba.explain(q, k, k, score="expressive").chosen == "triton"
    assert ba.explain(q, k, k.clone()).chosen == "sdpa"
    assert ba.explain(q[:, :, :1], k, k).chosen == "triton", "one tensor is read once"
    assert ba.explain(q.double(), k.double(), k.double(), score="expressive").chosen == "chunked"


def test_a_compiled_model_trains() -> None:
    layer = ba.MultiheadAttention(128, 2, mechanism="expressive", batch_first=True, device="cuda")
    x = torch.randn(2, 65, 128, device="cuda")

    def loss(module: Any) -> Tensor:
        return module(x, x, x, is_causal=True, need_weights=False)[0].square().mean()

    plain = torch.autograd.grad(loss(layer), list(layer.parameters()))
    compiled = torch.autograd.grad(loss(torch.compile(layer, fullgraph=True)), list(layer.parameters()))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
