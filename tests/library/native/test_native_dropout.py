"""Dropout in the compiled kernels: which weights it drops, and output and gradients given those.

Which are dropped follows from a seed by a rule that native/dropout.hpp states. It is written down here again, in NumPy
on Python's own integers, so that everything can be held against the float64 oracle weight by weight.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import better_attention as ba
from better_attention.call.call import Call
from better_attention.impl import native
from helpers import oracle
from helpers.bridge import array, assert_close
from helpers.native_cases import (
    DTYPES,
    ISAS,
    LAYOUTS,
    SCORES,
    Case,
    Mask,
    draw_mask,
    exact_gradients,
    needs_native,
    normal,
    oracle_masks,
    poisoned,
    same_bits,
    threads,
)

pytestmark = needs_native

isas = pytest.mark.parametrize("isa", ISAS)
scores = pytest.mark.parametrize("score", SCORES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


# --- the rule, written a second time ----------------------------------------------------------------------------------

WORD, LONG, GOLDEN = 2**32 - 1, 2**64 - 1, 0x9E3779B97F4A7C15


def splitmix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & LONG
    x = (x ^ x >> 27) * 0x94D049BB133111EB & LONG
    return x ^ x >> 31


def mix(x: np.ndarray, extra: np.ndarray | int) -> np.ndarray:
    x = ((x ^ x >> 16) * 0x7FEB352D + extra) & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def kept(seed: int, p: float, B: int, N: int, L: int, S: int) -> np.ndarray:
    """Which weights are kept, bool (B, N, L, S)."""
    rows = np.array(
        [splitmix64(seed + (2 * i + 1) * GOLDEN & LONG) for i in range(B * N * L)], dtype=np.uint64
    ).reshape(B, N, L, 1)
    keys = mix(np.arange(S, dtype=np.uint64) * 0x9E3779B9 + (splitmix64(seed) & WORD) & WORD, 0)
    return mix(rows & WORD ^ keys, rows >> 32) >= math.floor(p * 2**32)


def seed_of(state: int) -> int:
    """The number that a call draws after ``torch.manual_seed(state)``."""
    torch.manual_seed(state)
    return int(torch.randint(2**63 - 1, ()))


# --- the rule is a good one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rule_drops_at_random(p: float) -> None:
    """Rates of rows, of keys and of neighbours, over many rows and seeds, are those of independent draws."""
    B, N, L, S = 4, 4, 64, 256
    drops = np.stack([~kept(seed, p, B, N, L, S) for seed in (0, 1, 2**40, 2**63 - 2)]).astype(float)
    n, spread = drops.size, math.sqrt(p * (1 - p))
    assert abs(drops.mean() - p) < 4 * spread / math.sqrt(n)
    for axis in range(5):  # seed, batch element, head, query, key
        rates = drops.mean(axis=tuple(i for i in range(5) if i != axis))
        score = (rates - p) / spread * math.sqrt(n / len(rates))
        assert stats.kstest(score, "norm").pvalue > 1e-4, f"axis {axis}"
        for lag in (1, 2, 16, 64):
            if lag < drops.shape[axis]:
                first, second = (
                    np.take(drops, range(*ends), axis)
                    for ends in ((drops.shape[axis] - lag,), (lag, drops.shape[axis]))
                )
                correlation = ((first - p) * (second - p)).mean() / spread**2
                assert abs(correlation) < 4.5 / math.sqrt(first.size), f"axis {axis}, lag {lag}"
    rows = drops.sum(-1).ravel()  # binomial: neither too even nor too uneven
    assert rows.var() == pytest.approx(S * p * (1 - p), rel=6 * math.sqrt(2 / rows.size))


@isas
@pytest.mark.parametrize("p", [0.1, 0.3, 0.75])
def test_the_kernels_drop_by_the_rule(p: float, isa: str, rng: np.random.Generator) -> None:
    """Read off as the output for V = identity: exactly these weights, and all others scaled alike."""
    for B, N, L, S in ((2, 3, 37, 61), (1, 2, 131, 100), (3, 1, 1, 67), (1, 2, 5, 257)):
        q, k = normal(rng, B, N, L, 16), normal(rng, B, N, S, 16)
        v = torch.eye(S).expand(B, N, S, S)
        with native.instruction_set(isa):
            plain = ba.attention(q, k, v, impl="native")
            expected = kept(seed_of(5), p, B, N, L, S)
            torch.manual_seed(5)
            dropped = ba.attention(q, k, v, impl="native", dropout_p=p)
        assert np.array_equal((dropped != 0).numpy(), expected)
        assert_close(dropped[torch.from_numpy(expected)], array(plain)[expected] / (1 - p), tolerance=1e-5)


# --- output and gradients ---------------------------------------------------------------------------------------------

CASES = [
    Case((2, 3, 3, 37, 61, 16, 16)),
    Case((2, 4, 2, 64, 64, 32, 32)),
    Case((1, 4, 2, 67, 131, 19, 11), causal=True),
    Case((2, 2, 2, 45, 70, 32, 32), Mask("bool", "B11S")),
    Case((2, 2, 1, 53, 149, 16, 16), Mask("float32", "BNLS", "rows"), Mask("bool", "B11S")),
    Case((1, 2, 2, 29, 43, 64, 129), Mask("bool", "11LS", "rows"), causal=True),
    Case((3, 2, 2, 67, 71, 32, 32), shared=True),
    Case((2, 3, 3, 41, 50, 8, 8), layouts=("packed", "packed", "packed")),
    Case((2, 6, 2, 1, 203, 64, 64), Mask("bool", "B11S")),
    Case((1, 2, 1, 5, 331, 32, 32), shared=True),
    Case((1, 2, 1, 300, 17, 7, 5)),
]
"""Every shape of tile, masks, shared keys, and few queries, which without dropout would be decoded another way."""


@isas
@scores
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator) -> None:
    (B, N, G, L, S, H, W), p, state = case.sizes, 0.3, 11
    lay = [LAYOUTS[name] for name in case.layouts]
    q, k = lay[0](normal(rng, B, N, L, H, dtype=dtype)), lay[1](normal(rng, B, G, S, H, dtype=dtype))
    v = k if case.shared else lay[2](normal(rng, B, G, S, W, dtype=dtype))
    mask, padding = (m and draw_mask(m, rng, (B, N, L, S)) for m in (case.mask, case.padding))
    merged = [m for m in (mask, padding) if m is not None]
    keep, bias = oracle_masks(merged, (B, N, L, S), score)
    arrays, scale = [array(x) for x in (q, k, v)], H**-0.5
    _, weights = oracle.attention(*arrays, score=score, keep=keep, bias=bias, causal=case.causal, scale=scale)
    factors = kept(seed_of(state), p, B, N, L, S) / (1 - p)
    values = np.repeat(arrays[2], N // G, 1)
    exact = (weights * factors) @ values

    leaves = [x.detach().requires_grad_() for x in (q, k, v)[: 2 if case.shared else 3]]
    upstream = normal(rng, B, N, L, W, dtype=dtype)
    torch.manual_seed(state)
    call = Call(
        leaves[0], leaves[1], leaves[-1], mask, padding, causal=case.causal, score=score, scale=scale, dropout_p=p
    )  # fmt: skip
    with native.instruction_set(isa), poisoned():
        assert native.unsupported(call) == []
        output, _ = native.compute(call)
        found = torch.autograd.grad(output, leaves, upstream)
    assert_close(output, exact, tolerance=TOLERANCE[dtype])
    expected = dropped_gradients(*arrays, weights, factors, array(upstream), score, scale)
    if case.shared:
        expected = [expected[0], expected[1] + expected[2]]
    for name, gradient, true in zip("qkv", found, expected, strict=False):
        # Few visible keys near z = 0: 2/z makes expressive slopes hang on the rounding of z (as without dropout).
        loose = 30 if score == "expressive" else 3
        bound = loose * TOLERANCE[dtype] * np.abs(true).max()
        assert np.abs(array(gradient) - true).max() <= bound, f"gradient of {name}"


def dropped_gradients(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    weights: np.ndarray,
    factors: np.ndarray,
    upstream: np.ndarray,
    score: str,
    scale: float,
) -> list[np.ndarray]:
    """As :func:`exact_gradients`, for output = Σ factor weight v: dw carries the factor."""
    group = q.shape[1] // k.shape[1]
    k_all, v_all = np.repeat(k, group, 1), np.repeat(v, group, 1)
    dw = factors * (upstream @ v_all.swapaxes(2, 3))
    dz = weights * (dw - (dw * weights).sum(-1, keepdims=True))
    if score == "expressive":
        z = scale * (q @ k_all.swapaxes(2, 3))
        alive = (z != 0) & (weights != 0)
        z = np.where(alive, z, 1.0)
        dz = np.where(alive, dz * 2 / (z * (1 + z**2)), 0.0)

    def folded(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:]).sum(2)

    dv = (weights * factors).swapaxes(2, 3) @ upstream
    return [dz @ k_all * scale, folded(dz.swapaxes(2, 3) @ q * scale), folded(dv)]


@scores
def test_the_gradients_here_are_those_without_dropout_where_nothing_is_dropped(
    score: str, rng: np.random.Generator
) -> None:
    """The yardstick above against the one that is held against differences of the oracle."""
    q, k, v, upstream = (rng.normal(size=(2, 4, n, 5)) for n in (7, 9, 9, 7))
    k, v = k[:, :2], v[:, :2]
    _, weights = oracle.attention(q, k, v, score=score, scale=0.4)
    ones = np.ones_like(weights)
    for ours, theirs in zip(
        dropped_gradients(q, k, v, weights, ones, upstream, score, 0.4),
        exact_gradients(q, k, v, weights, upstream, score, 0.4),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@isas
def test_vanishing_scores_are_dropped_alike(isa: str, rng: np.random.Generator) -> None:
    """Rows of scores so small that they are computed in double precision follow the same rule, gradients too."""
    B, N, L, S, H, p = 1, 2, 19, 33, 8, 0.4
    q, k, v = normal(rng, B, N, L, H) * 1e-15, normal(rng, B, N, S, H), normal(rng, B, N, S, 6)
    q[:, :, ::3] *= 1e15
    arrays = [array(x) for x in (q, k, v)]
    _, weights = oracle.attention(*arrays, score="expressive", scale=1.0)
    factors = kept(seed_of(3), p, B, N, L, S) / (1 - p)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    upstream = normal(rng, B, N, L, 6)
    torch.manual_seed(3)
    with native.instruction_set(isa):
        output = ba.attention(*leaves, score="expressive", scale=1.0, dropout_p=p, impl="native")
        found = torch.autograd.grad(output, leaves, upstream)
    assert_close(output, (weights * factors) @ arrays[2], tolerance=1e-4)
    expected = dropped_gradients(*arrays, weights, factors, array(upstream), "expressive", 1.0)
    for gradient, true in zip(found, expected, strict=True):
        size = np.abs(true).max(axis=-1, keepdims=True)
        assert (np.abs(array(gradient) - true) <= 1e-3 * size + 1e-5).all()


@isas
@scores
def test_everything_dropped(score: str, isa: str, rng: np.random.Generator) -> None:
    leaves = [normal(rng, 2, 3, n, 16).requires_grad_() for n in (21, 40, 40)]
    with native.instruction_set(isa), poisoned():
        output = ba.attention(*leaves, score=score, dropout_p=1.0, impl="native")
        found = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert not output.any()
    assert not any(gradient.any() for gradient in found)


# --- randomness as torch's users know it ------------------------------------------------------------------------------


def trained(q: Tensor, k: Tensor, v: Tensor, score: str = "softmax", p: float = 0.2) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = ba.attention(*leaves, score=score, dropout_p=p, impl="native")
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.fixture
def qkv(rng: np.random.Generator) -> list[Tensor]:
    return [normal(rng, 2, 4, n, 32) for n in (67, 131, 131)]


@scores
def test_the_seed_decides_and_neither_threads_nor_instruction_sets_do(score: str, qkv: list[Tensor]) -> None:
    def seeded(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return trained(*qkv, score)

    first = seeded(1)
    assert same_bits(seeded(1), first)
    assert not torch.allclose(seeded(2)[0], first[0])
    assert not torch.allclose(trained(*qkv, score)[0], seeded(1)[0]), "a second call drops others"
    with threads(2):
        assert same_bits(seeded(1), first)
    for isa in ISAS:
        with native.instruction_set(isa):
            for ours, best in zip(seeded(1), first, strict=True):
                torch.testing.assert_close(ours, best, rtol=1e-4, atol=1e-4)


def test_a_batch_of_one_kind_is_dropped_in_many_ways(rng: np.random.Generator) -> None:
    """Equal samples, heads and queries get masks of their own."""
    q, k, v = (normal(rng, 1, 1, 1, 16).expand(3, 2, n, 16) for n in (5, 64, 64))
    output = ba.attention(q, k, torch.eye(64).expand(3, 2, 64, 64), dropout_p=0.5, impl="native")
    patterns = {tuple(row.tolist()) for row in (output != 0).reshape(-1, 64)}
    assert len(patterns) == 3 * 2 * 5
    assert not torch.equal(*(ba.attention(q, k, v, dropout_p=0.5, impl="native") for _ in range(2)))


@scores
def test_no_random_number_is_drawn_without_dropout(score: str, qkv: list[Tensor]) -> None:
    state = torch.get_rng_state()
    trained(*qkv, score, p=0.0)
    assert torch.equal(torch.get_rng_state(), state)


@scores
def test_checkpointing_drops_the_same_again(score: str, qkv: list[Tensor]) -> None:
    """Activation checkpointing computes the forward pass twice, and has to get the same mask."""
    from torch.utils.checkpoint import checkpoint

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ba.attention(q, k, v, score=score, dropout_p=0.3, impl="native")

    results = []
    for wrapped in (False, True):
        leaves = [x.detach().requires_grad_() for x in qkv]
        torch.manual_seed(9)
        output = checkpoint(attend, *leaves, use_reentrant=False) if wrapped else attend(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert same_bits(*results)


@scores
def test_the_mean_over_many_masks_is_the_undropped_output(score: str, rng: np.random.Generator) -> None:
    q, k, v = (normal(rng, 1, 2, n, 8) for n in (6, 40, 40))
    draws = torch.stack([ba.attention(q, k, v, score=score, dropout_p=0.25, impl="native") for _ in range(600)])
    plain = ba.attention(q, k, v, score=score, impl="native")
    z = (draws.mean(0) - plain) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 5
    assert z.std() == pytest.approx(1, abs=0.35)


@scores
@pytest.mark.parametrize("impl", ["native", "auto"])
def test_a_training_layer_uses_them(score: str, impl: str, rng: np.random.Generator) -> None:
    name = "standard" if score == "softmax" else "expressive"
    module = ba.MultiheadAttention(64, 4, dropout=0.2, mechanism=name, batch_first=True, impl=impl).train()
    x = normal(rng, 8, 64, 64)
    q = x.reshape(8, 64, 4, 16).transpose(1, 2)
    assert ba.explain(q, q, q, score=score, dropout_p=0.2).chosen == "native"
    torch.manual_seed(4)
    first = module(x, x, x, need_weights=False)[0]
    torch.manual_seed(4)
    assert torch.equal(module(x, x, x, need_weights=False)[0], first)
    module.eval()
    assert not torch.allclose(module(x, x, x, need_weights=False)[0], first)


MEASURE = """
import torch, better_attention as ba
from better_attention.bench.machine import extra_memory
torch.set_num_threads(1)
def train(score, impl, length):
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    ba.attention(q, k, v, score=score, dropout_p=0.1, impl=impl).sum().backward()
for score, impl in ("softmax", "native"), ("expressive", "native"), ("expressive", "reference"):
    train(score, impl, 64)
    print(extra_memory(lambda: train(score, impl, 4096)))
"""


def test_memory_stays_linear() -> None:
    """4,096 queries and keys: factors of all weights would be 64 MiB. Resident memory, the kernels' own included."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", MEASURE]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    *native, reference = map(int, done.stdout.split())
    assert len(native) == 2
    assert max(native) < 16 * 2**20
    assert reference > 64 * 2**20, "what is measured would not show it"


BATCHED = {
    "vmap": lambda out, leaves, grads: torch.vmap(
        lambda grad: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    )(grads),
    "is_grads_batched": lambda out, leaves, grads: torch.autograd.grad(
        out, leaves, grads, is_grads_batched=True, retain_graph=True
    ),
}


@scores
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("impl", ["native", "chunked"])
@pytest.mark.parametrize("how", BATCHED)
def test_many_gradients_at_once_are_those_of_the_mask_drawn(
    how: str, impl: str, score: str, rng: np.random.Generator
) -> None:
    """The forward pass ran outside of vmap: every slice of the backward pass has to find its one mask."""
    leaves = [normal(rng, 2, 2, n, 8).requires_grad_() for n in (5, 9, 9)]
    out = ba.attention(*leaves, score=score, dropout_p=0.5, impl=impl)
    grads = normal(rng, 3, *out.shape)
    expected = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in grads]
    if (how, impl) == ("is_grads_batched", "chunked"):
        with pytest.raises(ValueError, match=r"is_grads_batched=True: pass impl='reference'"):
            BATCHED[how](out, leaves, grads)
        return
    for found, parts in zip(BATCHED[how](out, leaves, grads), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(parts))


@scores
def test_opcheck(score: str, rng: np.random.Generator) -> None:
    q, k, v = (normal(rng, 2, 2, n, 8).requires_grad_() for n in (5, 7, 7))
    arguments = (q, k, v, None, None, torch.tensor(12345), False, 0, None, score, 0.5, 0.25)
    torch.library.opcheck(torch.ops.better_attention.native.default, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@scores
def test_compiled_it_drops_at_random_too(score: str, qkv: list[Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ba.attention(q, k, v, score=score, dropout_p=0.5)

    q, k = qkv[:2]
    v = torch.eye(131).expand(2, 4, 131, 131)
    compiled = torch.compile(attend, fullgraph=True)
    plain = ba.attention(q, k, v, score=score)
    masks = []
    for _ in range(3):
        v = v.detach().requires_grad_()
        output = compiled(q, k, v)
        upstream = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, v, upstream)
        torch.testing.assert_close(gradient, output.detach().mT @ upstream, rtol=1e-4, atol=1e-5)
        seen = output != 0
        assert abs(seen.double().mean() - 0.5) < 0.02
        torch.testing.assert_close(output[seen], 2 * plain[seen], rtol=1e-4, atol=1e-6)
        masks.append(seen)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@scores
def test_under_torch_func_another_implementation_drops(score: str, qkv: list[Tensor]) -> None:
    """One seed for a whole vmap would be one mask for all; the plain formula draws as torch.func wants it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ba.attention(q, k, v, score=score, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(attend)(*qkv)
    output = torch.vmap(attend, randomness="different")(*(x[:1].expand(2, *x.shape[1:]) for x in qkv))
    assert not torch.allclose(output[0], output[1])


def test_a_model_learns_under_dropout(rng: np.random.Generator) -> None:
    """Attention has to pick out the marked token: impossible if gradients and masks did not belong together."""
    torch.manual_seed(0)
    x, mark = normal(rng, 256, 12, 16), torch.from_numpy(rng.integers(0, 12, 256))
    x[..., 0] = nn.functional.one_hot(mark, 12) * 3.0
    target = x[torch.arange(256), mark, 1:5]
    layer = ba.MultiheadAttention(16, 2, dropout=0.1, batch_first=True, impl="native")
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(150):
        loss = (layer(x, x, x, need_weights=False)[0].mean(1)[:, :4] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    layer.eval()
    with torch.no_grad():
        error = (layer(x, x, x, need_weights=False)[0].mean(1)[:, :4] - target).square().mean() / target.var()
    assert error < 0.3
