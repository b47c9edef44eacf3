"""What the compiled kernels must keep to the last bit: repeats, threads, batches, layouts, the future, the padding.

Also what they must not touch: their inputs, the memory around them, and memory of the order of L x S.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.call.call import Call
from better_attention.impl import native
from better_attention.impl.dispatch import attend
from helpers.bridge import assert_close
from helpers.native_cases import (
    DTYPES,
    ISAS,
    KEEP_NUMBERS,
    LAYOUTS,
    SCORES,
    Case,
    Mask,
    bits,
    draw_mask,
    grid,
    needs_native,
    normal,
    poisoned,
    same_bits,
    threads,
)

pytestmark = needs_native

isas = pytest.mark.parametrize("isa", ISAS)
scores = pytest.mark.parametrize("score", SCORES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

CASES = {
    "plain": Case((2, 4, 2, 61, 131, 19, 11)),
    "causal": Case((2, 2, 2, 131, 131, 32, 32), causal=True),
    "masked": Case((2, 4, 1, 37, 139, 16, 16), Mask("float32", "BNLS", "rows"), Mask("bool", "B11S")),
    "one tensor": Case((3, 4, 2, 67, 71, 64, 64), Mask("bool", "B11S"), shared=True),
    "one query": Case((2, 6, 2, 1, 1021, 64, 64), Mask("bool", "B11S")),
    "few queries": Case((1, 2, 1, 5, 2053, 32, 32), shared=True),
    "band": Case((2, 2, 1, 139, 211, 16, 16), Mask("bool", "B11S"), causal=True, band=(67, 43)),
    "wide": Case((1, 3, 3, 43, 59, 257, 128), Mask("bfloat16", "11LS")),
}
"""One case for each way a kernel may go about it."""

any_case = grid(*CASES)


def inputs(case: Case, dtype: torch.dtype, rng: np.random.Generator) -> dict[str, Tensor]:
    """q, k, v (one tensor with k if shared), masks and an upstream gradient for a case, contiguous."""
    B, N, G, L, S, H, W = case.sizes
    drawn = {"q": normal(rng, B, N, L, H, dtype=dtype), "k": normal(rng, B, G, S, H, dtype=dtype)}
    drawn["v"] = drawn["k"] if case.shared else normal(rng, B, G, S, W, dtype=dtype)
    for name, mask in (("mask", case.mask), ("padding", case.padding)):
        if mask is not None:
            drawn[name] = draw_mask(mask, rng, (B, N, L, S))
    return drawn | {"upstream": normal(rng, B, N, L, W, dtype=dtype)}


def run(drawn: dict[str, Tensor], score: str, case: Case) -> list[Tensor]:
    """Output and gradients, as the layer asks for them: a padding is a mask of its own."""
    q, k = (drawn[name].detach().requires_grad_() for name in "qk")
    v = k if drawn["v"] is drawn["k"] else drawn["v"].detach().requires_grad_()
    call = Call(
        q, k, v, mask_BNLS=drawn.get("mask"), padding_B11S=drawn.get("padding"), causal=case.causal,
        offset=case.band[0], window=case.band[1], score=score, scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    output, _ = attend(call, "native")
    return [output.detach(), *torch.autograd.grad(output, [q, k] if v is k else [q, k, v], drawn["upstream"])]


# --- the same bits ----------------------------------------------------------------------------------------------------


@isas
@any_case
def test_run_to_run_and_for_any_number_of_threads(
    value: str, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    case = CASES[value]
    drawn = inputs(case, dtype, rng)
    with native.instruction_set(isa), poisoned():
        first = run(drawn, score, case)
        assert all(x.isfinite().all() and x.any() for x in first)
        for count in (1, 2):
            with threads(count):
                assert same_bits(run(drawn, score, case), first), f"{count} threads"


@pytest.mark.slow
@isas
@scores
@pytest.mark.parametrize("name", CASES)
def test_many_repeats(name: str, score: str, isa: str, rng: np.random.Generator) -> None:
    case = CASES[name]
    drawn = inputs(case, torch.float32, rng)
    with native.instruction_set(isa), threads(2):
        first = run(drawn, score, case)
        for _ in range(300):
            assert same_bits(run(drawn, score, case), first)
        for count in (1, 3, 7, 13):
            with threads(count):
                assert same_bits(run(drawn, score, case), first), f"{count} threads"


@isas
@any_case
def test_an_element_alone_and_within_a_batch(
    value: str, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    """Outputs and gradients of queries keep their bits; those of keys are sums over queries, split to fit the work."""
    case = CASES[value]
    drawn = inputs(case, dtype, rng)
    with native.instruction_set(isa), poisoned():
        together = run(drawn, score, case)
        for b in range(case.sizes[0]):
            alone = {n: x[b : b + 1] if x.shape[0] > 1 else x for n, x in drawn.items()}
            alone["v"] = alone["k"] if case.shared else alone["v"]
            found, expected = run(alone, score, case), [x[b : b + 1] for x in together]
            assert same_bits(found[:2], expected[:2]), f"element {b}"
            for ours, theirs in zip(found[2:], expected[2:], strict=True):
                tolerance = 2e-6 if dtype == torch.float32 else 8e-3  # a few units of the last place
                assert_close(ours, theirs, f"element {b}", tolerance=tolerance)


@isas
@any_case
def test_memory_layout_changes_no_bit(
    value: str, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    """Slices, transposes, odd offsets, with NaN in all that lies between: what is read outside shows."""
    case = CASES[value]
    drawn = inputs(case, dtype, rng)
    with native.instruction_set(isa), poisoned():
        expected = run(drawn, score, case)
        for i, kind in enumerate(KEEP_NUMBERS):
            kinds = [kind] * 4 if i % 2 else [KEEP_NUMBERS[(i + j) % len(KEEP_NUMBERS)] for j in range(4)]
            laid = dict(drawn)
            for tensor, chosen in zip(("q", "k", "v", "upstream"), kinds, strict=True):
                laid[tensor] = LAYOUTS[chosen](drawn[tensor])
                assert torch.equal(laid[tensor], drawn[tensor])
            laid["v"] = laid["k"] if case.shared else laid["v"]
            for mask in {"mask", "padding"} & drawn.keys():
                wide = drawn[mask].transpose(-1, -2).contiguous().transpose(-1, -2)
                laid[mask] = wide if i % 2 else torch.stack([wide, wide.roll(1, -1)], -1).flatten(-2)[..., ::2]
            assert same_bits(run(laid, score, case), expected), kinds


@isas
@scores
def test_stride_zero_changes_no_bit(score: str, isa: str, rng: np.random.Generator) -> None:
    """One sample, head or token shown many times; an upstream gradient that is one number, as from ``sum()``."""
    for name in ("plain", "one query", "one tensor"):
        case = CASES[name]
        drawn = inputs(case, torch.float32, rng)
        for kind in [name for name in LAYOUTS if name not in KEEP_NUMBERS]:
            shown = {n: LAYOUTS[kind](x) if n in ("q", "k", "v") else x for n, x in drawn.items()}
            shown["upstream"] = torch.tensor(0.7).expand_as(drawn["upstream"])
            shown["v"] = shown["k"] if case.shared else shown["v"]
            assert 0 in shown["k"].stride()
            copied = {n: x.contiguous().clone() if n != "v" else x.contiguous() for n, x in shown.items()}
            copied["v"] = copied["k"] if case.shared else copied["v"].clone()
            with native.instruction_set(isa), poisoned():
                assert same_bits(run(shown, score, case), run(copied, score, case)), f"{name} {kind}"


def test_results_can_be_told_apart(rng: np.random.Generator) -> None:
    """The comparison of bits sees a sign of zero, a last bit, a dtype and a shape, and takes NaN for equal to NaN."""
    x = normal(rng, 5, 7)
    x[0, 0] = 0.0
    negated = x.clone()
    negated[0, 0] = -0.0
    last = (bits(x) ^ torch.eye(5, 7, dtype=torch.int32).roll(1, 0)).view(torch.float32)
    assert same_bits([x * torch.nan], [x * torch.nan])
    for other in (negated, last, x.double().to(torch.bfloat16), x[:4]):
        assert not same_bits([x], [other])


# --- what is hidden ---------------------------------------------------------------------------------------------------


@isas
@scores
@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["k and v", "one tensor"])
def test_the_future_does_not_reach_the_past(
    shared: bool, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    """Whatever the later keys hold, earlier rows and their gradients stay as they are."""
    case = Case((1, 2, 1, 139, 139, 16, 16), causal=True, shared=shared)
    quiet = inputs(case, dtype, rng)
    with native.instruction_set(isa), poisoned():
        for now, noise in ((1, 1e30), (67, 100.0), (64, 1e30), (128, torch.nan), (138, torch.inf), (70, 0.0)):
            quiet["upstream"][:, :, now:] = 0  # a loss on the past alone
            expected = run(quiet, score, case)
            loud = {name: x.clone() for name, x in quiet.items()}
            loud["v"] = loud["k"] if shared else loud["v"]
            for name in "kv":
                loud[name][:, :, now:] = loud[name][:, :, now:] * 100 if noise == 100 else noise
            found = run(loud, score, case)
            note = f"{noise} from {now}"
            assert same_bits([found[0][:, :, :now]], [expected[0][:, :, :now]]), note
            assert same_bits([found[1][:, :, :now]], [expected[1][:, :, :now]]), f"gradient of the query, {note}"
            assert expected[0][:, :, now:].any()
            # Numbers that are not finite are taken out of a copy each of key and value: two gradients, then added.
            again = shared and not math.isfinite(noise)
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] if again else 0.0
            for gradient, before in zip(found[2:], expected[2:], strict=True):
                torch.testing.assert_close(gradient[:, :, :now], before[:, :, :now], rtol=tolerance, atol=tolerance)
                assert not gradient[:, :, now:].any(), f"gradient of a later key, {note}"


@isas
@grid((1, 509, 503, 64), (7, 509, 401, 37), (139, 211, 67, 43), (67, 131, 64, 1))
def test_what_lies_outside_the_window_reaches_nothing(
    value: tuple[int, int, int, int], dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    """Rows from some query on, and their gradients, keep their bits whatever the keys before their windows hold."""
    L, S, offset, window = value
    for shared in (False, True):
        case = Case((1, 2, 1, L, S, 16, 16), causal=True, shared=shared, band=(offset, window))
        quiet = inputs(case, dtype, rng)
        for first in {0, L // 2, L - 1}:
            before = max(0, offset + first - window + 1)  # the first key that query `first` sees
            quiet["upstream"][:, :, :first] = 0  # a loss on these rows alone
            with native.instruction_set(isa), poisoned():
                expected = run(quiet, score, case)
                assert expected[0][:, :, first:].any()
                for noise in (0.0, 1e30, torch.nan):
                    loud = {name: x.clone() for name, x in quiet.items()}
                    loud["v"] = loud["k"] if shared else loud["v"]
                    for name in "kv":
                        loud[name][:, :, :before] = noise
                    found = run(loud, score, case)
                    for which in (0, 1):
                        assert same_bits([found[which][:, :, first:]], [expected[which][:, :, first:]]), noise
                    assert not any(gradient[:, :, :before].any() for gradient in found[2:]), noise


@isas
@grid("bool", "-inf", "lowest")
def test_what_padded_keys_hold_does_not_matter(
    value: str, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    how = "-inf" if score == "softmax" and value == "lowest" else value  # to softmax the lowest number is but a bias
    hiding = {"-inf": -torch.inf, "lowest": torch.finfo(torch.float32).min}
    for L in (1, 3, 61):
        case = Case((2, 4, 2, L, 149, 24, 24))
        drawn = inputs(case, dtype, rng)
        present = torch.rand(2, 1, 1, 149) < 0.6
        present[0, ..., 128:], present[1, ..., :67] = False, False
        absent = (~present)[:, :, 0, :, None]
        drawn["padding"] = present if how == "bool" else torch.zeros(2, 1, 1, 149).masked_fill(~present, hiding[how])
        with native.instruction_set(isa), poisoned():
            expected = run(drawn, score, case)
            assert expected[0].any()
            for garbage in (0.0, -3.0, 1e30, torch.nan, -torch.inf):
                loud = {n: x.masked_fill(absent, garbage) if n in "kv" else x for n, x in drawn.items()}
                found = run(loud, score, case)
                assert same_bits(found[:2], expected[:2]), f"{garbage} {L}"
                for gradient, before in zip(found[2:], expected[2:], strict=True):
                    assert same_bits([gradient.masked_fill(absent, 0)], [before.masked_fill(absent, 0)]), garbage
                    assert not gradient[absent.expand_as(gradient)].any(), garbage


@isas
@scores
@dtypes
def test_a_number_that_is_not_finite_stays_with_those_who_see_it(
    dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator
) -> None:
    """NaN in one query is its own row's; NaN in a key or value is its head group's, in its batch element."""
    for L, S in ((67, 131), (1, 601), (5, 601)):
        case = Case((2, 4, 2, L, S, 16, 16))
        drawn = inputs(case, dtype, rng)
        with native.instruction_set(isa), poisoned():
            expected = run(drawn, score, case)[0]
            for name, touched in (("q", np.s_[1, 2, L // 2]), ("k", np.s_[1, 0, S // 2]), ("v", np.s_[0, 1, S - 1])):
                loud = {n: x.clone() for n, x in drawn.items()}
                loud[name][touched] = torch.nan
                found = run(loud, score, case)[0]
                b, n, _ = touched
                where = torch.zeros_like(found, dtype=torch.bool)
                where[touched if name == "q" else np.s_[b, 2 * n : 2 * n + 2]] = True
                assert found[where].isnan().all(), name
                assert same_bits([found.masked_fill(where, 0)], [expected.masked_fill(where, 0)]), name


@isas
@scores
@pytest.mark.parametrize("L", [1, 5, 67])
def test_nothing_but_nan_is_not_nothing(L: int, score: str, isa: str, rng: np.random.Generator) -> None:
    """A row of which all that is visible is NaN is NaN, and not the zero row of one that sees nothing."""
    q, k, v = (normal(rng, 1, 2, n, 8) for n in (L, 601, 601))
    bias = torch.zeros(1, 2, L, 601)
    bias[:, 1, L // 2] = torch.nan
    visible = torch.zeros(1, 1, 1, 601, dtype=torch.bool)
    visible[..., 300] = True
    broken = k.clone()
    broken[:, 1, 300] = torch.nan
    with native.instruction_set(isa), poisoned():
        usual = ba.attention(q, k, v, score=score, impl="native")
        biased = ba.attention(q, k, v, score=score, attn_mask=bias, impl="native")
        alone = ba.attention(q, broken, v, score=score, attn_mask=visible, impl="native")
    assert biased[:, 1, L // 2].isnan().all()
    biased[:, 1, L // 2] = usual[:, 1, L // 2]
    assert_close(biased, usual, tolerance=1e-5)
    assert alone[:, 1].isnan().all()
    assert_close(alone[:, 0], v[:, 0, 300:301].expand(1, L, 8), tolerance=1e-6)


# --- at once, and without traces --------------------------------------------------------------------------------------


@scores
def test_many_threads_at_once(score: str, rng: np.random.Generator) -> None:
    """Python threads share nothing through the kernels: each gets the bits that it would have got alone."""
    work = [(CASES[name], inputs(CASES[name], dtype, rng)) for name in CASES for dtype in DTYPES]

    def one(item: tuple[Case, dict[str, Tensor]]) -> list[Tensor]:
        return run(item[1], score, item[0])

    alone = [one(item) for item in work]
    for count in (1, 2):
        with threads(count), ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                for found, expected in zip(pool.map(one, work), alone, strict=True):
                    assert same_bits(found, expected)


@isas
@any_case
def test_inputs_are_left_alone(value: str, dtype: torch.dtype, score: str, isa: str, rng: np.random.Generator) -> None:
    case = CASES[value]
    drawn = inputs(case, dtype, rng)
    for kind in ("plain", "packed"):
        laid = {n: LAYOUTS[kind](x) if n in ("q", "k", "v", "upstream") else x for n, x in drawn.items()}
        laid["v"] = laid["k"] if case.shared else laid["v"]
        whole = {n: torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()) for n, x in laid.items()}  # gaps included
        before = {n: x.clone() for n, x in whole.items()}
        with native.instruction_set(isa):
            run(laid, score, case)
        for n, x in whole.items():
            unchanged = torch.equal(x, before[n]) if x.dtype == torch.bool else same_bits([x], [before[n]])
            assert unchanged, f"{n} was written to ({kind})"


GUARD = """
import ctypes, itertools, json, mmap, sys
import numpy as np
import torch
import better_attention as ba
from better_attention.impl import native

torch.set_num_threads(1)
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

def guarded(x):
    # The same numbers, the last of them right before (or the first right behind) a page that must not be touched.
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    room = (size + page - 1) // page * page
    memory = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (start, start + page + room):
        assert protect(edge, page, 0) == 0, ctypes.get_errno()
    kept.append(memory)
    at = page if AT == "first" else page + room - size
    inside = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=at).view(x.shape)
    return inside.copy_(x)

rng = np.random.default_rng(5)
normal = lambda *shape: torch.from_numpy(rng.normal(size=shape)).float()
count = 0
for AT, isa, dtype, score in itertools.product(
    json.loads(sys.argv[1]), native.instruction_sets(), (torch.float32, torch.bfloat16), ("softmax", "expressive")
):
    for (L, S, H, W), causal, kind in itertools.product(
        [(5, 7, 3, 5), (37, 67, 16, 17), (67, 131, 59, 31), (1, 509, 64, 64), (6, 257, 8, 1)], (False, True), range(4)
    ):
        q, k, v = (guarded(normal(1, 2, n, w).to(dtype)).requires_grad_() for n, w in ((L, H), (S, H), (S, W)))
        if kind == 3 and H == W:
            v = k
        mask = [None, torch.rand(1, 1, L, S) > 0.4, torch.randn(1, 2, 1, S), torch.randn(L, S).bfloat16()][kind]
        mask = None if mask is None else guarded(mask)
        with native.instruction_set(isa):
            output = ba.attention(q, k, v, score=score, attn_mask=mask, is_causal=causal, impl="native")
            upstream = guarded(normal(1, 2, L, W).to(dtype))
            gradients = torch.autograd.grad(output, [q, k, v] if v is not k else [q, k], upstream)
        assert all(x.isfinite().all() for x in (output, *gradients))
        count += 1
print(json.dumps(count))
"""


@pytest.mark.skipif(os.name != "posix", reason="protects pages by mprotect")
@pytest.mark.parametrize("edges", [["last"], pytest.param(["first"], marks=pytest.mark.slow)], ids=["behind", "before"])
def test_nothing_outside_the_inputs_is_read(edges: list[str]) -> None:
    """Every input ends, or begins, at a page that kills the process that touches it."""
    done = subprocess.run(
        [sys.executable, "-c", GUARD, json.dumps(edges)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    assert json.loads(done.stdout) == len(ISAS) * 4 * 40


MEMORY = """
import json, sys
import torch
import better_attention as ba
from better_attention.bench.machine import extra_memory  # getrusage's peak is inherited from a larger parent

torch.set_num_threads(2)

def train(L, score, causal, masked, shared, dtype):
    q, k, v = (torch.randn(1, 1, L, 16).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.rand(1, 1, 1, L) > 0.2 if masked else None
    output = ba.attention(q, k, k if shared else v, score=score, attn_mask=mask, is_causal=causal, impl="native")
    output.sum().backward()

cases = json.loads(sys.argv[1])
for case in cases:
    train(256, *case[:-1], getattr(torch, case[-1]))
print(json.dumps([extra_memory(lambda: train(8192, *case[:-1], getattr(torch, case[-1]))) for case in cases]))
"""


FLAGS = (False, True)
EVERY = [list(c) for c in itertools.product(SCORES, FLAGS, FLAGS, FLAGS, ("float32", "bfloat16"))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel for the peak of memory")
@pytest.mark.slow
def test_memory_grows_with_the_length_not_its_square() -> None:
    """The peak of the process, since no profiler of torch's sees what the kernels allocate: far below one L x S."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, json.dumps(EVERY)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert max(grown) < 8192 * 8192 // 2, f"{[g >> 20 for g in grown]} MiB more; booleans of L x S would be 64 MiB"
