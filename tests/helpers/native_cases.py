"""Cases for the compiled kernels and those for GPUs: what is drawn, what is exact, and how the two are compared.

Letters as in native/cpp/api.h: B batch, N query heads, G key heads, L queries, S keys, H width of q and k, W width of
v.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from better_attention.call.call import Call
from better_attention.impl import native
from better_attention.native import structs
from helpers import oracle
from helpers.bridge import array, assert_close, assert_within_rounding, rounded_attention
from helpers.rounding import Error, Rounding, expected_errors

ISAS = () if native.missing() else native.instruction_sets()
needs_native = pytest.mark.skipif(native.missing() is not None, reason=f"no compiled kernels: {native.missing()}")

SCORES = tuple(structs.SCORES)
DTYPES = (torch.float32, torch.bfloat16)

FEW = 8
"""A row that sees fewer keys is compared loosely under the expressive score: all its scores can be near 0 at once, and
then its weights hang on the rounding of q.k, by any formula."""

LOOSE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Tolerances, times the largest reference value where that exceeds 1, where rounding may decide over a weight."""


def grid(*values: object) -> pytest.MarkDecorator:
    """Every value with every dtype and score; half of them, a chequerboard, in the slow tests."""
    cells = itertools.product(enumerate(values), enumerate(DTYPES), enumerate(SCORES))
    return pytest.mark.parametrize(
        ("value", "dtype", "score"),
        [
            pytest.param(
                value, dtype, score, id=f"{value}-{dtype}-{score}", marks=[pytest.mark.slow] * ((i + j + k) % 2)
            )
            for (i, value), (j, dtype), (k, score) in cells
        ],
    )


# --- what is drawn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """A mask in SDPA's sense, (B, N, L, S) with ones where it broadcasts.

    Args:
        kind: "bool" (True = attend), "float32" or "bfloat16" (added to the log weights).
        shape: the four letters BNLS, each replaced by 1 where the mask broadcasts.
        hides: which keys: "nothing", "some", "rows" (some, and some rows whole), "band" (all far from the diagonal),
            "all but one", "all but the last" or "all".
        storage: "plain", "transposed", "gaps" (rows inside a wider tensor) or "expanded" (to full size by stride 0).
        lowest: a float mask hides by its dtype's lowest number instead of -inf.
    """

    kind: str
    shape: str
    hides: str = "some"
    storage: str = "plain"
    lowest: bool = False

    def __str__(self) -> str:
        rest = [self.storage] * (self.storage != "plain") + ["lowest"] * self.lowest
        return " ".join([self.kind, self.shape, self.hides, *rest])


@dataclass(frozen=True)
class Case:
    """One call: sizes (B, N, G, L, S, H, W), masks, and how q, k and v lie in memory; ``shared``: v is k.

    ``band``: offset and window of the triangle, under ``causal``.
    """

    sizes: tuple[int, int, int, int, int, int, int]
    mask: Mask | None = None
    padding: Mask | None = None
    causal: bool = False
    scale: float | None = None
    layouts: tuple[str, str, str] = ("plain", "plain", "plain")
    shared: bool = False
    band: tuple[int, int | None] = (0, None)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.sizes))]
        parts += [f"mask {self.mask}"] * (self.mask is not None) + [f"padding {self.padding}"] * bool(self.padding)
        parts += ["causal"] * self.causal + ["shared"] * self.shared + [f"scale {self.scale}"] * bool(self.scale)
        parts += ["/".join(self.layouts)] * (set(self.layouts) != {"plain"})
        parts += ["offset {} window {}".format(*self.band)] * (self.band != (0, None))
        return " ".join(parts)


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.from_numpy(rng.normal(size=shape)).to(dtype)


def _inside(x: Tensor, before: int, after: int) -> Tensor:
    """``x`` as a window into a larger tensor of NaN (bool: of the opposite of most of it)."""
    *lead, rows, columns = x.shape
    filler = torch.nan if x.is_floating_point() else bool(x.numel() and not x.float().mean() > 0.5)
    whole = torch.full((*lead, before + rows + after, before + columns + after), filler, dtype=x.dtype)
    window = whole[..., before : before + rows, before : before + columns]
    window.copy_(x)
    return window


def _packed(x: Tensor) -> Tensor:
    """(B, N, L, H) as the second of three slices of a (B, L, 3 N H) projection."""
    B, N, L, H = x.shape
    whole = torch.full((B, L, 3, N, H), torch.nan, dtype=x.dtype)
    whole[:, :, 1] = x.transpose(1, 2)
    return whole[:, :, 1].transpose(1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x.contiguous(),
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": _packed,
    "length first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "odd offset": lambda x: _inside(x, 1, 2),
    "odd rows": lambda x: _inside(x, 0, 3),
    "every second row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2],
    "every second number": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 4).flatten(3, 4)[..., ::2],
    "features outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "one for the batch": lambda x: x[:1].contiguous().expand_as(x),
    "one for all heads": lambda x: x[:, :1].contiguous().expand_as(x),
    "one row": lambda x: x[:, :, :1].contiguous().expand_as(x),
}
"""Ways for (B, N, L, H) to lie in memory. All but the last three keep the numbers; what lies between them is NaN."""

KEEP_NUMBERS = [name for name in LAYOUTS if not name.startswith("one ")]


def _visible(mask: Mask, rng: np.random.Generator, sizes: tuple[int, int, int, int]) -> np.ndarray:
    shape = tuple(size if letter != "1" else 1 for size, letter in zip(sizes, mask.shape, strict=True))
    visible = rng.random(shape) < 0.6
    L, S = shape[2:]
    if mask.hides == "nothing":
        visible[:] = True
    elif mask.hides == "band":
        visible[:] = np.abs(np.arange(L)[:, None] * S // L - np.arange(S)) <= 5
    elif mask.hides.startswith("all"):
        visible[:] = False
        if mask.hides != "all":
            visible[..., S - 1 if mask.hides.endswith("last") else S * 2 // 3] = True
    elif S > 1:
        visible[..., 0] = True
    if mask.hides == "rows":
        visible[0] = False if L == 1 else visible[0]
        visible[:, :, [L // 2, -1]] = visible[:, :, [L // 2, -1]] & (L == 1)
    return visible


def draw_mask(
    mask: Mask, rng: np.random.Generator, sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The mask for sizes (B, N, L, S); its biases are numbers that ``dtype`` has too."""
    values = torch.from_numpy(_visible(mask, rng, sizes))
    if mask.kind != "bool":
        kind = getattr(torch, mask.kind)
        bias = normal(rng, *values.shape).to(dtype).to(kind)
        values = bias.masked_fill(~values, torch.finfo(kind).min if mask.lowest else -torch.inf)
    if mask.storage == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if mask.storage == "gaps":
        return _inside(values, 1, 2)
    return values.expand(sizes) if mask.storage == "expanded" else values


# --- what is exact ----------------------------------------------------------------------------------------------------


def oracle_masks(masks: list[Tensor], shape: tuple[int, ...], score: str) -> tuple[np.ndarray, np.ndarray]:
    """What is visible and what is added to the log weight, both (B, N, L, S)."""
    keep, bias = np.ones(shape, dtype=bool), np.zeros(shape)
    for mask in masks:
        values = np.broadcast_to(mask.numpy() if mask.dtype == torch.bool else array(mask), shape)
        if mask.dtype == torch.bool:
            keep &= values
            continue
        shown = values > (torch.finfo(mask.dtype).min if score == "expressive" else -np.inf)
        keep &= shown
        bias += np.where(shown, values, 0)
    return keep, bias


def exact_gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, weights: np.ndarray, upstream: np.ndarray, score: str, scale: float
) -> list[np.ndarray]:
    """Gradients of q, k and v of sum(output * upstream), from the oracle's weights (B, N, L, S).

    softmax: dz_k = w_k (dw_k - Σ w dw); expressive: the same times 2 / (z_k (1 + z_k²)), since w ∝ z²/(1+z²).
    """
    group = q.shape[1] // k.shape[1]
    k_all, v_all = np.repeat(k, group, 1), np.repeat(v, group, 1)
    dw = upstream @ v_all.swapaxes(2, 3)
    dz = weights * (dw - (dw * weights).sum(-1, keepdims=True))
    if score == "expressive":
        z = scale * (q @ k_all.swapaxes(2, 3))
        alive = (z != 0) & (weights != 0)
        z = np.where(alive, z, 1.0)
        dz = np.where(alive, dz * 2 / (z * (1 + z**2)), 0.0)

    def folded(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:]).sum(2)

    dk, dv = dz.swapaxes(2, 3) @ q * scale, weights.swapaxes(2, 3) @ upstream
    return [dz @ k_all * scale, folded(dk), folded(dv)]


def cancellation(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    output: np.ndarray,
    weights: np.ndarray,
    upstream: np.ndarray,
    score: str,
    scale: float,
    unit: float = 2.0**-24,
) -> list[float | np.ndarray]:
    """How far rounding what cancels in the gradients may move them, element by element.

    dz_k = w_k (dw_k - δ) is a difference of two sums over the W values: dw = upstream·v, δ = Σ w dw = upstream·output.
    A row that puts all its weight on one key has dz = 0, whatever the two round to. A plain formula adds up the same
    rounded dw twice and hits 0, a kernel that keeps no weights has δ from the output. Products and partial sums round
    by a few ``unit`` of a term, independently, so that their squares add up.
    """
    group = q.shape[1] // k.shape[1]
    k_all, v_all = np.repeat(k, group, 1), np.repeat(v, group, 1)
    terms = upstream**2 @ (v_all**2).swapaxes(2, 3) + ((upstream * output) ** 2).sum(-1, keepdims=True)
    noise = 4 * unit * abs(scale) * weights * np.sqrt(terms)
    if score == "expressive":
        z = scale * (q @ k_all.swapaxes(2, 3))
        alive = (z != 0) & (weights != 0)
        noise = np.where(alive, noise * 2 / (np.abs(np.where(alive, z, 1.0)) * (1 + z**2)), 0.0)
    dk = (noise**2).swapaxes(2, 3) @ q**2
    dk = dk.reshape(dk.shape[0], dk.shape[1] // group, group, *dk.shape[2:]).sum(2)
    return [np.sqrt(noise**2 @ k_all**2), np.sqrt(dk), 0.0]


class Gradient(NamedTuple):
    """One exact gradient, and how large the error of a computed one may be."""

    exact: np.ndarray
    error: Error


@dataclass(frozen=True)
class Problem:
    """A drawn case with its exact results, and the errors that rounding may lead to in the case's dtype.

    ``empty`` rows (B, N, L) see no key, ``few`` so few that their weights may hang on rounding; ``strict`` is the
    upstream gradient with the few set to zero. ``error`` is of the rows that are neither, ``few_error`` of the few.
    """

    case: Case
    score: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    padding: Tensor | None
    scale: float
    upstream: Tensor
    strict: Tensor
    empty: np.ndarray
    few: np.ndarray
    trivial: bool  # no row sees two different keys or values: no score matters, weights are 1, gradients of z are 0
    output: np.ndarray
    error: Error
    few_error: Error
    strict_gradients: list[Gradient]
    gradients: list[Gradient] | None  # of ``upstream``, where there are few

    def leaves(self) -> list[Tensor]:
        """Fresh leaves with the case's strides: q, k and v, or q and the one tensor that is both."""
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        return leaves[:2] if self.case.shared else leaves

    def call(self, leaves: list[Tensor]) -> Call:
        """The validated call, as :func:`better_attention.attention` would make it."""
        return Call(
            leaves[0],
            leaves[1],
            leaves[-1],
            mask_BNLS=self.mask,
            padding_B11S=self.padding,
            causal=self.case.causal,
            offset=self.case.band[0],
            window=self.case.band[1],
            score=self.score,
            scale=self.scale,
        )


@lru_cache(maxsize=10)
def problem(case: Case, score: str, dtype: torch.dtype, inner: torch.dtype = torch.float32) -> Problem:
    """The case with numbers that follow from its description alone; weights are multiplied in the format ``inner``."""
    rng = np.random.default_rng(zlib.crc32(f"{case} {score} {dtype}".encode()))
    B, N, G, L, S, H, W = case.sizes
    lay = [LAYOUTS[name] for name in case.layouts]
    q, k = lay[0](normal(rng, B, N, L, H, dtype=dtype)), lay[1](normal(rng, B, G, S, H, dtype=dtype))
    v = k if case.shared else lay[2](normal(rng, B, G, S, W, dtype=dtype))
    mask, padding = (m and draw_mask(m, rng, (B, N, L, S), dtype) for m in (case.mask, case.padding))
    keep, bias = oracle_masks([m for m in (mask, padding) if m is not None], (B, N, L, S), score)
    scale = H**-0.5 if case.scale is None else case.scale

    arrays = [array(x) for x in (q, k, v)]
    offset, window = case.band
    output, weights = oracle.attention(
        *arrays, score=score, keep=keep, bias=bias, causal=case.causal, offset=offset, window=window, scale=scale
    )
    keep = keep & oracle.see(L, S, case.causal, None, None, offset, window)
    seen = keep.sum(-1)
    empty = seen == 0
    biased = any(m is not None and m.is_floating_point() for m in (mask, padding))  # some keys then count for little
    enough = (2 * FEW if biased else FEW) if score == "expressive" else 0
    few = ~empty & (seen < enough)
    # Long rows have small weights: a larger upstream gradient keeps all gradients well above the vacuous.
    upstream = normal(rng, B, N, L, W, dtype=dtype) * 2.0 ** np.ceil(np.log2(max(1, S / 16)))
    strict = upstream.masked_fill(torch.from_numpy(few)[..., None], 0)
    upstreams = [strict, upstream] if few.any() else [strict]

    leaves = [torch.from_numpy(x).requires_grad_() for x in arrays[: 2 if case.shared else 3]]
    exact = [output[~(empty | few)], output[few]]
    for upward in upstreams:
        gradients = exact_gradients(*arrays, weights, array(upward), score, scale)
        exact += [gradients[0], gradients[1] + gradients[2]] if case.shared else gradients

    def draw() -> list[Tensor]:
        rounded = rounded_attention(
            leaves[0], leaves[1], leaves[-1], score=score, keep=torch.from_numpy(keep), scale=scale,
            bias=torch.from_numpy(bias) if biased else None, rounding=Rounding(rng, dtype, inner),
        )  # fmt: skip
        found = [rounded[torch.from_numpy(~(empty | few))], rounded[torch.from_numpy(few)]]
        for upward in upstreams:
            found += torch.autograd.grad(rounded, leaves, upward.to(torch.float64), retain_graph=True)
        return found

    # Where all keys or all values are one, so are all roundings of a sum: they add up, and do not average out.
    repeated = 4 if "one row" in case.layouts[1:] else 1
    error, few_error, *errors = (e * repeated for e in expected_errors(draw, exact))
    pairs = [Gradient(*pair) for pair in zip(exact[2:], errors, strict=True)]
    trivial = bool((seen <= 1).all()) or "one row" in case.layouts[1:]
    return Problem(
        case, score, q, k, v, mask, padding, scale, upstream, strict, empty, few, trivial, output, error, few_error,
        pairs[: len(leaves)], pairs[len(leaves) :] or None,
    )  # fmt: skip


# --- how the two are compared -----------------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills every uninitialised allocation of torch with NaN, so that a number nobody wrote cannot go unnoticed."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's thread count within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(x: Tensor) -> Tensor:
    """The bit patterns, which compare equal where NaN would not and tell 0 from -0."""
    return x.detach().contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def same_bits(found: list[Tensor] | tuple[Tensor, ...], expected: list[Tensor] | tuple[Tensor, ...]) -> bool:
    """Whether two lists of results are the same to the last bit."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(found, expected, strict=True)
    )


def fingerprint() -> str:
    """SHA-256 of outputs and gradients of a few calls from a fixed seed, which shows who computed them."""
    digest = hashlib.sha256()
    for score in SCORES:
        for L, S in ((61, 131), (1, 1021)):
            rng = np.random.default_rng(L)
            leaves = [normal(rng, 1, 2, n, 40).requires_grad_() for n in (L, S, S)]
            output, _ = native.compute(Call(*leaves, score=score, scale=0.2))
            for x in (output, *torch.autograd.grad(output.square().sum(), leaves)):
                digest.update(array(x).tobytes())
    return digest.hexdigest()


def assert_loosely_close(actual: Tensor, exact: np.ndarray, error: Error, note: str) -> None:
    """Within ``LOOSE`` of the exact result, or within what rounding may lead to where that is more."""
    tolerance = max(LOOSE[actual.dtype], error.largest / max(1.0, np.abs(exact).max()))
    assert_close(actual, exact, note, tolerance=tolerance, vacuous=True)


def check(case: Case, score: str, dtype: torch.dtype, isa: str) -> None:
    """The case on one instruction set."""
    with native.instruction_set(isa):
        check_results(native.compute, problem(case, score, dtype), f"{isa} {score} {dtype} {case}")


def check_results(compute: Callable[[Call], tuple[Tensor, Tensor | None]], p: Problem, note: str) -> None:
    """A problem by one implementation, from poisoned buffers: no error is larger than rounding explains."""
    case, dtype, leaves = p.case, p.q.dtype, p.leaves()
    with poisoned():
        output, _ = compute(p.call(leaves))
        strict = torch.autograd.grad(output, leaves, p.strict, retain_graph=True)
        loose = None if p.gradients is None else torch.autograd.grad(output, leaves, p.upstream)
    assert output.dtype == dtype, note
    assert output.shape == p.output.shape, note
    empty, few = torch.from_numpy(p.empty), torch.from_numpy(p.few)
    assert not output[empty].any(), f"{note}: a row without keys is not zero"
    assert not strict[0][empty].any(), f"{note}: its query has a gradient"
    assert not strict[0][few].any(), f"{note}: a query has a gradient whose output has none"
    rows = ~(empty | few)
    if rows.any():
        assert_within_rounding(output[rows], p.output[rows.numpy()], p.error, note, cap=True)
    if few.any():
        assert_loosely_close(output[few], p.output[p.few], p.few_error, f"few keys, {note}")
    names = ("query", "key and value") if case.shared else ("query", "key", "value")
    for i, (name, expected) in enumerate(zip(names, p.strict_gradients, strict=True)):
        what = f"gradient of {name}, {note}"
        assert strict[i].dtype == dtype, what
        vacuous = p.trivial or bool((p.empty | p.few).all())
        assert_within_rounding(strict[i], *expected, what, vacuous=vacuous)
        if loose is not None and p.gradients is not None:
            assert_loosely_close(loose[i], *p.gradients[i], f"few keys, {what}")
