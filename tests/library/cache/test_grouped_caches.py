"""Caches of layers whose keys and values have fewer heads than their queries: narrower, and otherwise as all others."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.native.library import instruction_sets, missing
from helpers.cached_models import Layers, continued
from helpers.compiler import CachedStep, Programs
from helpers.grouped import drawn, expanded, repeated
from helpers.layers import refused, tokens

B, L, N, H = 3, 23, 6, 4
D = N * H
GROUPS = (1, 2)

CHUNKS = {"one by one": [1] * L, "in twos": [2] * 11 + [1], "in threes": [3] * 7 + [2], "in sevens": [7, 7, 7, 2],
          "mixed": [5, 1, 9, 1, 1, 6], "at once": [L]}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "standard": {"mechanism": "standard"},
    "optimised": {"mechanism": "optimised"},
    "expressive": {"mechanism": "expressive"},
    "optimised+expressive": {"mechanism": "optimised+expressive"},
    "standard+align": {"mechanism": "standard+align", "max_len": L, "align_causal": True},
    "optimised+align per head": {
        "mechanism": "optimised+align+expressive", "max_len": L, "align_causal": True, "align_heads": "per_head",
    },
    "standard+align per head": {
        "mechanism": "standard+align", "max_len": L, "align_causal": True, "align_heads": "per_head",
    },
    "keys alone": {"mechanism": ba.Mechanism(frozenset("k"))},
    "window": {"mechanism": "standard", "window": 4},
    "window of slices": {"mechanism": "optimised+expressive", "window": 3},
    "W_A of a window": {"mechanism": "standard+align", "window": 4, "align_heads": "per_head"},
    "W_A of a window of slices": {"mechanism": "optimised+align+expressive", "window": 4, "align_heads": "per_head"},
}  # fmt: skip
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": True},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "learned scale": {"scale": "learned"},
    "distances in the score": {"alibi": "score"},
    "distances on the weights": {"alibi": "weight", "rotary": True},
}
CLOSE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-4, 2e-5)}
HEADS = pytest.mark.parametrize(
    ("groups", "dtype"), [(1, torch.float32), (2, torch.float32), (3, torch.float64)], ids=["1", "2", "3 in float64"]
)
"""In float64 plain operators compute what the kernels do in float32."""
needs_native = pytest.mark.skipif(missing() is not None, reason="the compiled kernels are missing")


def aligned_window(name: str) -> bool:
    options = DECODERS[name]
    return ba.Mechanism.of(options["mechanism"]).aligned and "window" in options


def build(name: str, groups: int, extra: str = "plain", **more: Any) -> ba.MultiheadAttention:
    return drawn(D, N, groups, **(DECODERS[name] | EXTRAS[extra] | more)).double().eval()


def decode(module: nn.Module, x: Tensor, chunks: list[int], cache: ba.KVCache, padded: Tensor | None = None) -> Tensor:
    """The outputs (B, L, D) of ``x`` (B, L, D) in chunks."""
    outputs, at = [], 0
    with torch.no_grad():
        for n in chunks:
            new, hide = x[:, at : at + n], None if padded is None else padded[:, at : at + n]
            outputs.append(module(new, new, new, key_padding_mask=hide, need_weights=False, cache=cache)[0])
            at += n
    return torch.cat(outputs, dim=1)


def at_once(module: nn.Module, x: Tensor, padded: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(x, x, x, key_padding_mask=padded, is_causal=True, need_weights=False)[0]
    return output


def left_padded(length: int = L) -> Tensor:
    padded = torch.zeros(B, length, dtype=torch.bool)
    padded[1, :4], padded[2, :9] = True, True
    return padded


def same(found: Tensor, expected: Tensor) -> None:
    rtol, atol = CLOSE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


CASES = [(n, e) for n in DECODERS for e in EXTRAS if not (e == "extra keys" and aligned_window(n))]
"""W_A of a window takes no extra keys."""


@HEADS
@pytest.mark.parametrize(("name", "extra"), CASES)
def test_chunks_are_one_pass(name: str, extra: str, groups: int, dtype: torch.dtype) -> None:
    module, x = build(name, groups, extra).to(dtype), tokens(B, L, D, dtype=dtype)
    expected = at_once(module, x)
    for index, chunks in enumerate(CHUNKS.values()):
        if extra != "plain" and index % 2 == 0:
            continue
        cache = ba.KVCache(module, B, max_len=L if index in (1, 2, 4) else None)
        same(decode(module, x, chunks, cache), expected)
        assert cache.length == L


@HEADS
@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_is_remembered(name: str, groups: int, dtype: torch.dtype) -> None:
    module, x, padded = build(name, groups).to(dtype), tokens(B, L, D, dtype=dtype), left_padded()
    expected = at_once(module, x, padded)
    for chunks in CHUNKS.values():
        same(decode(module, x, chunks, ba.KVCache(module, B), padded), expected)
    cache = ba.KVCache(module, B)
    prompt = decode(module, x[:, :11], [11], cache, padded[:, :11])
    same(torch.cat([prompt, decode(module, x[:, 11:], [1] * 12, cache)], dim=1), expected)


@HEADS
@pytest.mark.parametrize("name", DECODERS)
def test_going_back_branches_beams_and_beginning_anew(name: str, groups: int, dtype: torch.dtype) -> None:
    module, x = build(name, groups).to(dtype), tokens(B, L, D, dtype=dtype)
    expected = at_once(module, x)
    cache = ba.KVCache(module, B, rewind_room=6)
    decode(module, x[:, :11], [7, 1, 1, 1, 1], cache)
    for length, back in ((3, 3), (2, 5)):  # two wrong ways, the second from further back
        decode(module, tokens(B, length, D, dtype=dtype), [1] * length, cache)
        cache.rewind(back)
    assert cache.length == 8
    branch = cache.branch()
    decode(module, tokens(B, 3, D, dtype=dtype), [3], branch)  # must not reach the other's memory
    index = torch.tensor([2, 0, 0, 1])
    beams = cache.branch()
    beams.reorder(index)
    same(decode(module, x[index][:, 8:], [1] * 15, beams), expected[index][:, 8:])
    same(decode(module, x[:, 8:], [3] + [1] * 12, cache), expected[:, 8:])
    cache.reset()
    same(decode(module, x, [9, 1, 13], cache), expected)


@HEADS
@pytest.mark.parametrize("name", DECODERS)
def test_masks_and_weights_of_all_tokens(name: str, groups: int, dtype: torch.dtype) -> None:
    module, x, mask = build(name, groups).to(dtype), tokens(B, L, D, dtype=dtype), torch.randn(B * N, L, L, dtype=dtype)
    with torch.no_grad():
        expected, weights = module(x, x, x, attn_mask=mask, is_causal=True, average_attn_weights=False)
    cache, at = ba.KVCache(module, B), 0
    for n in CHUNKS["mixed"]:
        new, seen = x[:, at : at + n], mask[:, at : at + n, : at + n]
        with torch.no_grad():
            output, found = module(new, new, new, attn_mask=seen, cache=cache, average_attn_weights=False)
        same(output, expected[:, at : at + n])
        forgotten = at + n - found.shape[-1]  # a window has no weights of what it has forgotten; they would be 0
        same(found, weights[:, :, at : at + n, forgotten : at + n])
        at += n


@pytest.mark.parametrize("kept", [None, torch.int8])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", DECODERS)
def test_no_output_depends_on_a_later_token(name: str, groups: int, kept: torch.dtype | None) -> None:
    """Bit for bit, for the same chunks."""
    for dtype, spoiled in ((torch.float32, 7.0), (torch.float64, torch.nan)):
        module, x = build(name, groups, "rotary").to(dtype), tokens(B, L, D, dtype=dtype)
        other = x.clone()
        other[:, 13:] = spoiled
        for chunks in ("mixed", "at once"):
            found = [decode(module, given, CHUNKS[chunks], ba.KVCache(module, B, dtype=kept)) for given in (x, other)]
            assert torch.equal(found[0][:, :13], found[1][:, :13])


@pytest.mark.parametrize("kept", [None, torch.int8])
@pytest.mark.parametrize("groups", [2, N])
def test_a_later_token_that_is_no_number_moves_no_bit(groups: int, kept: torch.dtype | None) -> None:
    """In float32, by the kernels, in the chunk of the earlier ones."""
    module, x = build("standard", groups).float(), tokens(B, 9, D, dtype=torch.float32)
    other = x.clone()
    other[:, 6:] = torch.nan
    found = [decode(module, given, [3, 6], ba.KVCache(module, B, dtype=kept)) for given in (x, other)]
    assert torch.equal(found[0][:, :6], found[1][:, :6])


# --- many query heads for one key head --------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("kept", [None, torch.int8, torch.bfloat16])
@pytest.mark.parametrize("mechanism", ["standard", "optimised", "expressive", "optimised+expressive"])
@pytest.mark.parametrize(
    ("width", "heads", "groups"),
    [
        *((8, 32, 2), (8, 9, 1), (20, 16, 1), (64, 16, 1)),
        *(
            pytest.param(width, heads, groups, marks=pytest.mark.slow)
            for width in (8, 20, 64)
            for heads, groups in ((16, 1), (16, 2), (32, 1), (32, 2), (24, 2))
        ),
    ],
)
def test_many_heads_read_one(width: int, heads: int, groups: int, mechanism: str, kept: torch.dtype | None) -> None:
    """With up to nine tokens at once, by the kernels and by plain operators, which read the same cache."""
    size, length = heads * width, 37
    dtype = torch.bfloat16 if kept is torch.bfloat16 else torch.float32
    options: dict[str, Any] = {"mechanism": mechanism, "rotary": True}
    kernels = drawn(size, heads, groups, spread=1.5 / size**0.5, **options).eval().to(dtype)
    plain = expanded(kernels, groups, impl="reference", **options)
    x = tokens(2, length, size, dtype=dtype)
    chunks = [3, 9, 1, 1, 2, 8, 7, 1, 3, 1, 1]
    outputs = [decode(m, x, chunks, ba.KVCache(m, 2, dtype=kept)) for m in (kernels, plain)]
    padded = torch.zeros(2, length, dtype=torch.bool)
    padded[1, :5] = True  # which is another way through the kernels
    hidden = [decode(m, x, chunks, ba.KVCache(m, 2, dtype=kept), padded) for m in (kernels, plain)]
    # In int8 a number on the edge of two codes may be rounded either way: a step of a key for one token.
    mean, most = {None: (5e-6, 5e-5), torch.int8: (5e-4, 5e-3), torch.bfloat16: (5e-3, 3e-2)}[kept]
    for ours, theirs in (outputs, hidden):
        error, size_of = (ours - theirs).abs().float(), theirs.abs().max().clamp_min(1)
        assert error.max() <= most * size_of
        assert error.mean() <= mean * size_of
    if kept is None:
        assert (outputs[0] - at_once(kernels, x)).abs().max() <= most * outputs[0].abs().max()


@needs_native
@pytest.mark.parametrize("kept", [None, torch.int8])
@pytest.mark.parametrize(
    "extra", ["plain", "distances in the score", "distances on the weights", "extra keys", "learned scale"]
)
@pytest.mark.parametrize("mechanism", ["standard", "optimised+expressive"])
@pytest.mark.parametrize(("heads", "groups"), [(16, 1), (12, 3)])
def test_the_kernels_read_what_everyone_reads(
    heads: int, groups: int, mechanism: str, extra: str, kept: torch.dtype | None
) -> None:
    size, padded = heads * 8, left_padded()
    options: dict[str, Any] = {"mechanism": mechanism, **EXTRAS[extra]}
    kernels = drawn(size, heads, groups, spread=0.1, **options).float().eval()
    plain = drawn(size, heads, groups, impl="reference", **options).float().eval()
    plain.load_state_dict(kernels.state_dict())
    x = tokens(B, L, size, dtype=torch.float32)
    outputs = [decode(m, x, [9, 1, 2, 1, 1, 3, 1, 5], ba.KVCache(m, B, dtype=kept), padded) for m in (kernels, plain)]
    coarse = kept is torch.int8 and "avx512" in instruction_sets()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=2e-4 if coarse else 1e-5)


def test_a_long_cache_is_read_in_pieces() -> None:
    """More keys than any block of a kernel has, several hundred of them, and a batch of one."""
    for heads, groups in ((16, 1), (16, 2)):
        module = drawn(heads * 8, heads, groups, mechanism="standard", rotary=True, spread=0.1).float().eval()
        x = tokens(1, 1300, heads * 8, dtype=torch.float32)
        expected = at_once(module, x)
        cache = ba.KVCache(module, 1)
        same(decode(module, x, [1280, 1, 1, 9, 1, 8], cache), expected)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("max_len", [None, 40])
@pytest.mark.parametrize("groups", [2, N])
@pytest.mark.parametrize("name", DECODERS)
def test_bytes_are_those_of_the_heads(name: str, groups: int, max_len: int | None, dtype: torch.dtype) -> None:
    """G / N of the ordinary cache for what is projected, slices as ever; and what ``ba.cost`` says."""
    options = DECODERS[name]
    number = torch.float32 if dtype is torch.int8 else dtype
    module = drawn(D, N, groups, **options).to(number).eval()
    ordinary = ba.MultiheadAttention(D, N, batch_first=True, dtype=number, **options).eval()
    caches = [ba.KVCache(m, B, max_len=max_len, dtype=dtype) for m in (module, ordinary)]
    x = tokens(B, L, D, dtype=number)
    for layer, cache in zip((module, ordinary), caches, strict=True):
        decode(layer, x, [20, 1, 1, 1], cache)
    streams = len(caches[0].streams)
    assert streams == len(caches[1].streams)
    values = groups if "v" in module.mechanism.projections else N
    assert caches[0].nbytes * streams * N == caches[1].nbytes * (groups + (streams - 1) * values)
    shapes = [tuple(t.shape[2:]) for t in caches[0].tensors]
    widths = [(groups * H,), *[(values * H,)] * (streams - 1)]
    scales = [(groups,), *[(values,)] * (streams - 1)] if dtype is torch.int8 else []
    assert shapes == widths + scales
    if "window" not in options and max_len is not None and dtype is not torch.int8:
        more = {"align_heads": options["align_heads"]} if "align_heads" in options else {}
        cost = ba.cost(D, N, L, mechanism=module.mechanism, num_kv_heads=groups, dtype=dtype, **more)
        assert caches[0].nbytes == max_len * B * cost.cache_bytes_per_token


def test_no_step_makes_anything_as_long_as_the_cache() -> None:
    """Keys and values are not repeated for the query heads."""
    if missing() is not None:
        pytest.skip("the compiled kernels are missing")
    length, heads, size = 4095, 16, 256
    for mechanism in ("standard", "optimised", "expressive"):
        module = drawn(size, heads, 1, mechanism=mechanism, spread=0.1).float().eval()
        cache = ba.KVCache(module, 1, max_len=4096)
        decode(module, tokens(1, length, size, dtype=torch.float32), [length], cache)
        x = tokens(1, 1, size, dtype=torch.float32)
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            module(x, x, x, cache=cache, need_weights=False)
        assert max(event.cpu_memory_usage for event in profile.events()) < length


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", DECODERS)
def test_codes_err_by_half_a_step_of_their_heads_scale(name: str, groups: int) -> None:
    """Heads of very different size, each with the scale of its own largest number."""
    module = drawn(D, N, groups, **DECODERS[name]).float().eval()
    with torch.no_grad():
        for part in (module.k_proj, module.v_proj):
            if isinstance(part, nn.Linear):
                sizes = torch.logspace(-2, 1, groups).repeat_interleave(H)
                part.weight.mul_(sizes[:, None])
                part.bias.mul_(sizes)
    x = tokens(B, L, D, dtype=torch.float32)
    caches = [ba.KVCache(module, B, dtype=dtype) for dtype in (None, torch.int8)]
    for cache in caches:
        decode(module, x, [9, 1, 2, 1, 1, 9], cache)
    streams = len(caches[0].streams)
    codes, scales = caches[1].tensors[:streams], caches[1].tensors[streams:]
    assert len(scales) == len(codes)
    for stream, number, code, scale in zip(caches[0].streams, caches[0].tensors, codes, scales, strict=True):
        if stream == "value" and "source" in caches[0].streams:
            continue  # aligned values are made of what is remembered, which is rounded
        number = number[:, -code.shape[1] :]
        apart = number.unflatten(-1, (scale.shape[-1], H))
        torch.testing.assert_close(scale, apart.abs().amax(-1) / 127, rtol=1e-5, atol=1e-9)
        error = (code.unflatten(-1, (scale.shape[-1], H)) * scale[..., None] - apart).abs()
        assert (error <= scale[..., None] * 0.501).all()


@pytest.mark.parametrize("chunks", [[9, 1, 2, 1, 1, 9], [L]], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_int8_is_the_ordinary_layers_int8(name: str, groups: int, chunks: list[int]) -> None:
    """Codes and scales are those of the layer with repeated heads, each once; and so the outputs."""
    module = drawn(D, N, groups, spread=0.25, **DECODERS[name]).float().eval()
    with torch.no_grad():  # heads of very different size, so that each needs its own scale
        for part in (module.k_proj, module.v_proj):
            if isinstance(part, nn.Linear):
                part.weight.mul_(torch.logspace(-1, 0.5, groups).repeat_interleave(H)[:, None])
    full = expanded(module, groups, **DECODERS[name])
    x, padded = tokens(B, L, D, dtype=torch.float32), left_padded()
    for hide in (None, padded):
        caches = [ba.KVCache(m, B, dtype=torch.int8) for m in (module, full)]
        outputs = [decode(m, x, chunks, cache, hide) for m, cache in zip((module, full), caches, strict=True)]
        coarse = "avx512" in instruction_sets()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=2e-3 if coarse else 1e-3)
        for own, copied in zip(caches[0].tensors, caches[1].tensors, strict=True):
            if own.shape == copied.shape:
                continue
            spread = repeated(own, 2, N, groups)
            if own.dtype is torch.int8:  # a number on the edge may be rounded either way
                assert (spread.int() - copied.int()).abs().max() <= 1
                assert (spread == copied).float().mean() > 0.99
            else:
                torch.testing.assert_close(spread, copied, rtol=1e-4, atol=1e-7)


# --- tensors, copies, files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_of_tensors_continues_as_the_first(
    name: str, groups: int, dtype: torch.dtype | None, padded: bool
) -> None:
    module, x = build(name, groups, "rotary").float(), tokens(B, L, D, dtype=torch.float32)
    cache = ba.KVCache(module, B, dtype=dtype)
    decode(module, x[:, :17], [14, 1, 1, 1], cache, left_padded() if padded else None)
    before = [t.clone() for t in cache.tensors]
    other = ba.KVCache.of(module, [t.clone() for t in cache.tensors], length=cache.length)
    assert (other.length, other.kept) == (17, cache.kept)
    both = copy.deepcopy((module, cache))
    outputs = [decode(m, x[:, 17:], [1, 1, 3, 1], c) for m, c in ((module, other), (module, cache), both)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-5, atol=1e-5)
    assert [t.shape[2:] for t in other.tensors] == [t.shape[2:] for t in before]


def test_a_pickled_layer_takes_the_tensors_of_the_first() -> None:
    module, x = build("optimised", 2).float(), tokens(B, L, D, dtype=torch.float32)
    cache = ba.KVCache(module, B)
    decode(module, x[:, :9], [9], cache)
    twin = pickle.loads(pickle.dumps(module))  # noqa: S301 - our own bytes
    loaded = drawn(D, N, 2, mechanism="optimised").eval()
    loaded.load_state_dict(module.state_dict())
    expected = at_once(module, x)[:, 9:]
    for other in (twin, loaded, copy.deepcopy(module)):
        refused(lambda m=other: decode(m, x[:, 9:], [1], cache), "another layer")
        again = ba.KVCache.of(other, [t.clone() for t in cache.tensors], length=9)
        same(decode(other, x[:, 9:], [1] * 14, again), expected)


def test_tensors_of_another_number_of_heads_are_refused() -> None:
    module = ba.MultiheadAttention(D, N, num_kv_heads=2, batch_first=True).eval()
    narrow, wide = torch.zeros(1, 4, 2 * H), torch.zeros(1, 4, D)
    refused(lambda: ba.KVCache.of(module, [wide, wide]), "tensors[0]", f"(batch, length, {2 * H})", f"(1, 4, {D})")
    refused(lambda: ba.KVCache.of(module, [narrow, wide]), "tensors[1]", f"(batch, length, {2 * H})", f"(1, 4, {D})")
    slices = ba.MultiheadAttention(D, N, num_kv_heads=2, batch_first=True, mechanism="optimised").eval()
    refused(lambda: ba.KVCache.of(slices, [narrow, narrow]), "tensors[1]", f"(batch, length, {D})", f"(1, 4, {2 * H})")
    assert ba.KVCache.of(slices, [narrow, wide]).length == 4
    codes = narrow.to(torch.int8)
    for scales in (torch.zeros(1, 4, N), torch.zeros(1, 4, 1)):
        refused(lambda s=scales: ba.KVCache.of(module, [codes, codes, s, s]), "scale", "(batch, length, 2)")
    assert ba.KVCache.of(module, [codes, codes, *[torch.zeros(1, 4, 2)] * 2]).length == 4
    other = ba.MultiheadAttention(D, N, num_kv_heads=3, batch_first=True).eval()
    x = torch.zeros(1, 1, D)
    refused(lambda: decode(other, x, [1], ba.KVCache(module, 1)), "another layer")
    cache = ba.KVCache(module, 1)
    refused(lambda: decode(module, x.double(), [1], cache), "float64")
    assert (cache.length, cache.nbytes) == (0, 0)
    for given in (x, torch.zeros(1, 1, 3 * H), torch.zeros(1, 1, 2)):
        cache = ba.KVCache(module, 1)
        for stream in cache.streams:
            cache.write(stream, given)
        cache.commit(1)
        refused(lambda c=cache: decode(module, x, [1], c), f"{given.shape[-1]} wide", f"{2 * H} wide")


def test_a_model_of_layers_with_different_numbers_of_heads() -> None:
    layers = (("standard", 1), ("optimised", 2), ("window", 3), ("standard", N))
    continued(Layers(build(name, groups) for name, groups in layers).eval(), tokens(B, L, D), tokens(B, 2, D))


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "max_len"),
    [
        ("optimised", None, None),
        *(
            pytest.param(name, dtype, max_len, marks=pytest.mark.slow)
            for name in ("standard", "optimised", "standard+align per head", "window", "window of slices")
            for dtype in (None, torch.int8)
            for max_len in (None, L)
        ),
    ],
)
def test_a_compiled_step(name: str, dtype: torch.dtype | None, max_len: int | None) -> None:
    torch._dynamo.reset()
    module, x = build(name, 2, "rotary").float(), tokens(B, L, D, dtype=torch.float32)
    programs = Programs("eager")
    compiled = torch.compile(module, fullgraph=True, backend=programs)
    cache, other = (ba.KVCache(module, B, max_len=max_len, dtype=dtype) for _ in range(2))
    for held in (cache, other):
        decode(module, x[:, :9], [9], held)
    for t in range(9, L):
        found, expected = (decode(m, x[:, t : t + 1], [1], c) for m, c in ((compiled, cache), (module, other)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 if dtype is None else 5e-3)
    assert programs.count <= (5 if "window" in name else 3), f"{programs.count} programs for {L - 9} steps"


@needs_native
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("extra", ["plain", "rotary", "distances in the score", "distances on the weights"])
@pytest.mark.parametrize("name", ["standard", "optimised+expressive"])
def test_a_step_compiled_by_inductor(name: str, extra: str, dtype: torch.dtype | None) -> None:
    torch._dynamo.reset()
    module = drawn(128, 16, 1, spread=0.15, **(DECODERS[name] | EXTRAS[extra])).eval()
    x, padded = tokens(B, L, 128, dtype=torch.float32), left_padded()
    programs = Programs("inductor")
    compiled = torch.compile(module, fullgraph=True, backend=programs)
    caches = [ba.KVCache(module, B, max_len=L, dtype=dtype) for _ in range(2)]
    for cache in caches:
        decode(module, x[:, :11], [11], cache, padded)
    for t in range(11, L):
        outputs = [decode(m, x[:, t : t + 1], [1], c) for m, c in zip((module, compiled), caches, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5 if dtype is None else 5e-3)
    assert programs.count <= 3, f"{programs.count} programs for {L - 11} steps"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("standard", None),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name in (
                "standard",
                "optimised",
                "expressive",
                "standard+align per head",
                "window",
                "W_A of a window of slices",
            )
            for dtype in (None, torch.int8)
        ),
    ],
)
def test_an_exported_step(name: str, dtype: torch.dtype | None) -> None:
    module, x = build(name, 2, "rotary").float().requires_grad_(False), tokens(B, L, D, dtype=torch.float32)
    cache = ba.KVCache(module, B, dtype=dtype)
    decode(module, x[:, :9], [6, 1, 1, 1], cache, left_padded())
    held = [t.contiguous() for t in cache.tensors]
    rows = {1: torch.export.Dim("rows", min=4, max=L - 1)}
    program = torch.export.export(
        CachedStep(module), (x[:, 9:10], held, 9), dynamic_shapes=(None, [rows] * len(held), torch.export.Dim.DYNAMIC)
    ).module()
    for t in range(9, L):
        new = x[:, t : t + 1]
        output, held = program(new, held, t)
        torch.testing.assert_close(output, decode(module, new, [1], cache), rtol=1e-4, atol=5e-3 if dtype else 1e-5)
    assert [(t.dtype, t.shape[2:]) for t in held] == [(t.dtype, t.shape[2:]) for t in cache.tensors]
