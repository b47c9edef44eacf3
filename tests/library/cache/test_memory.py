"""The memory of caches: of windows, after a refused call, in copies of a model, and in files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.cache.rows import SPARE
from helpers.compiler import Programs
from helpers.layers import refused


def build(**options: object) -> ba.MultiheadAttention:
    torch.manual_seed(2)
    return ba.MultiheadAttention(16, 2, batch_first=True, **options).eval()


def decode(module: nn.Module, x: Tensor, cache: ba.KVCache) -> Tensor:
    with torch.no_grad():
        return module(x, x, x, cache=cache, need_weights=False)[0]


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("max_len", [None, 4000])
@pytest.mark.parametrize("back", [0, 2])
def test_a_window_gives_back_what_a_long_prompt_took(max_len: int | None, dtype: torch.dtype | None, back: int) -> None:
    module = build(mechanism="efficient", window=8, rotary=True)
    cache = ba.KVCache(module, 1, max_len=max_len, dtype=dtype, rewind_room=3)
    x = torch.randn(1, 3600, 16)
    decode(module, x[:, :3000], cache)
    cache.rewind(back)
    found = decode(module, x[:, 3000 - back : 3001], cache)
    row = 16 * 4 if dtype is None else 16 + 2 * 4
    assert cache.nbytes == (8 + 3 + SPARE) * row
    cache.rewind(3)
    sizes = set()
    for new in x[:, 2998:].split(1, dim=1):
        found = decode(module, new, cache)
        sizes.add(cache.nbytes)
    assert sizes == {(8 + 3 + SPARE) * row}
    last = x[:, -8:]
    with torch.no_grad():
        expected = module(last, last, last, is_causal=True, need_weights=False)[0][:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 if dtype is None else 2e-2)


def test_a_large_window_grows_with_what_has_come() -> None:
    module = build(mechanism="standard", window=10**9, rotary=True)
    cache = ba.KVCache(module, 1)
    x = torch.randn(1, 2500, 16)
    found, sizes = [], []
    for new in x.split([3, *[1] * 2497], dim=1):
        found.append(decode(module, new, cache))
        sizes.append(cache.nbytes)
    # It doubles, so that it is never more than twice what is needed, and is copied a few times only.
    assert sizes[0] == 2 * SPARE * 2 * 16 * 4
    assert sizes[-1] < 2 * 2500 * 2 * 16 * 4
    assert len(set(sizes)) == 4
    with torch.no_grad():
        expected = module(x, x, x, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [8, 300])
def test_a_window_moves_its_rows_once_in_many_steps(window: int) -> None:
    module = build(mechanism="efficient", window=window)
    cache = ba.KVCache(module, 1)
    moves, kept = 0, 0
    for new in torch.randn(1, 2000, 16).split(1, dim=1):
        decode(module, new, cache)
        moves += cache.kept != kept + 1
        kept = cache.kept
    assert cache.nbytes == (window + SPARE) * 16 * 4
    assert moves <= 2000 / SPARE


@pytest.mark.slow
def test_compiled_steps_of_a_window_are_few_programs() -> None:
    torch._dynamo.reset()
    module = build(mechanism="efficient", window=4, rotary=True)
    programs = Programs("eager")
    compiled = torch.compile(module, fullgraph=True, backend=programs)
    cache, other = (ba.KVCache(module, 1, max_len=3000) for _ in range(2))
    x = torch.randn(1, 1700, 16)
    for held in (cache, other):
        decode(module, x[:, :1000], held)
    for new in x[:, 1000:].split(1, dim=1):
        torch.testing.assert_close(decode(compiled, new, cache), decode(module, new, other), rtol=1e-4, atol=1e-5)
    assert cache.nbytes == (4 + SPARE) * 16 * 4
    assert programs.count <= 5, f"{programs.count} programs for 700 steps"


# --- what fails -------------------------------------------------------------------------------------------------------


def test_a_refused_first_call_leaves_no_memory_and_no_dtype() -> None:
    module = build(mechanism="super", max_len=9, align_causal=True)
    cache = ba.KVCache(module, 1)
    refused(lambda: decode(module, torch.randn(1, 12, 16), cache), "max_len=9", "12")
    assert (cache.length, cache.nbytes) == (0, 0)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    assert decode(module.double(), x, cache).dtype == torch.float64


def test_words_of_what_is_refused() -> None:
    module, x = build(), torch.randn(1, 3, 16)
    refused(lambda: ba.KVCache(module, 1, device="foo"), "device", "'foo'", "'cuda:0'", kind=ValueError)
    refused(lambda: ba.ModelCache(module, 1, device="foo"), "device", "'foo'", "'cuda:0'", kind=ValueError)
    refused(lambda: ba.KVCache(module, 1, device=0.5), "device", "0.5", kind=TypeError)
    cache = ba.KVCache(module, 1)
    decode(module, x, cache)
    message = refused(lambda: cache.reorder(torch.tensor([1])), "sample 0", "[1]")
    assert "..." not in message
    refused(lambda: decode(module.double(), x.double(), cache), "dtype=torch.float64", "without the 3 tokens")
    empty = ba.KVCache(module, 1, dtype=torch.float32)
    assert "without" not in refused(lambda: decode(module, x.double(), empty), "dtype=torch.float64")


# --- copies and files -------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(build(mechanism=name, rotary=True) for name in ("standard", "efficient"))

    def forward(self, x: Tensor, cache: ba.ModelCache) -> Tensor:
        for attention in self.layers:
            x = x + attention(x, x, x, cache=cache[attention], need_weights=False)[0]
        return x


def test_a_model_and_its_cache_are_copied_together() -> None:
    model, x = Model().eval(), torch.randn(1, 9, 16)
    cache = ba.ModelCache(model, 1)
    with torch.no_grad():
        model(x[:, :6], cache)
        copied, its_cache = copy.deepcopy((model, cache))
        alone = copy.deepcopy(cache)
        model(torch.randn(1, 2, 16), cache.branch())
        expected = model(x[:, 6:], cache)
        torch.testing.assert_close(copied(x[:, 6:], its_cache), expected)
        torch.testing.assert_close(model(x[:, 6:], alone), expected)
    assert (its_cache.length, alone.length) == (9, 9)
    # And one layer, which may also hold its cache.
    attention = model.layers[0]
    attention.memory = ba.KVCache(attention, 1)
    decode(attention, x[:, :6], attention.memory)
    other = copy.deepcopy(attention)
    torch.testing.assert_close(decode(other, x[:, 6:], other.memory), decode(attention, x[:, 6:], attention.memory))


def test_a_file_takes_tensors_and_length() -> None:
    model = Model().eval()
    cache = ba.ModelCache(model, 1)
    attention = model.layers[0]
    for held, way in ((cache[attention], "KVCache.of"), (cache, "KVCache.of")):
        for save in (pickle.dumps, copy.copy, lambda held: torch.save(held, io.BytesIO())):
            refused(lambda: save(held), way, "length", "branch()", kind=TypeError)  # noqa: B023 - called at once
    x, held = torch.randn(1, 8, 16), ba.KVCache(attention, 1)
    decode(attention, x[:, :5], held)
    file = io.BytesIO()
    torch.save((held.tensors, held.length), file)
    file.seek(0)
    tensors, length = torch.load(file)
    again = ba.KVCache.of(attention, tensors, length=length)
    torch.testing.assert_close(decode(attention, x[:, 5:], again), decode(attention, x[:, 5:], held))
