"""What a fresh eye found, each once: autocast, odd scales, nested input, small causal masks, odd paddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.scores import SCORES
from helpers.registry import computing

IMPLS = ("reference", "chunked")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_does_not_undo_the_float32_inside(
    dtype: torch.dtype, score: str, impl: str, need_weights: bool
) -> None:
    if impl == "chunked" and need_weights:
        impl = "auto"
    q, k, v = (torch.randn(1, 2, 256, 16) * size for size in (20.0, 20.0, 1.0))
    halves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=dtype):
        result = ba.attention(*halves, score=score, impl=impl, need_weights=need_weights, is_causal=True)
        output: Tensor = result[0] if need_weights else result
    gradients = torch.autograd.grad(output.float().square().sum(), halves)
    outside = ba.attention(*halves, score=score, impl=impl if not need_weights else "reference", is_causal=True)
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)
    torch.testing.assert_close(output, outside, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", [0.0, -0.5, -1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scales_that_are_not_positive(scale: float, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 64, 8, dtype=dtype) for _ in range(3))
    expected = ba.attention(q, k, v, is_causal=True, scale=scale, impl="reference")
    for impl in computing("softmax", dtype):
        torch.testing.assert_close(ba.attention(q, k, v, is_causal=True, scale=scale, impl=impl), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mechanism", ["standard", "efficient", "super", "expressive"])
@pytest.mark.parametrize("swapped", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_any_layer_of_a_built_encoder_may_be_swapped(mechanism: str, swapped: tuple[int, ...]) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), 3)
    options = {"max_len": 8} if mechanism == "super" else {}
    for i in swapped:
        encoder.layers[i].self_attn = ba.MultiheadAttention(16, 4, batch_first=True, mechanism=mechanism, **options)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 5:] = True
    x = torch.randn(2, 8, 16)
    expected = encoder.train()(x, src_key_padding_mask=padding)[~padding]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = encoder.eval()(x, src_key_padding_mask=padding)
        assert output.shape == x.shape
        torch.testing.assert_close(output[~padding], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_is_refused_where_it_cannot_be_taken() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
    layer = ba.MultiheadAttention(16, 4, batch_first=True)
    with pytest.raises(TypeError, match=r"to_padded_tensor.*use_nested_tensor"):
        layer(nested, nested, nested)


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("window", [3, 6])
def test_a_full_kernel_refuses_causal_windows(value: float, window: int) -> None:
    layer = ba.MultiheadAttention(16, 4, mechanism="super", max_len=6, batch_first=True)
    i = torch.arange(6)
    hide = (i > i[:, None]) | (i <= i[:, None] - window)
    x = torch.randn(1, 6, 16)
    for mask in (hide, torch.zeros(6, 6).masked_fill(hide, value)):
        with pytest.raises(ValueError, match="align_causal"):
            layer(x, x, x, attn_mask=mask)
    layer(x, x, x, attn_mask=torch.zeros(6, 6).masked_fill(hide.T, value))  # looking ahead only is not causal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lowest_float32_bias_means_the_same_on_every_path(dtype: torch.dtype) -> None:
    q = torch.randn(1, 2, 64, 8).to(dtype)
    mask = torch.zeros(64, 64)
    mask[3] = torch.finfo(torch.float32).min
    rows = [ba.attention(q, q, q, attn_mask=mask, impl=impl)[0, 0, 3].float() for impl in (*IMPLS, "auto")]
    assert rows[0].abs().max() > 0
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mechanism", ["standard", "efficient", "expressive", "super"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_nan_behind_a_lowest_float_padding(mechanism: str, need_weights: bool) -> None:
    options = {"max_len": 40} if mechanism == "super" else {}
    layer = ba.MultiheadAttention(16, 4, batch_first=True, mechanism=mechanism, **options)
    x = torch.randn(2, 40, 16)
    loud = x.clone()
    loud[1, 30:] = math.nan
    padding = torch.zeros(2, 40)
    padding[1, 30:] = torch.finfo(torch.float32).min
    quiet, _ = layer(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    output, _ = layer(x, loud, loud, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(output, quiet)


@pytest.mark.parametrize("value", [-1e9, -1e4])
def test_what_is_as_good_as_minus_infinity_never_reaches_w_a(value: float) -> None:
    layer = ba.MultiheadAttention(16, 4, batch_first=True, mechanism="super", max_len=40)
    x = torch.randn(2, 40, 16)
    loud = x.clone()
    loud[1, 30:] *= 1e3
    padding = torch.zeros(2, 40)
    padding[1, 30:] = value
    quiet, _ = layer(x, x, x, key_padding_mask=padding)
    assert torch.equal(layer(x, loud, loud, key_padding_mask=padding)[0], quiet)


def test_a_packed_matrix_of_another_height_is_reported() -> None:
    layer = ba.MultiheadAttention(16, 4)
    with pytest.raises(RuntimeError, match=r"in_proj_weight"):
        layer.load_state_dict({"in_proj_weight": torch.zeros(2, 16)})


def test_assert_causal_on_bools_and_complex_numbers() -> None:
    inputs = torch.tensor([[True, False, True]])
    ba.assert_causal(lambda x: x.float().cumsum(1), inputs)
    with pytest.raises(AssertionError, match="position 0 moved"):
        ba.assert_causal(lambda x: x.float().flip(1), inputs)
    with pytest.raises(TypeError, match="complex64"):
        ba.assert_causal(lambda x: x, torch.zeros(1, 3, dtype=torch.complex64))
