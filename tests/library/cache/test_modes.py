"""A cache in the modes of torch: inference mode, gradients, programs; and after a step that was interrupted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from helpers.compiler import Programs
from helpers.layers import CAUSAL, WINDOWED, layer, refused, tokens

B, L, D, N = 2, 9, 16, 2
DECODERS = [*CAUSAL, *WINDOWED]


def build(name: str, **options: Any) -> ba.MultiheadAttention:
    return layer(name, D, N, max_len=L, **options).float().eval()


def step(module: nn.Module, x: Tensor, cache: ba.KVCache, **options: Any) -> Tensor:
    output: Tensor = module(x, x, x, cache=cache, need_weights=False, **options)[0]
    return output


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("name", ["standard", "efficient", "super causal", "super window"])
def test_memory_of_inference_mode_serves_outside(name: str, dtype: torch.dtype | None) -> None:
    module, x, padded = build(name), tokens(B, L, D, dtype=torch.float32), torch.zeros(B, 5, dtype=torch.bool)
    padded[1, :2] = True
    expected, found = [], []
    for outputs, mode in ((expected, torch.no_grad), (found, torch.inference_mode)):
        cache = ba.KVCache(module, B, dtype=dtype)
        with mode():
            outputs.append(step(module, x[:, :5], cache, key_padding_mask=padded))
            cache = cache.branch()
            cache.reorder(torch.tensor([1, 0]))
        with torch.no_grad():
            # A mask, so that the general way is taken, which writes through torch.
            outputs += [step(module, x[:, t : t + 1], cache, attn_mask=torch.zeros(1, t + 1)) for t in range(5, L)]
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_len", [None, L])
def test_memory_of_a_program_in_inference_mode_serves_outside(max_len: int | None) -> None:
    torch._dynamo.reset()
    module, x = build("standard"), tokens(B, L, D, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    cache = ba.KVCache(module, B, max_len=max_len)
    with torch.inference_mode():
        step(compiled, x, cache)
    with torch.no_grad():
        cache.rewind(1)
        step(module, x[:, -1:], cache, attn_mask=torch.zeros(1, L))
    assert cache.length == L


@pytest.mark.parametrize("name", DECODERS)
def test_no_output_with_a_gradient(name: str) -> None:
    """Whichever part it comes from: what memory has been written over would give wrong gradients."""
    module, x = build(name), tokens(B, 5, D, dtype=torch.float32)
    cache = ba.KVCache(module, B)
    for parameter in module.parameters():
        module.requires_grad_(False)
        parameter.requires_grad_()
        refused(lambda: step(module, x, cache), "gradients", "torch.no_grad()")
    module.requires_grad_(False)
    bias = torch.zeros(5, 5, requires_grad=True)
    refused(lambda: step(module, x, cache, attn_mask=bias), "gradients")
    assert cache.length == 0
    step(module, x, cache)


def test_one_device_by_two_names() -> None:
    module, x = build("standard"), tokens(B, 5, D, dtype=torch.float32)
    cache = ba.KVCache(module, B, device="cpu:0")
    with torch.no_grad():
        step(module, x, cache)
        refused(lambda: step(module, x, ba.KVCache(module, B, device="meta")), "meta", "cpu")
    assert cache.length == 5


@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"alibi": "score"}, {"alibi": "weight"}])
@pytest.mark.parametrize("name", DECODERS)
def test_no_token_is_no_output(name: str, options: dict[str, Any]) -> None:
    module, none = build(name, **options), torch.zeros(B, 0, D)
    cache = ba.KVCache(module, B)
    with torch.no_grad():
        for held in range(5):
            for mask in (None, torch.zeros(0, held)):
                output, weights = module(none, none, none, attn_mask=mask, cache=cache)
                assert output.shape == none.shape
                assert weights.shape[:2] == (B, 0)
            step(module, tokens(B, 1, D, dtype=torch.float32), cache)
        assert module(none, none, none, is_causal=True)[0].shape == none.shape
    assert cache.length == 5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused_in_words() -> None:
    module = build("standard")
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([torch.zeros(2, D), torch.zeros(3, D)], layout=layout)
        with torch.no_grad():
            refused(lambda x=x: step(module, x, ba.KVCache(module, B)), "nested", "pad it")


def test_a_program_notices_the_cache_of_another_layer() -> None:
    torch._dynamo.reset()
    layers, x = [build("standard") for _ in range(3)], tokens(B, 1, D, dtype=torch.float32)
    caches, programs = [ba.KVCache(module, B) for module in layers], Programs("eager")
    compiled = [torch.compile(module, backend=programs) for module in layers]
    with torch.no_grad():
        for _ in range(3):
            for module, cache in zip(compiled, caches, strict=True):
                step(module, x, cache)
        assert programs.count <= 3, f"{programs.count} programs for 3 layers"
        refused(lambda: step(compiled[0], x, caches[1]), "another layer")
        step(compiled[0], x, caches[0])


def test_a_copy_is_another_layer() -> None:
    module, x = build("standard"), tokens(B, 1, D, dtype=torch.float32)
    cache = ba.KVCache(module, B)
    with torch.no_grad():
        for other in (copy.deepcopy(module), copy.deepcopy([module])[0]):
            refused(lambda other=other: step(other, x, cache), "another layer")
            step(other, x, ba.KVCache(other, B))
        step(module, x, cache)


@pytest.mark.parametrize("name", ["standard", "efficient window", "super window"])
def test_an_interrupted_step_is_noticed_and_taken_back(name: str) -> None:
    layers = nn.ModuleList(build(name) for _ in range(2))
    x = tokens(B, L, D, dtype=torch.float32)

    def both(new: Tensor, cache: ba.ModelCache) -> Tensor:
        for module in layers:
            new = step(module, new, cache[module])
        return new

    with torch.no_grad():
        whole = both(x, ba.ModelCache(layers, B))
        cache = ba.ModelCache(layers, B)
        for n in (5, 1):
            both(x[:, cache.length : cache.length + n], cache)
        step(layers[0], x[:, 6:7], cache[layers[0]])  # and no further
        refused(lambda: both(x[:, 6:7], cache), "interrupted", "6", "7", "settle()", "reset()")
        assert cache.settle() == 6
        torch.testing.assert_close(both(x[:, 6:], cache), whole[:, 6:], rtol=1e-4, atol=1e-5)
        cache.rewind(1)
        step(layers[0], x[:, :1], cache[layers[0]])
        cache.rewind(1)
        refused(lambda: both(x[:, 7:8], cache), "interrupted")
