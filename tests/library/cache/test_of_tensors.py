"""Caches that are taken apart into tensors and made of tensors again: in eager calls, and in exported programs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from helpers.compiler import CachedStep
from helpers.layers import layer, refused

B, D, N = 2, 16, 2
LAYERS: dict[str, dict[str, Any]] = {
    "standard": {"mechanism": "standard"},
    "standard window": {"mechanism": "standard", "window": 4},
    "expressive window": {"mechanism": "expressive", "window": 4},
    "standard+align window": {"mechanism": "standard+align", "window": 4},
    "efficient": {"mechanism": "efficient"},
    "efficient window": {"mechanism": "efficient", "window": 4},
    "super window": {"mechanism": "super", "window": 4},
}


def build(name: str) -> ba.MultiheadAttention:
    torch.manual_seed(1)
    module = ba.MultiheadAttention(D, N, batch_first=True, rotary=True, **LAYERS[name])
    return module.eval().requires_grad_(False)


def decode(module: nn.Module, x: Tensor, cache: ba.KVCache, padded: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return module(x, x, x, key_padding_mask=padded, cache=cache, need_weights=False)[0]


def filled(module: ba.MultiheadAttention, x: Tensor, dtype: torch.dtype | None, padded: bool) -> ba.KVCache:
    """A cache that has read ``x``, the last tokens one by one, so that a window has moved."""
    cache = ba.KVCache(module, B, dtype=dtype)
    prompt = x.shape[1] - 3
    hide = torch.zeros(B, prompt, dtype=torch.bool)
    hide[1, : prompt - 2] = True  # into the window, too
    decode(module, x[:, :prompt], cache, hide if padded else None)
    for new in x[:, prompt:].split(1, dim=1):
        decode(module, new, cache)
    return cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_of_tensors_continues_as_the_first(name: str, dtype: torch.dtype | None, padded: bool) -> None:
    module, x = build(name), torch.randn(B, 305, D)
    cache = filled(module, x[:, :300], dtype, padded)
    other = ba.KVCache.of(module, cache.tensors, length=cache.length)
    assert (other.length, other.kept) == (cache.length, cache.kept)
    for new in x[:, 300:].split([1, 1, 3], dim=1):
        torch.testing.assert_close(decode(module, new, other), decode(module, new, cache), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["standard", "efficient window"])
def test_the_tensors_stay_as_they_were(name: str) -> None:
    """Also where there would be room in them: after going back, and behind a window that moves."""
    module, x = build(name), torch.randn(B, 40, D)
    tensors = filled(module, x, None, padded=False).tensors
    before = [t.clone() for t in tensors]
    for back in (0, 3):
        cache = ba.KVCache.of(module, tensors, length=40)
        cache.rewind(back if module.window is None else 0)
        for new in x[:, :3].split(1, dim=1):
            decode(module, new, cache)
        cache.reset()
        decode(module, x[:, :3], cache)
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("name", ["standard", "standard window", "efficient window", "super window"])
def test_an_exported_step_carries_windows_codes_and_padding(name: str, dtype: torch.dtype | None, padded: bool) -> None:
    module, x = build(name), torch.randn(B, 308, D)
    cache = filled(module, x[:, :300], dtype, padded)
    held = [t.contiguous() for t in cache.tensors]
    rows = {1: torch.export.Dim("rows", min=4, max=400)}
    program = torch.export.export(
        CachedStep(module),
        (x[:, 300:301], held, 300),
        dynamic_shapes=(None, [rows] * len(held), torch.export.Dim.DYNAMIC),
    ).module()
    for t in range(300, 308):
        new = x[:, t : t + 1]
        output, held = program(new, held, t)
        torch.testing.assert_close(output, decode(module, new, cache), rtol=1e-4, atol=1e-4 if dtype else 1e-6)
    assert [t.dtype for t in held] == [t.dtype for t in cache.tensors]


def test_what_no_cache_can_be_made_of() -> None:
    key = torch.zeros(1, 4, D)
    module, windowed = build("standard"), build("standard window")

    def of(*tensors: Any, **options: Any) -> None:
        refused(lambda: ba.KVCache.of(module, tensors), *options["words"])

    of(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), words=("tensors[0]", "key", "(batch, length, 16)", "(1, 4, 8)"))
    of(key, torch.zeros(1, 4, 8), words=("tensors[1]", "value", "(batch, length, 16)", "(1, 4, 8)"))
    of(key[..., None], key, words=("(1, 4, 16, 1)", "(batch, length, 16)"))
    of(torch.zeros(4), torch.zeros(4), words=("(batch, length, 16)", "(4,)"))
    of(key.long(), key.long(), words=("tensors[0]", "int64", "float32"))
    of(key.to(torch.int8), key.to(torch.int8), words=("scales", "received 2"))
    of(key, key.double(), words=("dtype", "float32", "float64"))
    of(key, key[:, :3], words=("length", "(1, 3, 16)"))
    of(key, key, torch.ones(1, 3, dtype=torch.bool), words=("length", "bool"))
    of(key.tolist(), key.tolist(), words=("tensors[0]", "list"))
    of(key.numpy(), np.zeros((1, 4, D)), words=("tensors[0]", "ndarray", "torch.as_tensor"))
    of(words=("key and value", "received 0"))
    codes, scale = torch.zeros(1, 4, D, dtype=torch.int8), torch.zeros(1, 4, N)
    of(codes, codes, scale, scale[..., :1], words=("value scale", "(batch, length, 2)", "(1, 4, 1)"))
    of(codes, codes, scale.double(), scale, words=("tensors[2]", "float32", "float64"))
    refused(lambda: ba.KVCache.of(module, key), "tuple or list", "(1, 4, 16)")
    refused(lambda: ba.KVCache.of(nn.Linear(2, 2), [key]), "MultiheadAttention", "Linear")
    # Lengths: without a window the rows say it, with one they do not.
    refused(lambda: ba.KVCache.of(module, [key, key], length=5), "length", "4", "received 5")
    refused(lambda: ba.KVCache.of(windowed, [key, key]), "window=4", "length=cache.length")
    refused(lambda: ba.KVCache.of(windowed, [key, key], length=3), "length", "4", "received 3")
    refused(lambda: ba.KVCache.of(windowed, [key[:, :2], key[:, :2]], length=9), "window - 1 = 3", "received 9")
    refused(lambda: ba.KVCache.of(windowed, [key, key], length=4.0), "length", "4.0")
    assert ba.KVCache.of(windowed, [key, key], length=9).length == 9


def test_rows_of_another_width_are_never_read() -> None:
    """Whoever wrote them: the kernels read as many numbers as the layer has."""
    wide = layer("standard", 256, 2).float().eval()
    cache = ba.KVCache(wide, 1)
    for stream in cache.streams:
        cache.write(stream, torch.randn(1, 3, 8))
    cache.commit(3)
    refused(lambda: decode(wide, torch.randn(1, 1, 256), cache), "8 wide", "256 wide")
