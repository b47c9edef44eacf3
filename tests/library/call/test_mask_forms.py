"""Masks in every floating type, every broadcast form and with every meaning: computed without a copy, or refused."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention import scores
from helpers import oracle
from helpers.bridge import array
from helpers.layers import layer, refused, tokens
from helpers.memory import profiled_memory
from helpers.registry import CPU_IMPLS

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
B, N, L, S, H = 2, 2, 5, 40, 4
"""More keys than the length from which SDPA is chosen."""


def biases(dtype: torch.dtype, kind: str) -> Tensor:
    if kind == "zeros":
        return torch.zeros(L, S, dtype=dtype)
    low = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    return tokens(L, S).to(dtype).masked_fill(torch.rand(L, S) < 0.4, low)


IMPLEMENTATIONS = ("auto", *CPU_IMPLS)
KINDS = ["zeros", "-inf", "finfo.min"]
SCORES = tuple(scores.SCORES)


def mask_cells() -> list[Any]:
    """Every pair of types on the way that `auto` takes, the rest of the product spread over them; all of it is slow."""
    pairs = list(itertools.product(FLOATING, FLOATING))
    quick = set()
    for i, pair in enumerate(pairs):
        quick.add((*pair, KINDS[i % 3], "softmax", "auto"))
        quick.add((*pair, KINDS[(i + i // 4) % 3], SCORES[i % len(SCORES)], IMPLEMENTATIONS[i % len(IMPLEMENTATIONS)]))
    return [
        pytest.param(*pair, kind, score, impl, marks=[] if (*pair, kind, score, impl) in quick else [pytest.mark.slow])
        for pair, kind, score, impl in itertools.product(pairs, KINDS, SCORES, IMPLEMENTATIONS)
    ]


@pytest.mark.parametrize(("dtype", "of_mask", "kind", "score", "impl"), mask_cells())
def test_a_mask_of_another_floating_type(
    dtype: torch.dtype, of_mask: torch.dtype, kind: str, score: str, impl: str
) -> None:
    q, k, v = (tokens(B, N, n, H, dtype=dtype) for n in (L, S, S))
    mask = biases(of_mask, kind)
    lowest = mask <= torch.finfo(of_mask).min
    expected, _ = oracle.attention(
        *(array(x) for x in (q, k, v)),
        score=score,
        keep=np.broadcast_to(~lowest.numpy(), (B, N, L, S)),
        bias=np.broadcast_to(array(mask.masked_fill(lowest, 0.0)), (B, N, L, S)),
    )
    try:
        found = ba.attention(q, k, v, score=score, attn_mask=mask, impl=impl)
    except ValueError as error:
        assert impl not in ("auto", "reference", "chunked"), error  # noqa: PT017 - the others may refuse, saying why
        assert "cannot compute" in str(error)  # noqa: PT017
        return
    np.testing.assert_allclose(array(found), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "of_mask", "kind"),
    [
        (dtype, of_mask, KINDS[(i + j) % 3])
        for i, dtype in enumerate((torch.float64, torch.float32))
        for j, of_mask in enumerate(FLOATING)
    ],
)
def test_a_mask_of_another_floating_type_in_the_layer(dtype: torch.dtype, of_mask: torch.dtype, kind: str) -> None:
    module = layer("standard", 8, 2).to(dtype)
    x, memory = tokens(B, L, 8, dtype=dtype), tokens(B, S, 8, dtype=dtype)
    mask = biases(of_mask, kind)
    same = mask.double().masked_fill(mask <= torch.finfo(of_mask).min, -torch.inf)
    expected, _ = copy.deepcopy(module).double()(x.double(), memory.double(), memory.double(), attn_mask=same)
    for options in ({"attn_mask": mask}, {"attn_mask": mask, "key_padding_mask": torch.zeros(B, S, dtype=of_mask)}):
        found, _ = module(x, memory, memory, need_weights=False, **options)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("lead", [(2, 3, 4), (2, 1, 4), (2, 3, 2, 2)])
def test_a_mask_may_be_broadcast_over_any_dimensions(lead: tuple[int, ...]) -> None:
    q, k, v = (tokens(*lead, n, H) for n in (3, 4, 4))
    for shape in itertools.product(*((1, size) for size in lead)):
        mask = tokens(*shape, 3, 4)
        weights = torch.softmax(q @ k.mT / H**0.5 + mask, -1)
        found, found_weights = ba.attention(q, k, v, attn_mask=mask, need_weights=True)
        torch.testing.assert_close(found_weights, weights)
        torch.testing.assert_close(found, weights @ v)
        grouped = ba.attention(q, k[..., :1, :, :], v[..., :1, :, :], attn_mask=mask, enable_gqa=True)
        weights = torch.softmax(q @ k[..., :1, :, :].mT / H**0.5 + mask, -1)
        torch.testing.assert_close(grouped, weights @ v[..., :1, :, :])


@pytest.mark.parametrize("shape", [(1, 4, 1), (6, 1, 1), (6, 1, 2), (1, 4, 2), "expanded"])
def test_a_broadcast_mask_is_not_copied(shape: tuple[int, ...] | str) -> None:
    length = 256
    q = tokens(6, 4, 2, length, 8, dtype=torch.float32)
    whole = torch.zeros(1, 4, 1, length, length).expand(6, 4, 2, -1, -1)
    mask = whole if isinstance(shape, str) else torch.zeros(*shape, length, length)
    with profiled_memory() as measured:
        ba.attention(q, q, q, attn_mask=mask)
    assert measured["peak"] < 4 * whole.numel() / 4, "a quarter of the mask written out"


@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_an_expanded_mask_is_not_copied_by_the_layer(dtype: torch.dtype, options: dict[str, object]) -> None:
    length, heads = 256, 8
    module = layer("standard", 16, heads, **options).float()
    x = tokens(6, length, 16, dtype=torch.float32)
    mask = torch.zeros(1, length, length, dtype=dtype).expand(6 * heads, -1, -1)
    with profiled_memory() as measured, torch.no_grad():
        module(x, x, x, attn_mask=mask, need_weights=False)
    assert measured["peak"] < mask.numel() * mask.element_size() / 4


@pytest.mark.parametrize("start", [torch.ones(3, 3), torch.eye(3), torch.ones(3, 3).tril()])
def test_what_requires_a_gradient_is_a_bias(start: Tensor) -> None:
    bias = torch.nn.Parameter(start)
    q = tokens(1, 2, 3, 4, dtype=torch.float32)
    module = layer("standard", 4, 2).float()
    for call in (
        lambda mask: ba.attention(q, q, q, attn_mask=mask),
        lambda mask: module(q[0], q[0], q[0], attn_mask=mask, need_weights=False)[0],
    ):
        refused(lambda call=call: call(start), "0 and 1", "mask - 1.0")
        bias.grad = None
        found = call(bias)
        found.square().sum().backward()
        assert bias.grad is not None
        torch.testing.assert_close(call(start - 1.0), found.detach())  # the way that the message names


def test_a_mask_of_zeros_and_ones_is_told_both_ways_out() -> None:
    q = tokens(1, 2, 3, 4, dtype=torch.float32)
    ones = torch.ones(3, 3).tril()
    module = layer("standard", 4, 2).float()
    for written in (ones, ones.long()):
        refused(lambda m=written: ba.attention(q, q, q, attn_mask=m), "1 means attend, pass mask.bool()", "mask == 0")
        refused(lambda m=written: module(q[0], q[0], q[0], attn_mask=m), "1 means attend, as in torch.ones(L, S).tril(), mask == 0")  # fmt: skip # noqa: E501
    found, _ = module(q[0], q[0], q[0], attn_mask=ones == 0)
    torch.testing.assert_close(found, module(q[0], q[0], q[0], is_causal=True)[0])


@pytest.mark.parametrize("heads", [1, 2])
def test_a_mask_of_four_dimensions_is_told_its_meaning(heads: int) -> None:
    module, x = layer("standard", 4, 2).float(), tokens(3, 5, 4, dtype=torch.float32)
    host = torch.ones(3, heads, 5, 5, dtype=torch.bool).tril()
    message = refused(lambda: module(x, x, x, attn_mask=host), "True = hide", "True = attend")
    advice = message.split("pass ")[-1].rstrip(".")
    followed = (~host).expand(3, 2, 5, 5).flatten(0, 1)
    assert advice == "(~mask).expand(3, 2, 5, 5).flatten(0, 1)"
    torch.testing.assert_close(module(x, x, x, attn_mask=followed)[0], module(x, x, x, is_causal=True)[0])


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "key_padding_mask"])
def test_sparse_tensors_are_refused_by_name(name: str) -> None:
    x = tokens(2, 2, 4, dtype=torch.float32)
    given = {"query": x, "key": x, "value": x}
    given[name] = (torch.eye(2) if "mask" in name else x).to_sparse()
    refused(lambda: layer("standard", 4, 2).float()(**given), name, "sparse", "to_dense")
    if name != "key_padding_mask":
        refused(lambda: ba.attention(**given), name, "sparse", "to_dense")


def test_an_explanation_can_be_copied_and_pickled() -> None:
    x = tokens(1, 1, 3, 4)
    explanation = ba.explain(x, x, x)
    for other in (copy.copy(explanation), copy.deepcopy(explanation), pickle.loads(pickle.dumps(explanation))):  # noqa: S301
        assert other == explanation
        assert str(other) == str(explanation)
