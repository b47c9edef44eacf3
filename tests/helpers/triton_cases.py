"""Checks of the GPU kernels in Triton's interpreter: ``python -m helpers.triton_cases NAME ...`` prints JSON.

The interpreter is chosen when Triton is imported, by ``TRITON_INTERPRET=1``, so that these run in a process of their
own (``tests/library/gpu/test_interpreted.py``). Every check is a function; one that fails raises. Sizes are small
primes: in the interpreter tiles are 16 x 16, and one takes milliseconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.dropout import batch_share
from better_attention.gpu import launches, toolchain
from better_attention.impl import native, triton
from helpers.native_cases import Case, Mask, bits, check_results, normal, problem

SCORES = ("softmax", "expressive")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

SMALL = (1, 2, 1, 17, 19, 13, 11)
"""B, N, G, L, S, H, W: grouped heads, two tiles of queries and two of keys, widths that are no power of two."""

CASES: dict[str, tuple[Case, torch.dtype]] = {
    "plain": (Case(SMALL), F32),
    "causal": (Case((1, 1, 1, 37, 37, 17, 16), causal=True), F32),
    "causal and shared": (Case((2, 2, 1, 19, 19, 16, 16), causal=True, shared=True), F32),
    "window": (Case((1, 1, 1, 37, 53, 7, 19), causal=True, band=(11, 17)), F32),
    "narrow window": (Case((1, 1, 1, 37, 41, 7, 5), causal=True, band=(3, 5)), F32),
    "bool mask": (Case(SMALL, mask=Mask("bool", "1NLS", "rows")), F32),
    "additive mask": (Case(SMALL, mask=Mask("float32", "BNLS", "rows")), F32),
    "padding and triangle": (Case((2, 1, 1, 19, 23, 13, 11), padding=Mask("bool", "B11S"), causal=True), F32),
    "float16": (Case(SMALL), F16),
    "float16, biased": (Case(SMALL, mask=Mask("float16", "1NLS")), F16),
    "few queries": (Case((1, 2, 1, 2, 263, 13, 11)), F32),
    "few queries of one tensor": (Case((1, 2, 1, 2, 263, 16, 16), shared=True, causal=True, band=(261, None)), F32),
}
"""The features, one by one; in the unit tier with one score each."""

MORE_CASES: dict[str, tuple[Case, torch.dtype]] = {
    "wide": (Case((1, 1, 1, 19, 23, 113, 131)), F32),
    "as wide as can be": (Case((1, 1, 1, 17, 19, 256, 256), causal=True), F32),
    "narrowest": (Case((1, 2, 2, 19, 23, 1, 1)), F32),
    "expanded bool mask": (Case(SMALL, mask=Mask("bool", "BNLS", "some", "expanded")), F32),
    "mask in another order": (Case(SMALL, mask=Mask("bool", "1NLS", "some", "transposed")), F32),
    "mask of keys alone": (Case(SMALL, mask=Mask("bool", "B11S")), F32),
    "mask of heads": (Case((1, 4, 2, 2, 293, 13, 11), mask=Mask("bool", "1N1S")), F32),
    "lowest number as padding": (Case(SMALL, padding=Mask("float32", "B11S", lowest=True)), F32),
    "bfloat16 mask": (Case(SMALL, mask=Mask("bfloat16", "11LS")), F32),
    "everything hidden": (Case(SMALL, mask=Mask("bool", "1NLS", "all")), F32),
    "all but one": (Case(SMALL, mask=Mask("bool", "1NLS", "all but one")), F32),
    "additive mask, triangle and padding": (
        Case((2, 2, 1, 19, 23, 13, 11), mask=Mask("float32", "1NLS"), padding=Mask("bool", "B11S"), causal=True), F32,
    ),
    "window and padding of a shared tensor": (
        Case((2, 4, 2, 37, 41, 8, 8), padding=Mask("bool", "B11S"), causal=True, band=(4, 9), shared=True), F32,
    ),
    "longer than the keys": (Case((1, 1, 1, 41, 17, 13, 11), causal=True), F32),
    "packed projections": (Case((2, 2, 2, 19, 19, 13, 13), layouts=("packed", "packed", "packed")), F32),
    "features outermost": (Case(SMALL, layouts=("features outermost", "plain", "every second number")), F32),
    "one key head for all": (Case((1, 5, 1, 17, 19, 11, 11), causal=True), F32),
    "bfloat16": (Case(SMALL), BF16),
    "bfloat16, shared and causal": (Case((1, 2, 1, 19, 19, 16, 16), shared=True, causal=True), BF16),
    "float16, shared and causal": (Case((1, 2, 1, 19, 19, 16, 16), shared=True, causal=True), F16),
    "few queries, biased": (Case((1, 2, 1, 3, 293, 13, 11), mask=Mask("float32", "1NLS")), F32),
    "few queries, padded": (Case((2, 2, 2, 1, 293, 13, 11), padding=Mask("bool", "B11S")), F32),
    "few queries in a window": (Case((1, 2, 1, 3, 293, 13, 11), causal=True, band=(280, 270)), F32),
    "few queries in float16": (Case((1, 2, 1, 3, 293, 13, 11)), F16),
    "one query": (Case((1, 1, 1, 1, 5, 13, 11)), F32),
}  # fmt: skip
"""What is left, in the slow tier."""


def agrees_with_the_oracle(case: Case, dtype: torch.dtype, score: str) -> None:
    """Output and gradients are within what rounding explains. bfloat16 is computed as float32, and rounded last."""
    inner = F32 if dtype == BF16 else dtype
    check_results(triton.compute, problem(case, score, dtype, inner), f"triton {score} {dtype} {case}")


# --- dropout ----------------------------------------------------------------------------------------------------------


def _results(impl: str, leaves: list[Tensor], upstream: Tensor, seed: int, **options: Any) -> list[Tensor]:
    torch.default_generator.manual_seed(seed)
    output = ba.attention(leaves[0], leaves[1], leaves[-1], impl=impl, **options)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


def drops_what_the_cpu_drops(score: str, shared: bool) -> None:
    """The same seed drops the same weights as in the compiled kernels, forward and backward."""
    if native.missing():
        return
    rng = np.random.default_rng(7)
    q, k = normal(rng, 2, 2, 19, 11), normal(rng, 2, 1, 23, 11)
    # With unit vectors for values, the output is the weights after dropout.
    v = torch.eye(23).expand(2, 1, 23, 23)
    leaves = [x.clone().requires_grad_() for x in ([q, k] if shared else [q, k, v])]
    upstream = normal(rng, 2, 2, 19, 11 if shared else 23)
    options = {"score": score, "dropout_p": 0.37, "enable_gqa": True, "is_causal": shared}
    ours = _results("triton", leaves, upstream, 5, **options)
    theirs = _results("native", leaves, upstream, 5, **options)
    other = _results("triton", leaves, upstream, 6, **options)
    if not shared:
        dropped = (ours[0] == 0).float().mean()
        assert 0.3 < dropped < 0.44, dropped
        assert torch.equal(ours[0] == 0, theirs[0] == 0), "another weight was dropped"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    assert not torch.equal(ours[0], other[0]), "the seed makes no difference"


def drops_by_sample() -> None:
    """A process with a part of the batch drops of its samples what one process with all of them drops."""
    q = normal(np.random.default_rng(7), 3, 1, 17, 8)
    options = {"score": "expressive", "dropout_p": 0.4, "impl": "triton"}
    torch.default_generator.manual_seed(5)
    whole = ba.attention(q, q, q, **options)
    for rank in range(2):
        torch.default_generator.manual_seed(5)
        with batch_share(rank, 2):
            part = ba.attention(*(q[rank::2],) * 3, **options)
        assert torch.equal(part, whole[rank::2])


def drops_everything() -> None:
    q = normal(np.random.default_rng(7), 1, 1, 5, 8).requires_grad_()
    output = ba.attention(q, q, q, score="expressive", dropout_p=1.0, impl="triton")
    assert not output.any()
    assert not torch.autograd.grad(output.sum(), q)[0].any()


# --- special rows -----------------------------------------------------------------------------------------------------


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def rows_without_weight_are_zero(dtype: torch.dtype) -> None:
    """A zero query, a query orthogonal to every key, and a query whose keys are all hidden."""
    rng = np.random.default_rng(11)
    q, k, v = (normal(rng, 1, 1, n, 8, dtype=dtype) for n in (5, 19, 19))
    k[..., 0] = 0
    q[0, 0, 1] = 0
    q[0, 0, 3] = 0
    q[0, 0, 3, 0] = 2
    shown = torch.ones(5, 19, dtype=torch.bool)
    shown[4] = False
    leaves = _leaves(q, k, v)
    output = ba.attention(*leaves, attn_mask=shown, score="expressive", impl="triton")
    assert not output[0, 0, [1, 3, 4]].any()
    assert output[0, 0, [0, 2]].any()
    gradients = torch.autograd.grad(output.float().square().sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][0, 0, [1, 4]].any()


def an_orthogonal_key_counts_for_nothing() -> None:
    """What lies in the value of a key with z = 0 reaches no output, and a sign makes no difference."""
    rng = np.random.default_rng(13)
    q, k, v = (normal(rng, 1, 1, n, 8) for n in (5, 19, 19))
    k[0, 0, 7] = 0
    output = ba.attention(q, k, v, score="expressive", impl="triton")
    v[0, 0, 7] += 1000
    assert torch.equal(output, ba.attention(q, k, v, score="expressive", impl="triton"))
    assert torch.equal(output, ba.attention(-q, k, v, score="expressive", impl="triton"))


def one_key_with_all_the_weight_has_no_slope(score: str) -> None:
    """The gradients of query and key are exactly 0 there."""
    rng = np.random.default_rng(17)
    leaves = _leaves(*(normal(rng, 1, 1, n, 8) * 1e-3 for n in (1, 1, 1)))
    output = ba.attention(*leaves, score=score, impl="triton")
    dq, dk, dv = torch.autograd.grad(output, leaves, normal(rng, 1, 1, 1, 8))
    assert not dq.any()
    assert not dk.any()
    assert dv.any()


def small_scores_keep_their_digits(scale: float, dtype: torch.dtype, biased: bool) -> None:
    """Scores that are all small have weights z^2, whatever their size: the output does not depend on the scale."""
    rng = np.random.default_rng(19)
    q, k, v = (normal(rng, 1, 2, n, 13, dtype=dtype) for n in (19, 23, 23))
    bias = normal(rng, 1, 1, 19, 23) if biased else None
    leaves, others = _leaves(q, k, v), [x.double().requires_grad_() for x in (q, k, v)]
    upstream = normal(rng, 1, 2, 19, 13, dtype=dtype)
    output = ba.attention(*leaves, attn_mask=bias, score="expressive", scale=scale, impl="triton")
    exact = ba.attention(
        *others, attn_mask=None if bias is None else bias.double(), score="expressive", scale=scale, impl="reference"
    )
    tolerance = 2e-5 if dtype == F32 else 4e-3
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=tolerance * float(exact.detach().abs().max()))
    ours = torch.autograd.grad(output, leaves, upstream)
    for a, b in zip(ours, torch.autograd.grad(exact, others, upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=10 * tolerance * float(b.abs().max()))


def large_scores_do_not_overflow() -> None:
    """Squares beyond float32 leave the weights that they have, 1 each, and no slope."""
    rng = np.random.default_rng(31)
    q, k, v = (normal(rng, 1, 1, n, 13) for n in (19, 23, 23))
    leaves = _leaves(q * 1e12, k * 1e12, v)
    output = ba.attention(*leaves, score="expressive", impl="triton")
    torch.testing.assert_close(output, v.mean(2, keepdim=True).expand_as(output), rtol=1e-5, atol=1e-5)
    dq, dk, dv = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert not dq.any()
    assert not dk.any()
    torch.testing.assert_close(dv, torch.full_like(dv, 19 / 23), rtol=1e-5, atol=1e-5)


# --- torch around it --------------------------------------------------------------------------------------------------


def the_same_call_gives_the_same_bits() -> None:
    rng = np.random.default_rng(23)
    leaves = _leaves(*(normal(rng, 1, 2, 19, 13) for _ in range(3)))
    runs = [_results("triton", leaves, torch.ones(1, 2, 19, 13), 3, score="expressive", is_causal=True) for _ in "ab"]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*runs, strict=True))


def descriptors_change_no_bit() -> None:
    """Tiles that are copied by descriptor, as on Hopper, are those that are read by address."""
    rng = np.random.default_rng(29)
    q, k, v = (normal(rng, 1, 2, n, 12).transpose(1, 2).contiguous().transpose(1, 2) for n in (37, 41, 41))
    p = launches.Problem(q, k, v, None, None, None, True, 4, 23, "expressive", 0.3, 0.0)
    results = []
    for descriptors in (False, True):
        target = toolchain.Target(toolchain.INTERPRETER, 0, 4, descriptors)
        out, stats = launches.forward(p, target)
        used = [launch.constants.get("TMA") for launch in launches.forward_launches(p, out, stats, target)]
        assert used[0] is descriptors
        results.append((out, *launches.backward(torch.ones_like(out), p, out, stats, target)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def the_operator_is_registered_completely() -> None:
    """Its schema, and the shapes and strides that compilers are promised."""
    q = torch.randn(1, 2, 5, 8)
    for score in SCORES:
        arguments = (q, q.clone(), None, None, None, None, False, 0, None, score, 0.5, 0.0)
        torch.library.opcheck(
            torch.ops.better_attention.triton.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def vmap_calls_it_once() -> None:
    q = torch.randn(3, 1, 2, 5, 8)
    found = torch.vmap(lambda x: ba.attention(x, x, x, score="expressive", impl="triton"))(q)
    torch.testing.assert_close(found, torch.stack([ba.attention(x, x, x, score="expressive") for x in q]))


def second_derivatives_are_refused() -> None:
    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    output = ba.attention(q, q, q, score="expressive", impl="triton")
    (gradient,) = torch.autograd.grad(output.sum(), q, create_graph=True)
    with pytest.raises(ValueError, match="impl='reference'"):
        torch.autograd.grad(gradient.sum(), q)


def empty_calls_are_zero() -> None:
    for L, S in ((0, 3), (3, 0)):
        leaves = _leaves(torch.randn(1, 1, L, 8), torch.randn(1, 1, S, 8), torch.randn(1, 1, S, 8))
        output = ba.attention(*leaves, score="expressive", impl="triton")
        assert output.shape == (1, 1, L, 8)
        assert not output.any()
        assert all(not x.any() for x in torch.autograd.grad(output.sum(), leaves))


def nobody_gets_the_interpreter_unasked() -> None:
    """It can compute the call here, and ``impl="auto"`` leaves it."""
    q = torch.randn(1, 1, 600, 8, dtype=F16)
    assert ba.explain(q, q, q, score="expressive", impl="triton").chosen == "triton"
    assert ba.explain(q, q, q, score="expressive").chosen not in ("triton", "flex")


def a_hidden_value_that_is_not_finite_stays_hidden() -> None:
    q = torch.randn(1, 1, 19, 8)
    v = q.clone()
    v[0, 0, 17] = torch.nan
    output = ba.attention(q, q, v, score="expressive", is_causal=True, impl="triton")
    assert output[0, 0, :17].isfinite().all()
    assert output[0, 0, 17:].isnan().all()


def _agreements(cases: dict[str, tuple[Case, torch.dtype]]) -> dict[str, Callable[[], None]]:
    """Every case with every score."""
    return {
        f"{name}, {score}": partial(agrees_with_the_oracle, *case, score)
        for name, case in cases.items()
        for score in SCORES
    }


QUICK_SCORE = {name: SCORES[1 - i % 2] for i, name in enumerate(CASES)}
"""Of each case, the score that it has in the unit tier: in turns."""

CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"{name}, {QUICK_SCORE[name]}": partial(agrees_with_the_oracle, *case, QUICK_SCORE[name])
        for name, case in CASES.items()
    },
    "dropout, expressive": partial(drops_what_the_cpu_drops, "expressive", False),
    "rows without weight": partial(rows_without_weight_are_zero, F32),
    "one key, expressive": partial(one_key_with_all_the_weight_has_no_slope, "expressive"),
    "small scores": partial(small_scores_keep_their_digits, 1e-13, F32, False),
    "second derivative": second_derivatives_are_refused,
    "empty": empty_calls_are_zero,
    "choice": nobody_gets_the_interpreter_unasked,
}
"""The unit tier."""

MORE_CHECKS: dict[str, Callable[[], None]] = {
    **{name: check for name, check in _agreements(CASES | MORE_CASES).items() if name not in CHECKS},
    "dropout, softmax": partial(drops_what_the_cpu_drops, "softmax", False),
    **{f"dropout of one tensor, {score}": partial(drops_what_the_cpu_drops, score, True) for score in SCORES},
    "dropout by sample": drops_by_sample,
    "everything dropped": drops_everything,
    "rows without weight in float16": partial(rows_without_weight_are_zero, F16),
    "orthogonal key": an_orthogonal_key_counts_for_nothing,
    "one key, softmax": partial(one_key_with_all_the_weight_has_no_slope, "softmax"),
    "small scores in float16": partial(small_scores_keep_their_digits, 1e-5, F16, False),
    "small scores with a bias": partial(small_scores_keep_their_digits, 1e-13, F32, True),
    "large scores": large_scores_do_not_overflow,
    "descriptors": descriptors_change_no_bit,
    "operator": the_operator_is_registered_completely,
    "same bits": the_same_call_gives_the_same_bits,
    "vmap": vmap_calls_it_once,
    "not finite": a_hidden_value_that_is_not_finite_stays_hidden,
}
"""The slow tier."""


def main(names: list[str]) -> None:
    """Run checks; print their failures by name, and the seconds they took."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    failures, seconds = {}, {}
    for name in names:
        start = time.process_time()
        torch.default_generator.manual_seed(len(name))
        try:
            (CHECKS | MORE_CHECKS)[name]()
        except Exception:
            failures[name] = traceback.format_exc()
        seconds[name] = round(time.process_time() - start, 2)
    print(json.dumps({"failures": failures, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1:])
