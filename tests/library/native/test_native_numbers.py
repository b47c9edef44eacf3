"""The compiled kernels against the float64 oracle: every instruction set, both scores, float32 and bfloat16.

No error may be larger than rounding explains (tests/rounding.py); all buffers are poisoned with NaN.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.call.call import Call
from better_attention.impl import native
from better_attention.impl.dispatch import attend
from helpers import oracle
from helpers.bridge import CAPS, array, assert_close
from helpers.native_cases import (
    DTYPES,
    ISAS,
    LAYOUTS,
    LOOSE,
    SCORES,
    Case,
    Mask,
    cancellation,
    check,
    draw_mask,
    exact_gradients,
    grid,
    needs_native,
    normal,
    oracle_masks,
    poisoned,
    problem,
)

pytestmark = needs_native

isas = pytest.mark.parametrize("isa", ISAS)
scores = pytest.mark.parametrize("score", SCORES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

MASKS = [
    Mask("bool", "11LS"),
    Mask("bool", "111S"),
    Mask("bool", "B11S"),
    Mask("bool", "B11S", "rows"),
    Mask("bool", "1N1S"),
    Mask("bool", "B1L1"),
    Mask("bool", "B1LS", "rows"),
    Mask("bool", "BNLS", "rows"),
    Mask("bool", "1NLS", "band"),
    Mask("bool", "BNLS", storage="transposed"),
    Mask("bool", "B1LS", storage="expanded"),
    Mask("bool", "11LS", storage="gaps"),
    Mask("float32", "11LS"),
    Mask("float32", "111S", "nothing"),
    Mask("float32", "B11S"),
    Mask("float32", "1NLS", "nothing"),
    Mask("float32", "BN1S", "all but one"),
    Mask("float32", "BNLS", "rows"),
    Mask("float32", "B1L1", "nothing"),
    Mask("float32", "BNLS", storage="transposed"),
    Mask("float32", "B1LS", storage="gaps"),
    Mask("float32", "1N1S", storage="expanded"),
    Mask("float32", "B1LS", lowest=True),
    Mask("bfloat16", "11LS"),
    Mask("bfloat16", "B11S", "rows"),
    Mask("bfloat16", "BNLS", storage="transposed"),
    Mask("bfloat16", "1NL1", "nothing", storage="expanded"),
    Mask("bfloat16", "BN1S", lowest=True),
    Mask("bool", "BNLS", "all"),
    Mask("float32", "11LS", "all"),
]
"""Every type in every broadcast form, plain and strided, with rows and columns that see nothing."""

PADDINGS = [
    Mask("bool", "B11S"),
    Mask("float32", "B11S", "nothing"),
    Mask("bfloat16", "B11S"),
    Mask("bool", "111S", storage="expanded"),
    Mask("float32", "B11S", lowest=True),
    Mask("bool", "B11S", "rows", storage="gaps"),
]

#         B  N  G   L    S    H    W
SIZES = [
    (2, 3, 3, 5, 7, 1, 3),
    (1, 4, 2, 13, 11, 3, 5),
    (2, 2, 1, 17, 31, 7, 2),
    (1, 3, 3, 37, 41, 8, 8),
    (2, 4, 2, 61, 67, 16, 13),
    (1, 2, 2, 97, 101, 31, 32),
    (1, 5, 5, 53, 131, 32, 31),
    (1, 3, 1, 19, 257, 59, 64),
    (1, 2, 2, 257, 23, 64, 59),
    (1, 2, 1, 113, 109, 111, 17),
    (1, 2, 2, 67, 73, 128, 111),
    (1, 1, 1, 43, 47, 257, 128),
    (1, 2, 2, 29, 43, 64, 257),
    (2, 3, 1, 1, 239, 64, 64),
    (1, 2, 2, 239, 1, 64, 64),
    (3, 1, 1, 2, 3, 32, 32),
    (1, 2, 1, 191, 193, 64, 64),
]
"""Primes that no block or vector width divides, every head width of the plan, values wider and narrower than keys."""


# --- the yardstick itself ---------------------------------------------------------------------------------------------


@scores
@pytest.mark.parametrize("group", [1, 2])
def test_the_exact_gradients_are_the_oracles_differences(score: str, group: int, rng: np.random.Generator) -> None:
    B, N, L, S, H, W, scale = 2, 2, 5, 7, 3, 4, -0.7
    shapes = (B, N, L, H), (B, N // group, S, H), (B, N // group, S, W)
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    upstream = rng.normal(size=(B, N, L, W))
    masks = [draw_mask(Mask("float32", "BNLS", "rows"), rng, (B, N, L, S))]
    keep, bias = oracle_masks(masks, (B, N, L, S), score)

    def run(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return oracle.attention(q, k, v, score=score, keep=keep, bias=bias, causal=True, scale=scale)

    inputs, step = [q, k, v], 1e-5
    gradients = exact_gradients(*inputs, run(*inputs)[1], upstream, score, scale)
    for which, gradient in enumerate(gradients):
        for index in zip(*(rng.integers(size, size=12) for size in gradient.shape), strict=True):
            moved = [[x.copy() for x in inputs] for _ in range(2)]
            moved[0][which][index] += step
            moved[1][which][index] -= step
            plus, minus = ((run(*xs)[0] * upstream).sum() for xs in moved)
            assert gradient[index] == pytest.approx((plus - minus) / (2 * step), rel=1e-4, abs=1e-6)
    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs]
    output = ba.attention(
        *leaves, score=score, attn_mask=masks[0], is_causal=True, scale=scale, enable_gqa=True, impl="reference"
    )
    assert_close(output, run(*inputs)[0])
    for ours, reference in zip(gradients, torch.autograd.grad(output, leaves, torch.from_numpy(upstream)), strict=True):
        assert_close(ours, reference)


def test_the_cases_hold_what_they_promise() -> None:
    """Rows that see nothing, rows that see little, strides of 0, odd offsets and gaps of NaN are really there."""
    case = Case((2, 4, 2, 29, 37, 19, 11), MASKS[7], PADDINGS[0], layouts=("odd offset",) * 3)
    p = problem(case, "expressive", torch.float32)
    assert p.empty.any()
    assert not p.empty.all()
    assert p.q.storage_offset() % 2
    assert p.q.stride(2) % 2 == 0 or p.q.stride(2) != p.q.shape[3]
    assert torch.isnan(torch.as_strided(p.q, (1,), (1,), p.q.storage_offset() - 1)).all()
    assert problem(Case((1, 1, 1, 19, 23, 4, 4), causal=True), "expressive", torch.float32).few.any()
    for mask in MASKS:
        drawn = draw_mask(mask, np.random.default_rng(3), (2, 4, 29, 37))
        if mask.storage == "expanded":
            assert 0 in drawn.stride(), mask
        if mask.storage in ("gaps", "transposed"):
            assert not drawn.is_contiguous(), mask


# --- sizes, masks, everything together --------------------------------------------------------------------------------


@isas
@grid(*SIZES)
def test_sizes(value: tuple[int, ...], dtype: torch.dtype, score: str, isa: str) -> None:
    """Each size without a mask, and causal with the mask and the memory layout whose turn it is."""
    index, layouts = SIZES.index(value), list(LAYOUTS)
    check(Case(value), score, dtype, isa)
    turns = tuple(layouts[(index + i) % len(layouts)] for i in (0, 4, 7))
    check(Case(value, MASKS[index % len(MASKS)], causal=True, layouts=turns), score, dtype, isa)


@isas
@grid(*MASKS)
def test_masks(value: Mask, dtype: torch.dtype, score: str, isa: str) -> None:
    """Each mask at a size of one block or a few, every other time with a padding too, which is a mask of its own."""
    index = MASKS.index(value)
    sizes = [(2, 4, 2, 29, 37, 19, 11), (2, 2, 2, 23, 149, 16, 16)][index // 2 % 2]
    padding = PADDINGS[index // 2 % len(PADDINGS)] if index % 2 else None
    check(Case(sizes, value, padding, causal=index % 3 == 0), score, dtype, isa)


@isas
@scores
@pytest.mark.parametrize("hides", ["band", "all but one", "all but the last", "rows"])
def test_whole_blocks_of_keys_are_hidden(hides: str, score: str, isa: str) -> None:
    """Blocks without one visible key come first, last and in between, where a running maximum is -inf."""
    sizes = (1, 2, 1, 67, 523, 16, 16)
    for kind, causal in (("bool", False), ("float32", False), ("bool", True)):
        check(Case(sizes, Mask(kind, "11LS", hides), causal=causal), score, torch.float32, isa)
    check(Case(sizes, Mask("bfloat16", "11LS", hides), Mask("bool", "B11S")), score, torch.bfloat16, isa)


BANDS = [
    Case((1, 2, 1, 67, 131, 16, 13), causal=True, band=(64, 29)),
    Case((2, 4, 2, 61, 67, 8, 8), MASKS[0], PADDINGS[0], causal=True, band=(0, 17)),
    Case((1, 2, 2, 197, 193, 16, 16), causal=True, shared=True, band=(0, 37)),
    Case((1, 2, 1, 37, 139, 19, 11), MASKS[17], causal=True, band=(53, 71)),
    Case((1, 3, 3, 131, 31, 16, 16), None, PADDINGS[1], causal=True, band=(5, 23)),
    Case((2, 2, 2, 43, 47, 32, 31), causal=True, band=(11, 1), layouts=("heads inside",) * 3),
    Case((1, 2, 1, 29, 107, 16, 16), MASKS[3], causal=True, band=(78, 1009)),
    Case((1, 2, 2, 5, 1031, 64, 64), causal=True, band=(1026, 257)),
    Case((2, 6, 2, 3, 509, 32, 32), MASKS[2], causal=True, shared=True, band=(401, 101)),
    Case((1, 4, 4, 7, 307, 16, 16), MASKS[13], causal=True, band=(300, 3), layouts=("packed",) * 3),
]
"""Triangles that begin behind earlier keys, with windows of one key, of some, and of more than there are."""


@isas
@grid(*BANDS)
def test_bands(value: Case, dtype: torch.dtype, score: str, isa: str) -> None:
    check(value, score, dtype, isa)


def draw(seed: int, score: str) -> Case:
    """A random case: sizes, masks, causality, window, scale, strides and sharing all at once."""
    rng = np.random.default_rng([seed, zlib.crc32(score.encode())])

    def one(choices: list) -> object:
        return choices[int(rng.integers(len(choices)))]

    lengths = [1, 2, 3, 5, 7, 13, 31, 37, 61, 67, 97, 127, 131, 193, 257]
    widths = [1, 3, 7, 8, 16, 31, 32, 59, 64, 111, 128, 257]
    G, group = one([1, 2, 3]), one([1, 2, 3, 5])
    B, L, S, H = one([1, 2, 3]), one(lengths), one(lengths), one(widths)
    while B * G * group * L > 1500:
        B, L, group = 1, max(1, L // 2), max(1, group - 1)
    shared, causal = rng.random() < 0.3, bool(rng.random() < 0.4)
    band = (int(rng.integers(S + 2)), one([None, *lengths])) if causal and rng.random() < 0.6 else (0, None)
    return Case(
        (B, G * group, G, L, S, H, H if shared else one(widths)),
        one(MASKS) if rng.random() < 0.6 else None,
        one(PADDINGS) if rng.random() < 0.4 else None,
        causal,
        one([None, None, -0.7 * H**-0.5, 2 * H**-0.5]),
        tuple(str(one(list(LAYOUTS))) for _ in range(3)),
        shared,
        band,
    )


@isas
@scores
@dtypes
@pytest.mark.parametrize("count", [4, pytest.param(250, marks=pytest.mark.slow)])
def test_everything_together(count: int, dtype: torch.dtype, score: str, isa: str) -> None:
    for seed in range(count):
        check(draw(seed, score), score, dtype, isa)


@isas
@scores
@dtypes
@pytest.mark.slow
def test_every_head_width(dtype: torch.dtype, score: str, isa: str) -> None:
    """All widths up to two of the widest registers, and those around the powers of two beyond."""
    for width in [*range(1, 34), 47, 48, 49, 63, 65, 95, 96, 97, 127, 129, 191, 192, 255, 256, 259]:
        check(Case((3, 4, 2, 17, 29, width, width), causal=width % 2 == 0), score, dtype, isa)
        check(Case((3, 2, 2, 13, 23, 16, width), MASKS[width % 20]), score, dtype, isa)


@isas
@scores
@dtypes
@pytest.mark.slow
def test_every_short_length(dtype: torch.dtype, score: str, isa: str) -> None:
    """Every remainder of rows and of keys that a tile can be left with."""
    for length in range(1, 68):
        check(Case((2, 4, 2, length, 71 - length, 16, 16), causal=length % 2 == 0), score, dtype, isa)


# --- decoding ---------------------------------------------------------------------------------------------------------

DECODE = [
    Case((1, 2, 2, 1, 5003, 64, 64)),
    Case((3, 4, 2, 2, 1021, 32, 32), Mask("bool", "B11S")),
    Case((1, 3, 1, 8, 1531, 16, 7), Mask("float32", "1N1S", "nothing")),
    Case((2, 6, 2, 3, 2053, 8, 64), Mask("bool", "B11S", "rows")),
    Case((1, 2, 1, 4, 1999, 59, 59), Mask("float32", "11LS"), shared=True),
    Case((2, 2, 2, 1, 3001, 64, 64), Mask("bool", "111S", "all but the last"), layouts=("heads inside",) * 3),
    Case((1, 4, 4, 1, 4099, 32, 32), Mask("float32", "B11S", "all but one"), shared=True),
    Case((1, 2, 2, 5, 2503, 16, 16), Mask("bool", "11LS", "rows"), Mask("bfloat16", "B11S")),
    Case((1, 2, 1, 7, 1009, 128, 32), causal=True),
    Case((2, 3, 3, 6, 997, 31, 31), Mask("bfloat16", "B11S"), layouts=("packed",) * 3, shared=True),
]


@isas
@grid(*DECODE)
def test_decoding(value: Case, dtype: torch.dtype, score: str, isa: str) -> None:
    """One or a few queries over many keys, some parts of which hold nothing visible."""
    check(value, score, dtype, isa)


@isas
@scores
@dtypes
@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, 9))
def test_decoding_every_length(length: int, dtype: torch.dtype, score: str, isa: str) -> None:
    for S, shared, mask in itertools.product((509, 2503), (False, True), (None, MASKS[2], MASKS[16], MASKS[12])):
        check(Case((3, 8, 4, length, S, 64, 64), mask, shared=shared), score, dtype, isa)


# --- one tensor as key and value --------------------------------------------------------------------------------------


@isas
@grid((2, 4, 2, 31, 67, 32, 32), (1, 3, 3, 127, 131, 8, 8), (1, 2, 1, 1, 257, 64, 64))
def test_one_tensor_as_key_and_value(value: tuple[int, ...], dtype: torch.dtype, score: str, isa: str) -> None:
    for mask, causal, layout in ((None, False, "heads inside"), (MASKS[2], False, "plain"), (None, True, "odd offset")):
        check(Case(value, mask, causal=causal, layouts=(layout,) * 3, shared=True), score, dtype, isa)


@isas
@scores
@pytest.mark.parametrize("how", ["value detached", "key detached", "views", "clones", "the same slice twice"])
def test_key_and_value_in_one_place_are_told_apart_where_their_gradients_differ(
    how: str, score: str, isa: str, rng: np.random.Generator
) -> None:
    """Two tensors at one address are not one tensor: a detached one takes no gradient, and gives none."""
    q, x = normal(rng, 2, 3, 13, 16), normal(rng, 2, 3, 31, 16)
    upstream = normal(rng, 2, 3, 13, 16)
    results = {}
    for impl, dtype in (("native", torch.float32), ("reference", torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        key, value = {
            "value detached": lambda leaf=leaf: (leaf, leaf.detach()),
            "key detached": lambda leaf=leaf: (leaf.detach(), leaf),
            "views": lambda leaf=leaf: (leaf.view_as(leaf), leaf.view_as(leaf)),
            "clones": lambda leaf=leaf: (leaf.clone(), leaf.clone()),
            "the same slice twice": lambda leaf=leaf: (leaf[:, :, 1:], leaf[:, :, 1:]),
        }[how]()
        with native.instruction_set(isa), poisoned():
            output = ba.attention(q.to(dtype), key, value, score=score, impl=impl)
            (gradient,) = torch.autograd.grad(output, leaf, upstream.to(dtype))
        results[impl] = (output, gradient)
    for found, expected in zip(results["native"], results["reference"], strict=True):
        assert_close(found, expected, how, tolerance=1e-5)


@isas
@scores
@dtypes
@pytest.mark.parametrize("length", [3, 131])
def test_two_tensors_that_begin_at_one_address_are_told_apart(
    length: int, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    q, x = normal(rng, 2, 4, length, 16, dtype=dtype), normal(rng, 2, 4, 67, 16, dtype=dtype)
    for key, value in ((x[:, ::2], x[:, :2]), (x[:, :1].expand(-1, 2, -1, -1), x[:, :2])):
        with native.instruction_set(isa), poisoned():
            output = ba.attention(q, key, value, score=score, enable_gqa=True, impl="native")
        exact, _ = oracle.attention(*(array(t) for t in (q, key, value)), score=score)
        assert_close(output, exact, tolerance=CAPS[dtype])
    with native.instruction_set(isa), poisoned():
        fewer, _ = attend(Call(q, x[:, :2], x, score=score, scale=0.25), "native")
    exact, _ = oracle.attention(array(q), array(x[:, :2]).repeat(2, axis=1), array(x), score=score)
    assert_close(fewer, exact, tolerance=CAPS[dtype])


@isas
@scores
@pytest.mark.parametrize("length", [3, 61])
def test_gradients_of_some_of_the_keys(length: int, score: str, isa: str, rng: np.random.Generator) -> None:
    """Normalisers are those of all keys, also where so few queries could be normalised again over some."""
    q, k, v = normal(rng, 2, 4, length, 16), normal(rng, 2, 2, 131, 16), normal(rng, 2, 2, 131, 8)
    upstream = normal(rng, 2, 4, length, 8)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    whole = ba.attention(*leaves, score=score, scale=0.5, enable_gqa=True, impl="reference")
    exact = torch.autograd.grad(whole, leaves, upstream.double())
    with native.instruction_set(isa), poisoned():
        output, stats = native.partial(Call(q, k, v, score=score, scale=0.5))
        delta = (output * upstream).sum(-1)
        parts = [
            native.partial_backward(upstream, Call(q, k[:, :, at], v[:, :, at], score=score, scale=0.5), stats, delta)
            for at in (slice(0, 64), slice(64, None))
        ]
    (dq, dk, dv), (dq_2, dk_2, dv_2) = parts
    assert dv is not None
    assert dv_2 is not None
    found = (dq + dq_2, torch.cat([dk, dk_2], 2), torch.cat([dv, dv_2], 2))
    for name, gradient, expected in zip("qkv", found, exact, strict=True):
        assert_close(gradient, expected, f"gradient of {name}", tolerance=1e-5)


# --- extremes ---------------------------------------------------------------------------------------------------------


def check_extreme(
    isa: str,
    score: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    gradients: bool = True,
) -> np.ndarray:
    """Output within the dtype's cap of the oracle; gradients finite, and right in proportion to their largest."""
    shape = (*q.shape[:3], k.shape[2])
    keep, bias = oracle_masks([] if mask is None else [mask], shape, score)
    arrays = [array(x) for x in (q, k, v)]
    exact, weights = oracle.attention(*arrays, score=score, keep=keep, bias=bias, causal=causal, scale=scale)
    upstream = torch.linspace(-1, 2, exact.size).reshape(exact.shape).to(q.dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    note = f"{isa} {score} {q.dtype}"
    with native.instruction_set(isa), poisoned():
        output = ba.attention(
            *leaves, score=score, scale=scale, attn_mask=mask, is_causal=causal, enable_gqa=True, impl="native"
        )
        found = torch.autograd.grad(output, leaves, upstream)
    assert_close(output, exact, note, tolerance=CAPS[q.dtype], vacuous=True)
    assert output.any() == bool(exact.any()), note
    expected = exact_gradients(*arrays, weights, array(upstream), score, scale)
    unit = torch.finfo(q.dtype).eps / 2  # an output of 8 bits leaves that much of what cancels against it
    noises = cancellation(*arrays, exact, weights, array(upstream), score, scale, unit)
    for name, gradient, true, noise in zip("qkv", found, expected, noises, strict=True):
        assert gradient.isfinite().all(), f"gradient of {name}, {note}"
        if gradients:
            error, largest = np.abs(array(gradient) - true).max(), np.abs(true).max()
            # What cancels is rounded in several places: dL/dw, the output, the normaliser, the weights.
            bound = LOOSE[q.dtype] * largest + 6 * np.max(noise) + 1e-6
            assert error <= bound, f"gradient of {name}, {note}: {error:.3g} above {bound:.3g} of {largest:.3g}"
    return weights


def line(*numbers: float, dtype: torch.dtype) -> Tensor:
    """Keys of width 1, so that with a query of 1 the scores are exactly these."""
    return torch.tensor(numbers, dtype=torch.float64).reshape(1, 1, -1, 1).to(dtype)


@isas
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
class TestExtremes:
    """Scores, scales and biases where formulas overflow, underflow or cancel."""

    S = 331
    """Several blocks of keys, none of them full at the end."""

    def values(self, rng: np.random.Generator, dtype: torch.dtype, width: int = 5) -> Tensor:
        return normal(rng, 1, 1, self.S, width, dtype=dtype)

    @pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
    @pytest.mark.parametrize("span", [1e4, 50.0])
    def test_softmax_of_wide_scores(
        self, order: str, span: float, dtype: torch.dtype, isa: str, rng: np.random.Generator
    ) -> None:
        """The running maximum grows at every step, or never again after the first."""
        z = np.linspace(-span, span, self.S)
        z = {"ascending": z, "descending": z[::-1], "shuffled": rng.permutation(z)}[order]
        q = line(*[1.0, -1.0, 0.5, 0.0, 1.0], dtype=dtype)
        check_extreme(isa, "softmax", q, line(*z, dtype=dtype), self.values(rng, dtype), gradients=span < 1e3)

    @pytest.mark.parametrize("length", [1, 13])
    def test_small_softmax_weights_are_right_in_proportion(self, length: int, dtype: torch.dtype, isa: str) -> None:
        """Of scores that fall by 80, each weight is right to a few units of its own last place, however small it is.

        The scores are exact, so that what remains are the roundings of exponential, sum, division and product.
        """
        z = (-torch.arange(320) / 4).to(dtype).double()
        exact = z.softmax(0)
        q, k, v = torch.ones(1, 1, length, 1), z[None, None, :, None], torch.eye(320)[None, None]
        with native.instruction_set(isa), poisoned():
            output = ba.attention(*(x.to(dtype) for x in (q, k, v)), score="softmax", scale=1.0, impl="native")
        error = ((output.double() - exact) / exact).abs().max()
        assert error <= 8 * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0)

    def test_softmax_tells_large_scores_apart(self, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """Scores near 1e4 that differ by a few: all exact in the dtype, so that their weights are too."""
        base = 1e4 if dtype == torch.float32 else 240.0
        for sign in (1, -1):
            k = line(*(sign * base + rng.integers(0, 6, self.S)), dtype=dtype)
            weights = check_extreme(isa, "softmax", line(*[1] * 8, dtype=dtype), k, self.values(rng, dtype))
            assert weights.max() < 0.1

    @scores
    def test_equal_scores_give_the_mean(
        self, score: str, dtype: torch.dtype, isa: str, rng: np.random.Generator
    ) -> None:
        q, k = normal(rng, 1, 2, 11, 8, dtype=dtype), normal(rng, 1, 1, 1, 8, dtype=dtype)
        weights = check_extreme(
            isa, score, q, k.repeat(1, 1, self.S, 1), normal(rng, 1, 1, self.S, 5, dtype=dtype) + 1, gradients=False
        )
        np.testing.assert_allclose(weights, 1 / self.S, rtol=1e-12)

    @scores
    @pytest.mark.parametrize("scale", [-0.5, -2.0, 3.0])
    def test_negative_and_large_scales(
        self, scale: float, score: str, dtype: torch.dtype, isa: str, rng: np.random.Generator
    ) -> None:
        q, k, v = (normal(rng, 1, 2, n, 7, dtype=dtype) for n in (13, 41, 41))
        check_extreme(isa, score, q, k, v, scale=scale)

    @scores
    def test_a_scale_of_zero(self, score: str, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """softmax: the mean. expressive: no score, no weight, no output."""
        q, k, v = (normal(rng, 1, 2, n, 7, dtype=dtype) for n in (13, 41, 41))
        weights = check_extreme(isa, score, q, k, v + 1, scale=0.0)
        np.testing.assert_allclose(weights.sum(-1), 0 if score == "expressive" else 1)

    @pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10, 1e-16, 1e-20, 1e-25, 1e-30])
    def test_tiny_expressive_scores(self, size: float, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """z² underflows, the weights of the row do not; other rows of the same tile are of ordinary size."""
        q = normal(rng, 1, 2, 13, 4, dtype=dtype) * torch.tensor([1.0, size] * 6 + [size])[:, None].to(dtype)
        k, v = normal(rng, 1, 1, self.S, 4, dtype=dtype), self.values(rng, dtype)
        check_extreme(isa, "expressive", q, k, v, gradients=False)
        small = normal(rng, 1, 2, 13, 4, dtype=dtype) * size  # all rows: now the gradients' largest is theirs
        check_extreme(isa, "expressive", small, k, v)
        check_extreme(isa, "expressive", small, k[:, :, :40], v[:, :, :40], causal=True, gradients=False)

    @pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-30])
    def test_tiny_scores_by_scale(self, scale: float, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        q, k = normal(rng, 1, 2, 7, 4, dtype=dtype), normal(rng, 1, 1, self.S, 4, dtype=dtype)
        check_extreme(isa, "expressive", q, k, self.values(rng, dtype), scale=scale)

    def test_denormal_scores(self, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """Below the smallest normal number a score is right to its own precision, or counts as zero; never NaN."""
        v = self.values(rng, dtype)
        for size in (1e-37, 1e-39, 1e-41, 1e-44):
            q = torch.full((1, 1, 3, 1), 2.0**-64, dtype=dtype)
            k = (torch.from_numpy(rng.uniform(1, 2, size=(1, 1, self.S, 1))) * (size * 2.0**64)).to(dtype)
            exact, _ = oracle.attention(*(array(x) for x in (q, k, v)), score="expressive", scale=1.0)
            with native.instruction_set(isa), poisoned():
                output = ba.attention(q, k, v, score="expressive", scale=1.0, impl="native")
            assert output.isfinite().all(), size
            if size > torch.finfo(torch.float32).tiny or output.any():
                assert_close(output, exact, f"{isa} {size}", tolerance=max(CAPS[dtype], min(1.0, 3e-45 / size)))

    def test_tiny_and_ordinary_scores_in_one_row(self, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """The tiny ones in the first block, in the last, and in between: only the ordinary ones have weight."""
        v = self.values(rng, dtype)
        for ordinary in (range(300, 331), range(3), range(150, 153), [330], [0]):
            z = rng.choice([-1e-25, 1e-25], self.S)
            z[list(ordinary)] = rng.normal(size=len(ordinary)) + 2
            check_extreme(isa, "expressive", line(1, -1, 2, dtype=dtype), line(*z, dtype=dtype), v)

    @pytest.mark.parametrize("by", ["bool", "float", "causal"])
    def test_large_hidden_scores_beside_tiny_visible_ones(
        self, by: str, dtype: torch.dtype, isa: str, rng: np.random.Generator
    ) -> None:
        """What is hidden must not set the unit in which the visible ones are measured."""
        z = rng.normal(size=self.S) * 1e-22
        hidden = np.arange(self.S) >= 11 if by == "causal" else rng.random(self.S) < 0.5
        z[hidden] = rng.choice([1.0, 1e3, 1e18], hidden.sum())
        visible = torch.from_numpy(~hidden)[None]
        infinite = torch.zeros(1, self.S).masked_fill(~visible, -torch.inf)
        mask = {"bool": visible, "float": infinite, "causal": None}[by]
        q, k, v = line(*[1.0] * 11, dtype=dtype), line(*z, dtype=dtype), self.values(rng, dtype)
        check_extreme(isa, "expressive", q, k, v, mask=mask, causal=by == "causal", gradients=False)

    @pytest.mark.parametrize("size", [1e3, 1e9, 1e18, 1e19, 1e30])
    def test_large_expressive_scores(self, size: float, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """z² overflows, the weight is 1; a few ordinary scores beside them keep their smaller ones."""
        z = rng.choice([-size, size], self.S) * rng.uniform(1, 2, self.S)
        z[[0, 130, 330]] = 0.7
        k, v = line(*z, dtype=dtype), self.values(rng, dtype) + 1
        weights = check_extreme(isa, "expressive", line(1, -1, dtype=dtype), k, v, gradients=False)
        assert 0.3 < weights[0, 0, 0, 0] / weights[0, 0, 0, 1] < 0.4
        check_extreme(isa, "expressive", line(size, dtype=dtype), line(*z / size, dtype=dtype), self.values(rng, dtype))

    @pytest.mark.parametrize("order", ["ascending", "descending", "random"])
    def test_expressive_biases_of_200(self, order: str, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """exp(±200) is far out of float32: biases act in the logarithm, whichever block the largest comes in."""
        q, k = normal(rng, 1, 2, 5, 6, dtype=dtype), normal(rng, 1, 1, self.S, 6, dtype=dtype)
        bias = np.linspace(-200, 200, self.S)
        bias = {"ascending": bias, "descending": bias[::-1], "random": rng.choice([-200.0, 200.0], self.S)}[order]
        mask = torch.from_numpy(np.ascontiguousarray(bias))[None].to(dtype)
        check_extreme(isa, "expressive", q, k, self.values(rng, dtype), scale=0.4, mask=mask)
        check_extreme(isa, "expressive", q * 1e-20, k, self.values(rng, dtype), mask=mask, gradients=False)
        # z + 200 rounds by 1e-5, by any formula; a quarter of it has exp(100) between its ends all the same
        check_extreme(isa, "softmax", q, k, self.values(rng, dtype), scale=0.4, mask=mask / 4, gradients=False)

    def test_a_bias_makes_up_for_a_tiny_score(self, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        z, bias = rng.uniform(1, 2, self.S), torch.zeros(1, self.S)
        z[100:200] *= 1e-15
        bias[:, 100:200] = 69.0
        q, k = line(1, dtype=dtype), line(*z, dtype=dtype)
        weights = check_extreme(isa, "expressive", q, k, self.values(rng, dtype), mask=bias, gradients=False)
        assert 0.1 < weights[..., 100:200].sum() < 0.9

    def test_queries_without_any_score(self, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        """Zero and orthogonal queries have expressive weight 0 everywhere: zero rows, and gradients that are finite."""
        q, k = normal(rng, 1, 2, 9, 4, dtype=dtype), normal(rng, 1, 1, self.S, 4, dtype=dtype)
        q[:, :, 2], q[:, 1, 5:7], k[..., 3] = 0, 0, 0
        q[:, :, 7] = torch.tensor([0.0, 0, 0, 3])
        weights = check_extreme(isa, "expressive", q, k, self.values(rng, dtype))
        assert (weights.sum(-1) == 0).sum() == 6

    @scores
    def test_values_of_any_size(self, score: str, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
        q, k, v = (normal(rng, 1, 2, n, 6, dtype=dtype) for n in (7, self.S, self.S))
        exact, _ = oracle.attention(*(array(x) for x in (q, k, v)), score=score)
        for size in (1e30, 1e-20):
            with native.instruction_set(isa), poisoned():
                output = ba.attention(q, k, v * size, score=score, impl="native")
            assert_close(array(output) / size, exact, tolerance=CAPS[dtype] * 2)

    def test_lowest_numbers_hide_only_where_they_should(
        self, dtype: torch.dtype, isa: str, rng: np.random.Generator
    ) -> None:
        """expressive: as -inf. softmax: a bias like any other, so a row of nothing else is the plain mean."""
        q, k, v = (normal(rng, 1, 1, n, 6, dtype=dtype) for n in (5, 41, 41))
        for kind in DTYPES:
            lowest = torch.finfo(kind).min
            mask = torch.zeros(5, 41, dtype=kind)
            mask[:, ::2], mask[1], mask[2], mask[3] = lowest, -torch.inf, lowest, lowest / 2
            with native.instruction_set(isa), poisoned():
                soft, expressive = (ba.attention(q, k, v, score=s, attn_mask=mask, impl="native") for s in SCORES)
            assert not soft[:, :, 1].any()
            assert not expressive[:, :, 1:3].any()
            assert expressive[:, :, [0, 3, 4]].any(-1).all()
            assert_close(soft[:, :, 2], v.double().mean(2), tolerance=CAPS[dtype])
            for score, output in zip(SCORES, (soft, expressive), strict=True):
                keep, bias = oracle_masks([mask], (1, 1, 5, 41), score)
                exact, _ = oracle.attention(*(array(x) for x in (q, k, v)), score=score, keep=keep, bias=bias)
                rows = [0, 4]
                assert_close(output[:, :, rows], exact[:, :, rows], score, tolerance=CAPS[dtype])

    @scores
    def test_two_masks_whose_sum_is_beyond_the_dtype(
        self, score: str, dtype: torch.dtype, isa: str, rng: np.random.Generator
    ) -> None:
        q, k, v = (normal(rng, 1, 1, n, 6, dtype=dtype) for n in (3, 41, 41))
        mask, padding = torch.zeros(1, 1, 3, 41), torch.zeros(1, 1, 1, 41)
        mask[..., 1, :], padding[..., 7:] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
        call = Call(q, k, v, mask_BNLS=mask, padding_B11S=padding, score=score, scale=0.5)
        expected = attend(call, "reference")[0]
        with native.instruction_set(isa), poisoned():
            output, _ = native.compute(call)
        assert_close(output, expected, score, tolerance=CAPS[dtype])


# --- nothing ----------------------------------------------------------------------------------------------------------


@isas
@scores
@dtypes
@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 2, 3, 5, 4, 4), (2, 2, 1, 0, 5, 4, 4), (2, 2, 2, 3, 0, 4, 4), (2, 2, 2, 0, 0, 4, 4), (2, 2, 2, 3, 5, 4, 0)],
    ids=["B=0", "L=0", "S=0", "L=S=0", "W=0"],
)
def test_zero_sizes(sizes: tuple[int, ...], dtype: torch.dtype, score: str, isa: str) -> None:
    """Nothing to do is done, forward and backward; no keys means what a row without visible keys means."""
    B, N, G, L, S, H, W = sizes
    q, k, v = (torch.ones(*shape, dtype=dtype) for shape in ((B, N, L, H), (B, G, S, H), (B, G, S, W)))
    for causal, mask, shared in itertools.product(
        (False, True), (None, torch.ones(L, S, dtype=torch.bool), torch.zeros(1, 1, 1, S)), (False, True)
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        leaves = leaves[:2] if shared and W == H else leaves
        with native.instruction_set(isa), poisoned():
            output = ba.attention(
                leaves[0], leaves[1], leaves[-1], score=score, attn_mask=mask, is_causal=causal, enable_gqa=True,
                impl="native",
            )  # fmt: skip
            gradients = torch.autograd.grad(output.sum(), leaves)
        assert output.shape == (B, N, L, W)
        assert output.dtype == dtype
        assert not output.any()
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()


@scores
def test_queries_of_no_width_are_those_without_a_score(score: str) -> None:
    q, k, v = torch.ones(1, 2, 3, 0), torch.ones(1, 2, 5, 0), torch.randn(1, 2, 5, 4)
    if ba.explain(q, k, v, score=score, impl="native").chosen is None:
        with pytest.raises(ValueError, match="native"):
            ba.attention(q, k, v, score=score, impl="native")
        return
    with poisoned():
        output = ba.attention(q, k, v, score=score, impl="native")
    assert_close(output, ba.attention(q, k, v, score=score, impl="reference"), tolerance=1e-6, vacuous=True)


def test_a_case_prints_what_it_is() -> None:
    """The description seeds the numbers: two cases that differ must not share it."""
    one = Case((1, 2, 1, 3, 5, 7, 7), MASKS[0])
    others = [replace(one, **change) for change in ({"causal": True}, {"shared": True}, {"scale": 1.0}, {"mask": None},
                                                    {"padding": MASKS[2]}, {"layouts": ("packed",) * 3})]  # fmt: skip
    assert len({str(case) for case in (one, *others)}) == 7
