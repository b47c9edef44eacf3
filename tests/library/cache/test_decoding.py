"""Decoding with a cache: step by step, in chunks, after going back, and in beams, as in one pass over all tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import better_attention as ba
from better_attention.bench.machine import extra_memory
from better_attention.layer.decode import decoding, step, stored
from better_attention.native.library import instruction_sets, missing
from helpers.cached_models import Layers, continued
from helpers.compiler import Programs
from helpers.layers import CAUSAL, WINDOWED, layer, refused, tokens

B, L, D, N = 3, 23, 12, 2
CHUNKS = {"one by one": [1] * L, "in twos": [2] * 11 + [1], "in threes": [3] * 7 + [2], "in sevens": [7, 7, 7, 2],
          "uneven": [5, 1, 11, 1, 1, 4], "at once": [L]}  # fmt: skip
DECODERS = [*CAUSAL, *WINDOWED]
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": True},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "learned scale": {"scale": "learned"},
    "length first": {"batch_first": False},
}
CASES = [
    (name, extra)
    for name in DECODERS
    for extra in EXTRAS
    if not (extra == "extra keys" and "window" in name and ba.Mechanism.of(layer(name).mechanism).aligned)
]


def build(name: str, **options: Any) -> ba.MultiheadAttention:
    return layer(name, D, N, max_len=L, **options).double().eval()


def decode(module: nn.Module, x: Tensor, chunks: list[int], cache: ba.KVCache, padded: Tensor | None = None) -> Tensor:
    """The outputs (B, L, D) of ``x`` (B, L, D) in chunks."""
    first, outputs, start = module.batch_first, [], cache.length
    with torch.no_grad():
        for n in chunks:
            here = cache.length - start
            new = x[:, here : here + n]
            new = new if first else new.transpose(0, 1)
            hide = None if padded is None else padded[:, here : here + n]
            output, _ = module(new, new, new, key_padding_mask=hide, need_weights=False, cache=cache)
            outputs.append(output if first else output.transpose(0, 1))
    return torch.cat(outputs, dim=1)


def at_once(module: nn.Module, x: Tensor, padded: Tensor | None = None) -> Tensor:
    x = x if module.batch_first else x.transpose(0, 1)
    with torch.no_grad():
        output, _ = module(x, x, x, key_padding_mask=padded, is_causal=True, need_weights=False)
    return output if module.batch_first else output.transpose(0, 1)


def left_padded() -> Tensor:
    padded = torch.zeros(B, L, dtype=torch.bool)
    padded[1, :4], padded[2, :9] = True, True
    return padded


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_chunks_are_one_pass(name: str, extra: str) -> None:
    module, x = build(name, **EXTRAS[extra]), tokens(B, L, D)
    expected = at_once(module, x)
    for chunks in CHUNKS.values():
        for max_len in (None, L):
            cache = ba.KVCache(module, B, max_len=max_len)
            torch.testing.assert_close(decode(module, x, chunks, cache), expected, rtol=1e-10, atol=1e-12)
            assert cache.length == L


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_is_remembered(name: str) -> None:
    module, x, padded = build(name), tokens(B, L, D), left_padded()
    expected = at_once(module, x, padded)
    for chunks in CHUNKS.values():
        found = decode(module, x, chunks, ba.KVCache(module, B), padded)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # Padding that is told of once need not be told of again.
    cache = ba.KVCache(module, B)
    prompt = decode(module, x[:, :11], [11], cache, padded[:, :11])
    rest = decode(module, x[:, 11:], [1] * 12, cache)
    torch.testing.assert_close(torch.cat([prompt, rest], dim=1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["standard", "efficient", "efficient window", "super window"])
def test_a_left_padded_sequence_is_the_sequence_alone(name: str) -> None:
    """With rotary positions, whose distances do not change. (W_A of fixed length counts from the padding on.)"""
    module, x, padded = build(name, rotary=True), tokens(B, L, D), left_padded()
    together = decode(module, x, [13, 1, 1, 8], ba.KVCache(module, B), padded)
    for b, start in enumerate((0, 4, 9)):
        alone = at_once(module, x[b : b + 1, start:])
        torch.testing.assert_close(together[b : b + 1, start:], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", DECODERS)
def test_going_back(name: str) -> None:
    module, x = build(name), tokens(B, L, D)
    expected = at_once(module, x)
    cache = ba.KVCache(module, B, rewind_room=6)
    decode(module, x[:, :11], [7, 1, 1, 1, 1], cache)
    for other, back in ((tokens(B, 3, D), 3), (tokens(B, 2, D), 5)):  # two wrong ways, the second from further back
        decode(module, other, [1] * other.shape[1], cache)
        cache.rewind(back)
    assert cache.length == 8
    found = decode(module, x[:, 8:], [3] + [1] * 12, cache)
    torch.testing.assert_close(found, expected[:, 8:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DECODERS)
def test_branches_and_beams(name: str) -> None:
    module, x = build(name), tokens(B, L, D)
    cache = ba.KVCache(module, B)
    decode(module, x[:, :9], [4, 5], cache)
    branch = cache.branch()
    decode(module, tokens(B, 3, D), [3], branch)  # must not reach the other's memory
    index = torch.tensor([2, 0, 0, 1])
    beams = cache.branch()
    beams.reorder(index)
    found = decode(module, x[index][:, 9:], [1] * (L - 9), beams)
    torch.testing.assert_close(found, at_once(module, x[index])[:, 9:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        decode(module, x[:, 9:], [L - 9], cache), at_once(module, x)[:, 9:], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", DECODERS)
def test_reset_begins_anew_in_the_same_memory(name: str) -> None:
    module, x = build(name), tokens(B, L, D)
    cache = ba.KVCache(module, B, max_len=L)
    decode(module, x, [L], cache, left_padded())
    held = [t.data_ptr() for t in cache.tensors[: len(cache.streams)]]
    cache.reset()
    torch.testing.assert_close(decode(module, x, [9, 1, 13], cache), at_once(module, x), rtol=1e-10, atol=1e-12)
    assert [t.data_ptr() for t in cache.tensors] == held or module.window is not None


@pytest.mark.parametrize("name", DECODERS)
def test_masks_and_weights_of_all_tokens(name: str) -> None:
    module, x = build(name), tokens(B, L, D)
    mask = torch.randn(L, L, dtype=torch.float64)
    with torch.no_grad():
        expected, weights = module(x, x, x, attn_mask=mask, is_causal=True)
    cache = ba.KVCache(module, B)
    at = 0
    for n in CHUNKS["uneven"]:
        new = x[:, at : at + n]
        with torch.no_grad():
            output, found = module(new, new, new, attn_mask=mask[at : at + n, : at + n], cache=cache)
        torch.testing.assert_close(output, expected[:, at : at + n], rtol=1e-10, atol=1e-12)
        # Of what a window has forgotten there are no weights; they would be 0.
        forgotten = at + n - found.shape[2]
        torch.testing.assert_close(found, weights[:, at : at + n, forgotten : at + n], rtol=1e-10, atol=1e-12)
        assert forgotten == 0 or not weights[:, at : at + n, :forgotten].any()
        at += n


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("spoiled", [7.0, torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "int8"])
def test_no_output_depends_on_a_later_token(name: str, spoiled: float, kind: str) -> None:
    """Bit for bit, for the same chunks, with numbers that no sum forgives; by one call of the kernels, and in parts."""
    dtype = torch.float32 if kind == "int8" else getattr(torch, kind)
    kept = torch.int8 if kind == "int8" else None
    module, x = build(name, rotary=True).to(dtype), tokens(B, L, D, dtype=dtype)
    other = x.clone()
    other[:, 13:] = spoiled
    for batch in (1, B):
        for chunks in CHUNKS.values():
            caches = [ba.KVCache(module, batch, dtype=kept) for _ in range(2)]
            pair = zip((x[:batch], other[:batch]), caches, strict=True)
            found = [decode(module, given, chunks, cache) for given, cache in pair]
            assert torch.equal(found[0][:, :13], found[1][:, :13])
            assert spoiled == 7.0 or found[1][:, 13:].isnan().all()
            if module.window is not None:
                continue
            # What was remembered is no number either; taken back, nothing is left of it.
            new = x[:batch, :1]
            caches[1].rewind(1)  # W_A has no place for more
            assert spoiled == 7.0 or decode(module, new, [1], caches[1]).isnan().all()
            for cache in caches:
                cache.rewind(cache.length - 13)
            again = [decode(module, x[:batch, 13:15], [2], cache) for cache in caches]
            assert torch.equal(*again)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_bytes() -> None:
    sizes = {}
    for name in ("standard", "optimised", "efficient", "super causal", "expressive"):
        module = layer(name, 64, 4, max_len=128).float().eval()
        cache = ba.KVCache(module, 2, max_len=128)
        x = tokens(2, 100, 64, dtype=torch.float32)
        decode(module, x, [90, 1, 1, 8], cache)
        sizes[name] = cache.nbytes
        assert cache.nbytes == 128 * 2 * ba.cost(64, 4, 128, mechanism=module.mechanism).cache_bytes_per_token
    assert sizes["efficient"] * 2 == sizes["standard"] == sizes["optimised"] == sizes["super causal"]


@pytest.mark.parametrize("chunks", [[5], [70], [60, 1, 1, 1, 1, 1, 1], [64, 65]])
def test_a_cache_that_grows_has_one_length_for_all_its_tensors(chunks: list[int]) -> None:
    sizes = {}
    for name in ("standard", "efficient"):
        module = layer(name, 8, 2).float().eval()
        cache = ba.KVCache(module, 2)
        decode(module, tokens(2, sum(chunks), 8, dtype=torch.float32), chunks, cache)
        sizes[name] = cache.nbytes
    assert sizes["standard"] == 2 * sizes["efficient"] < 2 * 2 * 8 * 4 * max(65, 2.2 * sum(chunks))


@pytest.mark.parametrize("name", ["efficient window", "super window"])
def test_a_window_has_constant_memory(name: str) -> None:
    module = layer(name, 8, 2).float().eval()
    cache = ba.KVCache(module, 1)
    x = tokens(1, 2000, 8, dtype=torch.float32)
    decode(module, x[:, :1000], [1] * 1000, cache)
    before = cache.nbytes
    found = decode(module, x[:, 1000:], [1] * 1000, cache)
    assert cache.nbytes == before < 300 * 8 * 4
    torch.testing.assert_close(found, at_once(module, x)[:, 1000:], rtol=1e-4, atol=1e-5)


KEPT = {
    "as it is": ({}, None),
    "rotated while it is read": ({"rotary": True}, None),
    "in int8": ({}, torch.int8),
    "in int8, rotated while it is read": ({"rotary": True}, torch.int8),
    "with distances in the score": ({"alibi": "score"}, None),
    "with distances on the weights": ({"alibi": "weight"}, None),
    "in int8, with distances in the score": ({"alibi": "score"}, torch.int8),
}
"""How the kernels read a cache: options of the layer, and the cache's dtype."""


@pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["standard", "optimised", "efficient", "super causal", "expressive"])
def test_one_token_makes_nothing_as_long_as_the_cache(name: str, padded: bool) -> None:
    """A step allocates less than a byte for each token that is remembered."""
    length = 4095
    module = layer(name, 256, 4, max_len=4096).float().eval()
    cache = ba.KVCache(module, 1, max_len=4096)
    hide = torch.arange(length)[None] < 5 if padded else None
    decode(module, tokens(1, length, 256, dtype=torch.float32), [length], cache, hide)
    x = tokens(1, 1, 256, dtype=torch.float32)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        module(x, x, x, cache=cache, need_weights=False)
    assert max(event.cpu_memory_usage for event in profile.events()) < length


@pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.parametrize("kept", [*KEPT, "in bfloat16"])
@pytest.mark.parametrize(
    ("name", "kv_heads"),
    [*((name, 8) for name in ("standard", "optimised", "efficient", "expressive")), ("standard", 2), ("optimised", 2)],
)
def test_one_token_copies_nothing_of_the_cache(name: str, kv_heads: int, kept: str) -> None:
    """Seen from outside, because under torch's profiler steps go another way."""
    length, width = 1 << 14, 512
    options, dtype = KEPT.get(kept, ({}, torch.bfloat16))
    number = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    module = layer(name, width, 8, num_kv_heads=kv_heads, **options).to(number).eval()
    cache = ba.KVCache(module, 1, max_len=length + 3, dtype=dtype)
    x = tokens(1, length, width, dtype=number)
    for stream, heads in zip(cache.streams, module.cache_heads, strict=True):
        cache.write(stream, x[..., : heads * module.head_dim])
    cache.commit(length)
    new = x[:, :1]

    def step() -> None:
        decode(module, new, [1], cache)

    step()
    step()
    grown = extra_memory(step)
    assert grown is None or grown < length * width // 8  # a copy has at least twice as many bytes, of two heads


@pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_w_a_reads_an_int8_cache_in_pieces(heads: str) -> None:
    """Each new token's own value is mixed from all earlier ones, of which few are numbers at a time."""
    length, width = 1 << 12, 256
    torch.manual_seed(0)
    options = {"align_causal": True, "align_heads": heads, "max_len": length + 3, "batch_first": True}
    module = ba.MultiheadAttention(width, 2, mechanism="super", **options).eval().requires_grad_(False)
    cache = ba.KVCache(module, 1, max_len=length + 3, dtype=torch.int8)
    x = tokens(1, length + 1, width, dtype=torch.float32)
    decode(module, x[:, :length], [length], cache)
    pieces = cache.branch()
    hooked = module.align.register_forward_hook(lambda *_: None)  # whole values are seen
    whole = decode(module, x[:, length:], [1], cache)
    hooked.remove()
    torch.testing.assert_close(decode(module, x[:, length:], [1], pieces), whole)

    def step() -> None:
        decode(module, x[:, length:], [1], pieces)
        pieces.rewind(1)

    pieces.rewind(1)
    step()
    grown = extra_memory(step)
    assert grown is None or grown < length * width  # in float32 the values have four times as many bytes


@pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", DECODERS)
def test_the_kernels_read_what_everyone_reads(name: str, kept: str) -> None:
    """Steps in float32 by the kernels are those of the same cache by plain operators."""
    options, dtype = KEPT[kept]
    x, padded = tokens(B, L, 64, dtype=torch.float32), left_padded()
    outputs = []
    # W_A of a window changes weights, so that no kernel computes it.
    for impl in ("auto", "reference"):
        torch.manual_seed(1)
        module = layer(name, 64, 4, max_len=L, spread=0.1, impl=impl, **options).float().eval()
        cache = ba.KVCache(module, B, dtype=dtype)
        outputs.append(decode(module, x, [9, 1, 2, 1, 1, 3, 1, 5], cache, padded))
    # With AVX-512 products with codes may be of integers, with queries and weights of 16 bits.
    coarse = dtype is torch.int8 and "avx512" in instruction_sets()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=2e-4 if coarse else 1e-5)


class LookingOn(TorchFunctionMode):
    """Has every function of torch called in the sight of others, so that nothing goes past them to the kernels."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", [*CAUSAL, "efficient window"])
def test_one_call_is_all_the_steps_in_between(name: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens take one call, which remembers and gives what separate operators do."""
    options, dtype = KEPT[kept]
    module = layer(name, 40, 4, max_len=L, spread=0.3, **options).float().eval()
    x, padded = tokens(B, L, 40, dtype=torch.float32), left_padded()
    calls: list[str] = []
    call = step.call_library
    monkeypatch.setattr(step, "call_library", lambda *given: (calls.append(given[0]), call(*given))[1])
    for hide in (None, padded):
        found = []
        for in_one in (True, False):
            cache = ba.KVCache(module, B, dtype=dtype)
            with nullcontext() if in_one else LookingOn():
                # The padding is in the first chunk; what follows comes without a mask.
                first = decode(module, x[:, :9], [9], cache, hide)
                rest = decode(module, x[:, 9:], [1, 2, 1, 1, 3, 1, 5], cache)
            found.append((torch.cat([first, rest], 1), [cache.read(stream, 0) for stream in cache.streams]))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5 if dtype is None else 5e-3)
        for ours, theirs in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 if dtype is None else 2e-2)
    aligned, scaled = module.mechanism.aligned, module.scaling is not None
    assert set(calls) == (set() if aligned or scaled else {"ba_layer_step"})


UNUSUAL: dict[str, Any] = {
    "a hook on a map": lambda module: module.out_proj.register_forward_hook(lambda part, given, output: 2 * output),
    "an adapter": lambda module: setattr(module, "q_proj", nn.Sequential(module.q_proj, nn.Tanh())),
    "another forward": lambda module: setattr(module.q_proj, "forward", lambda x: 3 * x),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_one_call_leaves_nothing_out(what: str) -> None:
    """What changes a part of the layer changes a step."""
    torch.manual_seed(1)
    module = layer("efficient", 16, 2).float().eval()
    UNUSUAL[what](module)
    x = tokens(2, 9, 16, dtype=torch.float32)
    found = decode(module, x, [4, 1, 1, 1, 1, 1], ba.KVCache(module, 2))
    torch.testing.assert_close(found, at_once(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_hidden_token_that_is_no_number_stays_hidden(number: float) -> None:
    module = layer("efficient", 16, 2).float().eval()
    x = tokens(2, 9, 16, dtype=torch.float32)
    hide = torch.zeros(2, 5, dtype=torch.bool)
    hide[1, :2] = True
    expected = decode(module, x[:, 5:], [1] * 4, after(module, x[:, :5], hide))
    x[1, 0] = number
    # The layer stores a padded token as zeros; here the cache holds what a caller put into it.
    cache = after(module, x[:, :5], hide)
    cache.tensors[0][1, 0] = number
    found = decode(module, x[:, 5:], [1] * 4, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def after(module: ba.MultiheadAttention, x: Tensor, hide: Tensor) -> ba.KVCache:
    """A cache that holds ``x``."""
    cache = ba.KVCache(module, len(x))
    decode(module, x, [x.shape[1]], cache, hide)
    return cache


def test_int8_is_a_quarter_and_close() -> None:
    for name in ("standard", "efficient", "super causal", "super window"):
        module = layer(name, 64, 4, max_len=64, spread=0.1).float().eval()
        x = tokens(2, 50, 64, dtype=torch.float32)
        caches = [ba.KVCache(module, 2, max_len=64, dtype=dtype) for dtype in (None, torch.int8)]
        exact, rounded = (decode(module, x, [30] + [1] * 20, cache) for cache in caches)
        error = (rounded - exact).norm() / exact.norm()
        assert 0.0 < error < 0.02
        # One byte a number instead of four, and four more for every 16 numbers of a head.
        assert caches[1].nbytes == caches[0].nbytes * (16 + 4) // (16 * 4)


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "efficient", "super causal", "efficient window"])
@pytest.mark.parametrize("max_len", [None, L])
def test_a_compiled_step(name: str, max_len: int | None) -> None:
    torch._dynamo.reset()
    module, x = build(name, rotary=True), tokens(B, L, D)
    expected = at_once(module, x)
    programs = Programs("eager")
    compiled = torch.compile(module, fullgraph=True, backend=programs)
    cache = ba.KVCache(module, B, max_len=max_len)
    decode(module, x[:, :9], [9], cache)
    for t in range(9, L):
        new = x[:, t : t + 1]
        with torch.no_grad():
            output, _ = compiled(new, new, new, cache=cache, need_weights=False)
        torch.testing.assert_close(output, expected[:, t : t + 1], rtol=1e-10, atol=1e-12)
    assert programs.count <= 3, f"{programs.count} programs for {L - 9} steps"


class Step(nn.Module):
    """A step with its cache as plain inputs and outputs."""

    def __init__(self, attention: ba.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, held: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = ba.KVCache.of(self.attention, held)
        output, _ = self.attention(x, x, x, cache=cache, need_weights=False)
        return output, list(cache.tensors)


@pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("kept", KEPT)
def test_a_compiled_step_reads_the_cache_as_it_is_stored(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    options, dtype = KEPT[kept]
    module = layer("efficient", 64, 4, **options).float().eval()
    x, padded = tokens(B, L, 64, dtype=torch.float32), left_padded()
    programs, by_kernels = Programs("inductor"), stored.by_kernels
    served: list[bool] = []

    def watched(call: stored.Stored) -> Tensor | None:
        heads = by_kernels(call)
        served.append(heads is not None)
        return heads

    monkeypatch.setattr(stored, "by_kernels", watched)
    compiled = torch.compile(module, fullgraph=True, backend=programs)
    caches = [ba.KVCache(module, B, max_len=L, dtype=dtype) for _ in range(2)]
    for cache in caches:
        decode(module, x[:, :11], [11], cache, padded)
    for t in range(11, L):
        new = x[:, t : t + 1]
        with torch.no_grad():
            outputs = [model(new, new, new, cache=cache, need_weights=False)[0]
                       for model, cache in zip((module, compiled), caches, strict=True)]  # fmt: skip
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5 if dtype is None else 5e-3)
    assert programs.count <= 3, f"{programs.count} programs for {L - 11} steps"
    assert served == [True] * (0 if kept == "as it is" else L - 11)


@pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.parametrize("kept", [kept for kept in KEPT if kept != "as it is"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_operator_without_kernels(kept: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiled program calls gives the same by plain operators, where the kernels turn a call down."""
    options, dtype = KEPT[kept]
    module = layer("efficient", 64, 4, **options).float().eval()
    given: list[Any] = []
    by_kernels = stored.by_kernels
    monkeypatch.setattr(decoding, "by_kernels", lambda call: (given.append(call), by_kernels(call))[1])
    cache = ba.KVCache(module, B, dtype=dtype)
    # More tokens of a batch than a step in one call takes, and few enough of each sequence for these kernels.
    decode(module, tokens(B, L, 64, dtype=torch.float32), [9, 6, 7], cache, left_padded() if padded else None)
    assert len(given) >= 2
    for call in given[-2:]:
        expected = by_kernels(call)
        assert expected is not None
        with torch.no_grad(), LookingOn():
            found = stored.operator(*call)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.stride() == expected.stride()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "optimised", "efficient", "super causal", "standard+align"])
def test_an_exported_step(name: str) -> None:
    options = {"align_causal": True} if name == "standard+align" else {}
    module, x = build(name, rotary=True, **options).requires_grad_(False), tokens(B, L, D)
    expected = at_once(module, x)
    cache = ba.KVCache(module, B)
    decode(module, x[:, :7], [7], cache)
    length = torch.export.Dim("length", min=2, max=L - 1)
    program = torch.export.export(
        Step(module).eval(), (x[:, 7:8], list(cache.tensors)), dynamic_shapes=(None, [{1: length}] * len(cache.tensors))
    ).module()
    held = list(cache.tensors)
    for t in range(7, L):
        output, held = program(x[:, t : t + 1], held)
        torch.testing.assert_close(output, expected[:, t : t + 1], rtol=1e-10, atol=1e-12)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    module, x = build("standard"), tokens(B, 5, D)
    with torch.no_grad():

        def call(cache: object, given: Tensor = x, **options: Any) -> None:
            module(given, given, given, cache=cache, need_weights=False, **options)

        cache = ba.KVCache(module, B, max_len=7)
        call(cache)
        refused(lambda: call(cache), "max_len=7", "holds 5", "5 more")
        refused(lambda: call(cache, x[:2]), "3 sequences", "received 2", "reorder")
        refused(lambda: call(ba.KVCache(build("standard"), B)), "another layer", "ModelCache")
        refused(lambda: call(ba.ModelCache(module, B)), "KVCache", "cache[layer]")
        refused(lambda: call(cache, x[:, :1].float()), "float")
        refused(lambda: module(x, x.clone(), x, cache=cache), "self-attention")
        refused(lambda: call(cache, x[:, :1], key_padding_mask=torch.zeros(B, 1)), "bool")
        refused(lambda: call(cache, x[:, :1], key_padding_mask=[[False]] * B), "bool", "list")
        refused(lambda: call(cache, x[:, :1], attn_mask=torch.zeros(1, 5, dtype=torch.bool)), "attn_mask", "(1, 6)")
        refused(lambda: cache.rewind(6), "5", "6")
        refused(lambda: cache.rewind(-1), "tokens", "-1")
        refused(lambda: cache.reorder(torch.tensor([0, 3])), "0 ... 2", "[0, 3]")
        refused(lambda: cache.reorder([0, 1]), "index")
        assert cache.length == 5, "a refused call changed the cache"
        call(cache, x[:, :2])
    module.requires_grad_()
    refused(lambda: module(x, x, x, cache=ba.KVCache(module, B)), "gradients", "torch.no_grad()")


def test_what_cannot_be_cached() -> None:
    full = layer("super", D, N, max_len=9).double().eval()
    x = tokens(B, 5, D)
    with torch.no_grad():
        refused(lambda: full(x, x, x, cache=ba.KVCache(full, B)), "full W_A", "align_causal=True", "window")
        triangular = layer("super causal", D, N, max_len=9).double().eval()
        cache = ba.KVCache(triangular, B)
        triangular(x, x, x, cache=cache)
        refused(lambda: triangular(x, x, x, cache=cache), "max_len=9", "10")
        assert cache.length == 5
        torch.testing.assert_close(decode(triangular, tokens(B, 4, D), [4], cache).shape, torch.Size([B, 4, D]))
    refused(lambda: ba.KVCache(nn.Linear(2, 2), 1), "MultiheadAttention", "Linear")
    refused(lambda: ba.KVCache(full, 0), "batch_size")
    refused(lambda: ba.KVCache(full, 1, dtype=torch.int32), "dtype")
    refused(lambda: ba.ModelCache(nn.Linear(2, 2), 1), "Linear", "MultiheadAttention")
    refused(lambda: ba.KVCache.of(full, [torch.zeros(1, 2, D)]), "2", "key and value")


def test_a_forgotten_token_cannot_come_back() -> None:
    module = build("efficient window")
    cache = ba.KVCache(module, B, rewind_room=2)
    x = tokens(B, 600, D)
    decode(module, x, [1] * 600, cache)
    cache.rewind(2)
    refused(lambda: cache.rewind(cache.length), "take back", "rewind_room")
    torch.testing.assert_close(
        decode(module, x[:, 598:], [1, 1], cache), at_once(module, x)[:, 598:], rtol=1e-9, atol=1e-11
    )


def test_all_layers_of_a_model() -> None:
    model = Layers(build(name) for name in ("standard", "efficient", "super causal", "super window")).eval()
    cache, other = continued(model, tokens(B, L, D), tokens(B, 2, D))
    assert (len(cache), cache.length, other.batch_size) == (4, L, 4)
    cache.reset()
    assert cache.length == 0
    with pytest.raises(KeyError, match="does not contain"):
        cache[build("standard")]
