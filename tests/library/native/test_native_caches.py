"""Caches that hold something else than keys: rotated while they are read, or int8 with scales, against the oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.call.call import Call
from better_attention.impl import native
from better_attention.impl.dispatch import attend
from better_attention.positions import alibi_slopes, rotary_angles
from helpers import oracle
from helpers.bridge import array, assert_close
from helpers.native_cases import DTYPES, ISAS, SCORES, Mask, draw_mask, needs_native, normal, poisoned, threads

pytestmark = needs_native

isas = pytest.mark.parametrize("isa", ISAS)
scores = pytest.mark.parametrize("score", SCORES)

#         B  N  G  L    S    H  offset window
SIZES = [
    (2, 3, 3, 1, 307, 64, 306, None),
    (1, 12, 12, 1, 521, 32, 520, 101),
    (2, 6, 2, 2, 61, 10, 59, None),
    (1, 4, 1, 1, 7, 2, 6, None),
    (3, 2, 2, 5, 131, 38, 97, 43),
    (1, 17, 17, 1, 67, 128, 66, 5),
]
"""Head widths of one piece, several, none; blocks that end within a vector; fewer keys than a vector has lanes."""


def drawn(size: tuple, score: str, dtype: torch.dtype, rng: np.random.Generator, joined: bool, masked: bool) -> Call:
    """A call whose keys are its values, heads apart or side by side."""
    B, N, G, L, S, H, offset, window = size
    x = normal(rng, B, G, S, H, dtype=dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if joined else x
    padding = draw_mask(Mask("bool", "B11S"), rng, (B, N, L, S)) if masked else None
    return Call(
        normal(rng, B, N, L, H, dtype=dtype), x, x, padding_B11S=padding, causal=True, offset=offset, window=window,
        score=score, scale=H**-0.5,
    )  # fmt: skip


def exact(
    call: Call, k: np.ndarray, v: np.ndarray, *, bias: np.ndarray | None = None, inside: np.ndarray | None = None
) -> np.ndarray:
    """The oracle's answer for other keys and values."""
    B, N, L, _ = call.q_BNLH.shape
    keep = None if call.padding_B11S is None else np.broadcast_to(call.padding_B11S.numpy(), (B, N, L, k.shape[2]))
    output, _ = oracle.attention(
        array(call.q_BNLH), k, v, score=call.score, keep=keep, causal=True, offset=call.offset, window=call.window,
        scale=call.scale, bias=bias, inside=inside,
    )  # fmt: skip
    return output


def turned(x: np.ndarray, first: int) -> np.ndarray:
    """Keys at places first, first + 1, ...: pairs (p, p + H/2) as complex numbers, times e^(i place 10000^(-2p/H))."""
    S, H = x.shape[-2:]
    angles = np.arange(first, first + S)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], -1)


def angles(S: int, H: int, first: int) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_angles(torch.arange(first, first + S, dtype=torch.float64), H, dtype=torch.float64)
    return cos.float(), sin.float()


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-2


def int8_tolerance(dtype: torch.dtype, isa: str) -> float:
    """AVX-512 may multiply codes as integers, with queries and weights of 16 bits."""
    return max(tolerance(dtype), 2e-4) if isa == "avx512" else tolerance(dtype)


@isas
@scores
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keys_are_rotated_as_they_are_read(
    size: tuple, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    S, H, first = size[4], size[5], 11
    for joined, masked in itertools.product((False, True), repeat=2):
        call = drawn(size, score, dtype, rng, joined, masked)
        tables = angles(S, H, first)
        with native.instruction_set(isa), poisoned():
            found = native.decode(call, angles=tables)
            with threads(2):
                again = native.decode(call, angles=tables)
        assert found is not None
        assert again is not None
        assert torch.equal(found, again)
        x = array(call.k_BNSH)
        assert_close(found, exact(call, turned(x, first), x), tolerance=tolerance(dtype))
        if dtype == torch.float32 and not masked:  # a row that sees one key alone gives it all weight
            assert np.abs(array(found) - exact(call, x, x)).max() > 100 * tolerance(dtype)


@isas
@scores
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_with_scales(size: tuple, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator) -> None:
    B, _, G, _, S, H = size[:6]
    for joined, shared, masked in itertools.product((False, True), repeat=3):
        call = drawn(size, score, dtype, rng, joined, masked)
        codes = torch.from_numpy(rng.integers(-127, 128, size=(2, B, S, G, H))).to(torch.int8).transpose(2, 3)
        codes = codes if joined else codes.contiguous()
        scales = torch.from_numpy(rng.uniform(0.001, 0.02, size=(2, B, S, G))).float()
        k, v = codes[0], codes[0] if shared else codes[1]
        k_scale, v_scale = scales[0], scales[0] if shared else scales[1]
        call = replace(call, k_BNSH=k, v_BNSH=v)
        with native.instruction_set(isa), poisoned():
            found = native.decode(call, scales=(k_scale, v_scale))
            with threads(2):
                again = native.decode(call, scales=(k_scale, v_scale))
        assert found is not None
        assert again is not None
        assert found.dtype == dtype
        assert torch.equal(found, again)
        numbers = (array(x) * array(scale).swapaxes(1, 2)[..., None] for x, scale in ((k, k_scale), (v, v_scale)))
        assert_close(found, exact(call, *numbers), tolerance=int8_tolerance(dtype, isa))


#        B  N  keys values L S   H   W
GROUPS = [
    (2, 6, 3, 6, 1, 307, 32, 32),
    (1, 12, 1, 4, 2, 61, 16, 24),
    (1, 24, 2, 2, 1, 131, 64, 64),
    (2, 9, 1, 1, 8, 67, 16, 16),
]
"""Fewer heads of keys than of values; more than eight queries for one head."""


@isas
@scores
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", GROUPS, ids=str)
def test_neighbouring_heads_share_keys(
    size: tuple, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    B, N, keys, values, L, S, H, W = size
    q, k, v = (normal(rng, *shape, dtype=dtype) for shape in ((B, N, L, H), (B, keys, S, H), (B, values, S, W)))
    wide = Call(q, k, v, causal=True, offset=S - L, score=score, scale=H**-0.5)
    codes = [torch.from_numpy(rng.integers(-127, 128, size=x.shape)).to(torch.int8) for x in (k, v)]
    scales = torch.from_numpy(rng.uniform(0.005, 0.02, size=(B, S, values))).float()
    narrow = replace(wide, k_BNSH=codes[0], v_BNSH=codes[1])
    tables, pair = angles(S, H, 11), (scales[..., :keys], scales)  # which begin at one address

    def numbers(x: Tensor, scale: Tensor | None = None) -> np.ndarray:
        wide = array(x) if scale is None else array(x) * array(scale).swapaxes(1, 2)[..., None]
        return np.repeat(wide, N // wide.shape[1], axis=1)

    for turns, leans in itertools.product((False, True), repeat=2):
        distances, other = leaning(wide, "weight", wide.offset) if leans else (None, {})
        for call, given in ((wide, None), (narrow, pair)):
            with native.instruction_set(isa), poisoned():
                settings = {"angles": tables if turns else None, "scales": given, "distances": distances}
                found = native.decode(call, **settings)
                with threads(2):
                    again = native.decode(call, **settings)
            assert found is not None
            assert again is not None
            assert torch.equal(found, again)
            k_numbers = numbers(call.k_BNSH, given and given[0])
            v_numbers = numbers(call.v_BNSH, given and given[1])
            expected = exact(call, turned(k_numbers, 11) if turns else k_numbers, v_numbers, **other)
            bound = tolerance(dtype) if given is None else int8_tolerance(dtype, isa)
            assert_close(found, expected, f"turned {turns}, leaning {leans}", tolerance=2 * bound)


def leaning(call: Call, place: str, first: int) -> tuple[native.Distances, dict[str, np.ndarray]]:
    """ALiBi for the kernels, and number by number for the oracle."""
    B, N, L, _ = call.q_BNLH.shape
    distance = first + np.arange(L)[:, None] - np.arange(call.k_BNSH.shape[2])
    slopes = alibi_slopes(N)
    inside = -np.array(slopes)[:, None, None] * distance
    other = {"inside": inside} if place == "score" else {"bias": np.broadcast_to(-np.abs(inside), (B, *inside.shape))}
    return native.Distances(torch.tensor(slopes), place == "score", first), other


@isas
@scores
@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_distances_are_counted_as_keys_are_read(
    size: tuple, place: str, score: str, isa: str, rng: np.random.Generator
) -> None:
    S, H = size[4:6]
    tables = angles(S, H, 11)
    for joined, masked, narrow in itertools.product((False, True), repeat=3):
        call = drawn(size, score, torch.float32, rng, joined, masked)
        distances, other = leaning(call, place, call.offset + 2)  # two keys fewer than queries count from
        scales = None
        k = v = array(call.k_BNSH)
        if narrow:
            codes = (call.k_BNSH * 30).round().clamp(-127, 127).to(torch.int8)
            scale = torch.from_numpy(rng.uniform(0.01, 0.04, size=(codes.shape[0], S, codes.shape[1]))).float()
            call, scales = replace(call, k_BNSH=codes, v_BNSH=codes), (scale, scale)
            v = array(codes) * array(scale).swapaxes(1, 2)[..., None]
            k = turned(v, 11)
        with native.instruction_set(isa), poisoned():
            found = native.decode(call, angles=tables if narrow else None, scales=scales, distances=distances)
            with threads(2):
                again = native.decode(call, angles=tables if narrow else None, scales=scales, distances=distances)
        assert found is not None
        assert again is not None
        assert torch.equal(found, again)
        bound = max(2e-5, int8_tolerance(torch.float32, isa)) if narrow else 2e-5
        assert_close(found, exact(call, k, v, **other), tolerance=bound, vacuous=masked)  # five keys may all be padding
        if not masked and S > 50:
            assert np.abs(array(found) - exact(call, k, v)).max() > 1e-3


@isas
@pytest.mark.parametrize("place", ["score", "weight"])
def test_distances_of_rows_without_scores(place: str, isa: str, rng: np.random.Generator) -> None:
    """Queries of zeros: inside the score the distance alone gives weights, on the weights there are none to scale."""
    call = drawn(SIZES[0], "expressive", torch.float32, rng, True, True)
    call = replace(call, q_BNLH=torch.zeros_like(call.q_BNLH))
    distances, other = leaning(call, place, call.offset)
    x = array(call.k_BNSH)
    tiny = replace(call, q_BNLH=torch.full_like(call.q_BNLH, 1e-22))
    for one in (call, tiny):
        with native.instruction_set(isa), poisoned():
            found = native.decode(one, distances=distances)
        assert_close(found, exact(one, x, x, **other), tolerance=1e-5, vacuous=one is call and place == "weight")


@isas
def test_rows_of_tiny_scores_are_computed_again_in_double_precision(isa: str, rng: np.random.Generator) -> None:
    call = drawn(SIZES[0], "expressive", torch.float32, rng, True, False)
    call = replace(call, q_BNLH=call.q_BNLH * 1e-18)
    S, H = call.k_BNSH.shape[2:]
    codes = (call.k_BNSH * 30).round().clamp(-127, 127).to(torch.int8)
    scale = torch.from_numpy(rng.uniform(0.01, 0.02, size=(codes.shape[0], S, codes.shape[1]))).float()
    with native.instruction_set(isa), poisoned():
        rotated = native.decode(call, angles=angles(S, H, 0))
        narrow = native.decode(replace(call, k_BNSH=codes, v_BNSH=codes), scales=(scale, scale))
    x, numbers = array(call.k_BNSH), array(codes) * array(scale).swapaxes(1, 2)[..., None]
    assert_close(rotated, exact(call, turned(x, 0), x), tolerance=1e-5)
    assert_close(narrow, exact(call, numbers, numbers), tolerance=int8_tolerance(torch.float32, isa))


def test_what_the_kernels_do_not_serve_is_left_to_others(rng: np.random.Generator) -> None:
    call = drawn(SIZES[0], "softmax", torch.float32, rng, False, False)
    S, H = call.k_BNSH.shape[2:]
    cos, sin = angles(S, H, 0)
    codes = torch.ones_like(call.k_BNSH, dtype=torch.int8)
    narrow, scale = replace(call, k_BNSH=codes, v_BNSH=codes), torch.ones(2, S, 3)
    assert native.decode(call, angles=(cos, sin)) is not None
    assert native.decode(narrow, scales=(scale, scale)) is not None
    many = normal(rng, 2, 3, 9, H)
    for other in (
        replace(call, q_BNLH=many),
        replace(call, q_BNLH=call.q_BNLH.clone().requires_grad_()),
        replace(call, dropout_p=0.1),
        replace(call, need_weights=True),
        replace(call, q_BNLH=call.q_BNLH.double(), k_BNSH=call.k_BNSH.double(), v_BNSH=call.v_BNSH.double()),
    ):
        assert native.decode(other, angles=(cos, sin)) is None
    slopes = torch.ones(call.q_BNLH.shape[1])
    assert native.decode(call, distances=native.Distances(slopes, True, S - 1)) is not None
    for other in (slopes[1:], slopes.double()):
        assert native.decode(call, distances=native.Distances(other, True, S - 1)) is None
    for table in (cos.double(), cos[:-1], cos[:, :-1]):
        assert native.decode(call, angles=(table, table)) is None
    assert native.decode(call, scales=(scale, scale)) is None
    assert native.decode(replace(narrow, q_BNLH=many), scales=(scale, scale)) is None
    assert native.decode(narrow, scales=(scale.double(), scale)) is None
    assert native.decode(narrow, scales=(scale.transpose(1, 2), scale)) is None
    assert torch.compile(lambda: native.decode(call, angles=(cos, sin)) is None, backend="eager")()
    spoiled = call.k_BNSH.clone()
    spoiled[:, :, -1] = torch.nan
    present = torch.ones(2, 1, 1, S, dtype=torch.bool)
    present[..., -1] = False
    # A padded key is read, and 0 * NaN is NaN; one behind the triangle is not.
    padded = replace(call, k_BNSH=spoiled, v_BNSH=spoiled, padding_B11S=present)
    found = native.decode(padded, angles=(cos, sin))
    assert found is not None
    assert found.isnan().all()
    later = native.decode(replace(call, k_BNSH=spoiled, v_BNSH=spoiled, offset=S - 2), angles=(cos, sin))
    assert later is not None
    assert torch.equal(later, native.decode(replace(call, offset=S - 2), angles=(cos, sin)))


@scores
def test_int8_of_the_cache_errs_little(score: str, rng: np.random.Generator) -> None:
    """Rounded to 255 steps of each head's largest number, as ``ba.KVCache(dtype=torch.int8)`` stores it."""
    from better_attention.cache.int8 import quantised

    x = normal(rng, 2, 1021, 3 * 64)
    codes, scale = quantised(x, 3)
    heads, narrow = (t.unflatten(2, (3, 64)).transpose(1, 2) for t in (x, codes))
    call = Call(normal(rng, 2, 3, 1, 64), heads, heads, score=score, scale=0.125)
    wide, _ = attend(call, "native")
    found = native.decode(replace(call, k_BNSH=narrow, v_BNSH=narrow), scales=(scale, scale))
    assert found is not None
    error = float((found - wide).norm() / wide.norm())
    assert 1e-4 < error < 1e-2, f"relative error {error:.2e}"
    plain = ba.attention(
        call.q_BNLH, *(2 * [narrow * scale.transpose(1, 2)[..., None]]), score=score, scale=0.125, impl="reference"
    )
    assert_close(found, plain, tolerance=1e-5)
