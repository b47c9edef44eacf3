"""The compiled kernels among torch's machinery: operators, compile, export, autocast, torch.func, layers, processes."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import better_attention as ba
from better_attention.impl import native
from better_attention.layer import fast_path
from better_attention.layer.alignment import Alignment
from better_attention.layer.arguments import Arguments, read
from helpers import TESTS
from helpers.bridge import array, assert_close, assert_within_rounding, plain_module
from helpers.compiler import Programs
from helpers.layers import ALL, CAUSAL, LAYERS, NAMED, layer, padding, refused, tokens
from helpers.native_cases import (
    DTYPES,
    ISAS,
    LAYOUTS,
    SCORES,
    fingerprint,
    needs_native,
    normal,
    poisoned,
    same_bits,
    threads,
)
from helpers.rounding import Align, Rounding, expected_errors

isas = pytest.mark.parametrize("isa", ISAS)
scores = pytest.mark.parametrize("score", SCORES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

B, N, L, S, H = 2, 4, 7, 11, 8


def qkv(*, dtype: torch.dtype = torch.float32, heads: int = N, requires_grad: bool = False) -> list[Tensor]:
    """A query (B, N, L, H), a key and a value (B, heads, S, H)."""
    return [tokens(B, n, s, H, dtype=dtype, requires_grad=requires_grad) for n, s in ((N, L), (heads, S), (heads, S))]


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the helpers of these tests."""
    path = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", path + program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def answer(program: str, **environment: str) -> object:
    """What a program prints as JSON."""
    done = python(program, **environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)


# --- the operators ----------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Remembers every call of an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[object, ...], dict[str, object]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "better_attention":
            self.calls.append((function, arguments, options or {}))
        return function(*arguments, **(options or {}))

    def names(self) -> list[str]:
        return [str(function).split(".")[1] for function, *_ in self.calls]


def check_operators(watch: Operators, leaves: list[Tensor]) -> None:
    """``opcheck`` of every remembered call; the leaves take gradients, as they did."""
    places = {x.data_ptr() for x in leaves}
    for function, *arguments in watch.calls:
        copies: dict[int, Tensor] = {}
        forward = not str(function).split(".")[1].endswith("_backward")

        def copied(x: object, copies: dict[int, Tensor] = copies, forward: bool = forward) -> object:
            if not isinstance(x, Tensor):
                return x
            wanted = forward and x.data_ptr() in places
            return copies.setdefault(id(x), x.detach().clone().requires_grad_(wanted))

        torch.library.opcheck(function, *tree_map(copied, tuple(arguments)))


OPERATOR_CALLS = {
    "plain": {},
    "causal, grouped": {"is_causal": True, "enable_gqa": True},
    "bool mask": {"attn_mask": "bool"},
    "float mask": {"attn_mask": "float", "scale": -0.3},
    "one tensor": {"shared": True},
}
OFTEN = {("softmax", "one tensor"), ("expressive", "float mask")}


@needs_native
@pytest.mark.parametrize(
    ("score", "name"),
    [
        pytest.param(score, name, marks=[] if (score, name) in OFTEN else pytest.mark.slow)
        for score in SCORES
        for name in OPERATOR_CALLS
    ],
)
def test_opcheck(score: str, name: str) -> None:
    options = dict(OPERATOR_CALLS[name])
    q, k, v = qkv(heads=2 if options.get("enable_gqa") else N, requires_grad=True)
    v = k if options.pop("shared", False) else v
    masks = {None: None, "bool": torch.rand(B, 1, L, S) < 0.6, "float": torch.randn(L, S)}
    options["attn_mask"] = masks[options.get("attn_mask")]
    with Operators() as watch:
        output = ba.attention(q, k, v, score=score, impl="native", **options)
        output.sum().backward()
    assert watch.names() == ["native", "native_backward"]
    check_operators(watch, [q, k, v])


@needs_native
@scores
def test_fake_tensors_tell_shape_dtype_and_strides(score: str) -> None:
    for dtype in DTYPES:
        real = qkv(dtype=dtype, requires_grad=True)
        expected = ba.attention(*real, score=score, impl="native")
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x).requires_grad_() for x in real]
            output = ba.attention(*fake, score=score, impl="native")
            gradients = torch.autograd.grad(output.sum(), fake)
        assert output.shape == expected.shape
        assert output.dtype == dtype
        assert output.stride() == expected.stride()
        assert [g.shape for g in gradients] == [x.shape for x in real]


# --- autograd ---------------------------------------------------------------------------------------------------------


@needs_native
@isas
@scores
@pytest.mark.parametrize("shared", [False, True], ids=["k and v", "one tensor"])
def test_any_subset_may_require_a_gradient(shared: bool, score: str, isa: str) -> None:
    q, k, v = qkv()
    upstream = torch.randn(B, N, L, H)
    names = "qk" if shared else "qkv"

    def run(wanted: str) -> dict[str, Tensor | None]:
        leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in zip(names, (q, k, v), strict=False)}
        output = ba.attention(*leaves.values(), *([leaves["k"]] * shared), score=score, impl="native")
        assert output.requires_grad == bool(wanted)
        if wanted:
            output.backward(upstream)
        return {n: x.grad for n, x in leaves.items()} | {"output": output.detach()}

    with native.instruction_set(isa), poisoned():
        full = run(names)
        for wanted in ("", *names, "qk", "kv"[: len(names) - 1], "qv"[: len(names) - 1]):
            found = run(wanted)
            for name, x in found.items():
                if name in wanted or name == "output":
                    assert same_bits([x], [full[name]]), f"{name} of {wanted!r}"
                else:
                    assert x is None, f"{name} of {wanted!r}"


@needs_native
@scores
def test_no_grad_and_inference_mode_give_the_same_bits(score: str) -> None:
    q, k, v = qkv(requires_grad=True)
    expected = ba.attention(q, k, v, score=score, impl="native")
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = ba.attention(q, k, v, score=score, impl="native")
            assert not output.requires_grad
            assert same_bits([output], [expected])
            made_inside = [x.clone() for x in (q, k, v)]
            assert same_bits([ba.attention(*made_inside, score=score, impl="native")], [expected])


@needs_native
@scores
def test_a_graph_is_used_twice_and_freed_once(score: str) -> None:
    q, k, v = qkv(requires_grad=True)
    output = ba.attention(q, k, v, score=score, impl="native")
    first = torch.autograd.grad(output.sum(), (q, k, v), retain_graph=True)
    assert same_bits(torch.autograd.grad(output.sum(), (q, k, v)), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), (q, k, v))


@needs_native
@scores
def test_an_input_changed_before_backward_is_noticed(score: str) -> None:
    q, k, v = qkv(requires_grad=True)
    held = k * 1
    output = ba.attention(q, held, v, score=score, impl="native")
    held.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@needs_native
@scores
def test_a_second_derivative_is_refused_by_name(score: str) -> None:
    q, k, v = qkv(requires_grad=True)
    output = ba.attention(q, k, v, score=score, impl="native")
    (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    refused(lambda: first.square().sum().backward(), "native", "impl='reference'", kind=ValueError)
    with torch.no_grad():
        plain = ba.attention(q, k, v, score=score, impl="reference")
    torch.testing.assert_close(output, plain)


@needs_native
@scores
def test_torch_func(score: str) -> None:
    """grad, vjp, vmap with any dimension in front or shared by all, and both together, as on the plain formula."""
    q, k, v = (tokens(3, B, N, n, H, dtype=torch.float32) for n in (L, S, S))
    mask = torch.rand(L, S) < 0.7
    mask[:, 0] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, impl: str = "native") -> Tensor:
        return ba.attention(q, k, v, score=score, attn_mask=mask, impl=impl)

    def loss(q: Tensor, k: Tensor, v: Tensor, impl: str = "native") -> Tensor:
        return attend(q, k, v, impl).square().sum()

    each = torch.stack([attend(*xs) for xs in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(q, k, v), each)
    torch.testing.assert_close(torch.vmap(attend, in_dims=(1, 1, 1))(*(x.movedim(0, 1) for x in (q, k, v))), each)
    torch.testing.assert_close(torch.vmap(attend, in_dims=(0, 0, 0), out_dims=2)(q, k, v), each.movedim(0, 2))
    expected = torch.stack([attend(x, k[0], v[0]) for x in q])
    torch.testing.assert_close(torch.vmap(attend, in_dims=(0, None, None))(q, k[0], v[0]), expected)
    expected = torch.stack([attend(q[0], k[0], x) for x in v])
    torch.testing.assert_close(torch.vmap(attend, in_dims=(None, None, 0))(q[0], k[0], v), expected)
    for argument in range(3):
        found = torch.func.grad(loss, argument)(q[0], k[0], v[0])
        reference = torch.func.grad(lambda *xs: loss(*xs, impl="reference"), argument)(q[0], k[0], v[0])
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
    per_sample = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v)
    for i in range(3):
        alone = torch.func.grad(loss, (0, 1, 2))(q[i], k[i], v[i])
        torch.testing.assert_close([g[i] for g in per_sample], list(alone))


@needs_native
@scores
def test_torch_func_over_masks_of_their_own(score: str) -> None:
    q, k, v = (tokens(3, N, n, H, dtype=torch.float32) for n in (L, S, S))
    for masks in (torch.rand(3, 1, L, S) < 0.6, torch.randn(3, N, 1, S)):
        attend = lambda q, k, v, m: ba.attention(q, k, v, score=score, attn_mask=m, impl="native")  # noqa: E731
        expected = torch.stack([attend(*xs) for xs in zip(q, k, v, masks, strict=True)])
        torch.testing.assert_close(torch.vmap(attend)(q, k, v, masks), expected)


# --- what is not supported --------------------------------------------------------------------------------------------


def unsupported_calls() -> dict[str, tuple[dict[str, object], tuple[str, ...]]]:
    """A call that the kernels do not compute, and what the reason must speak of."""
    q = torch.ones(1, 2, 3, 4)
    bias = torch.zeros(3, 3, requires_grad=True)
    return {
        "weights": ({"need_weights": True}, ("weights",)),
        "a learned mask": ({"attn_mask": bias}, ("mask",)),
        "float64": ({"query": q.double()}, ("float64",)),
        "float16": ({"query": q.half()}, ("float16",)),
        "meta": ({"query": q.to("meta")}, ("cpu",)),
    }


@needs_native
@scores
@pytest.mark.parametrize("name", unsupported_calls())
def test_every_reason_is_told_and_the_rest_of_the_library_serves(name: str, score: str) -> None:
    options, words = unsupported_calls()[name]
    q = options.pop("query", torch.ones(1, 2, 3, 4))
    reasons = ba.explain(q, q, q, score=score, **options).reasons["native"]
    assert reasons, "no reason, and yet not computed"
    assert all(word in " ".join(reasons).lower() for word in words), reasons
    message = refused(lambda: ba.attention(q, q, q, score=score, impl="native", **options), "native", kind=ValueError)
    assert all(reason in message for reason in reasons)
    assert ba.explain(q, q, q, score=score, impl="native", **options).chosen is None
    assert ba.explain(q, q, q, score=score, **options).chosen not in (None, "native")
    output = ba.attention(q, q, q, score=score, **options)
    assert (output[0] if isinstance(output, tuple) else output).shape == q.shape


@needs_native
def test_nothing_is_said_against_what_is_supported() -> None:
    for dtype in DTYPES:
        q, k, v = qkv(dtype=dtype, heads=2)
        for mask in (None, torch.ones(L, S, dtype=torch.bool), torch.randn(B, N, L, S), torch.randn(1, S).bfloat16()):
            for score in SCORES:
                told = ba.explain(q, k, v, score=score, attn_mask=mask, is_causal=True, enable_gqa=True, impl="native")
                assert told.chosen == "native"
                assert told.reasons["native"] == []


@needs_native
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own formulas
@scores
def test_forward_mode_is_refused_and_auto_falls_back(score: str) -> None:
    q, k, v = qkv()
    tangent = torch.randn_like(q)

    def attend(x: Tensor, impl: str = "auto") -> Tensor:
        return ba.attention(x, k, v, score=score, impl=impl)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tangent)
        reasons = ba.explain(dual, k, v, score=score).reasons["native"]
        assert any("forward" in reason for reason in reasons), reasons
        refused(lambda: attend(dual, "native"), *reasons, kind=ValueError)
        found = forward_ad.unpack_dual(attend(dual)).tangent
    refused(lambda: torch.func.jvp(lambda x: attend(x, "native"), (q,), (tangent,)), "forward", kind=ValueError)
    _, expected = torch.func.jvp(lambda x: attend(x, "reference"), (q,), (tangent,))
    torch.testing.assert_close(found, expected)


@needs_native
@scores
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float16], ids=str)
def test_a_mask_of_another_float_type_is_read_rightly_or_refused(mask_dtype: torch.dtype, score: str) -> None:
    q, k, v = qkv()
    mask = torch.randn(L, S).half().to(mask_dtype)
    mask[:, 3] = torch.finfo(mask_dtype).min
    reasons = ba.explain(q, k, v, score=score, attn_mask=mask, impl="native").reasons["native"]
    if reasons:
        assert str(mask_dtype).removeprefix("torch.") in " ".join(reasons)
        refused(lambda: ba.attention(q, k, v, score=score, attn_mask=mask, impl="native"), *reasons, kind=ValueError)
        return
    output = ba.attention(q, k, v, score=score, attn_mask=mask, impl="native")
    torch.testing.assert_close(output, ba.attention(q, k, v, score=score, attn_mask=mask, impl="reference"))


# --- compile, export, autocast ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LENGTHS = ((5, 7), (3, 11), (11, 2), (13, 4))  # unequal: torch takes sizes that are equal once to be equal always


def check_compiled_function(score: str, backend: str, dynamic: bool | None) -> None:
    """One graph for all lengths, with eager mode's bits.

    Before it comes one for the first lengths alone if ``dynamic`` is left to torch, and else one that torch gives up
    itself, when it finds that the scale, which follows from the width, is to be a plain number.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ba.attention(q, k, v, score=score, attn_mask=mask, is_causal=True, enable_gqa=True, impl="native")

    counter = Programs(backend)
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend=counter)
    for length, keys in LENGTHS:
        shapes = ((3, 4, length, 8), (3, 2, keys, 8), (3, 2, keys, 6))
        leaves = [tokens(*shape, dtype=torch.float32, requires_grad=True) for shape in shapes]
        mask = tokens(3, 1, 1, keys, dtype=torch.float32)
        results = []
        for function in (attend, compiled):
            output = function(*leaves, mask)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        torch.testing.assert_close(results[1], results[0])
        assert same_bits(results[1][:1], results[0][:1])
    assert counter.count <= 2, f"{counter.count} compilations of {len(LENGTHS)} lengths"


@needs_native
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "dynamic", [pytest.param(None, marks=pytest.mark.slow), True], ids=["when it changes", "from the start"]
)
@pytest.mark.parametrize("score", ["expressive", pytest.param("softmax", marks=pytest.mark.slow)])
def test_one_graph_for_every_length(score: str, dynamic: bool | None) -> None:
    check_compiled_function(score, "aot_eager", dynamic)


@needs_native
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@scores
def test_inductor(score: str) -> None:
    check_compiled_function(score, "inductor", dynamic=None)


def step(module: nn.Module, call: nn.Module, x: Tensor, arguments: dict[str, object]) -> list[Tensor]:
    """Output and every gradient of one call of ``module``, through ``call``."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output, _ = call(x, x, x, need_weights=False, **arguments)
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in (x, *module.parameters()))]


@needs_native
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ALL)
def test_layers(name: str) -> None:
    module = layer(name, 16, 2, max_len=13, impl="native")
    counter = Programs("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 3, 11, 13):
        arguments = {"key_padding_mask": padding(2, length), "is_causal": name in CAUSAL}
        x = tokens(2, length, 16, dtype=torch.float32)
        found, expected = (step(module, call, x, arguments) for call in (compiled, module))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.count <= 2


class SelfAttention(nn.Module):
    """What a model does with the layer; one length for query, key and value."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        return output


@needs_native
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "expressive" else pytest.mark.slow) for n in NAMED])
def test_exported_with_free_batch_and_length(name: str) -> None:
    model = SelfAttention(layer(name, 16, 2, max_len=13, impl="native")).eval()
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=13)
    shapes = {"x": {0: batch, 1: length}, "hidden": {0: batch, 1: length}}
    example = (tokens(2, 5, 16, dtype=torch.float32), padding(2, 5))
    program = torch.export.export(model, example, dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert "better_attention.native" in str(program.graph)
    for b, s in ((2, 5), (3, 11), (1, 3), (5, 13)):
        x, hidden = tokens(b, s, 16, dtype=torch.float32), padding(b, s)
        torch.testing.assert_close(loaded(x, hidden), model(x, hidden))


@needs_native
@scores
@pytest.mark.parametrize("shared", [False, True], ids=["k and v", "one tensor"])
def test_autocast_is_bfloat16_given_by_hand(shared: bool, score: str) -> None:
    q, k, v = qkv(requires_grad=True)
    v = k if shared else v
    with torch.autocast("cpu", dtype=torch.bfloat16), Operators() as watch:
        output = ba.attention(q, k, v, score=score, impl="native")
        gradients = torch.autograd.grad(output.float().square().sum(), (q, k))
    assert watch.names() == ["native", "native_backward"]
    assert output.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    halves[2] = halves[1] if shared else halves[2]
    expected = ba.attention(*halves, score=score, impl="native")
    assert same_bits([output], [expected])
    by_hand = torch.autograd.grad(expected.float().square().sum(), halves[:2])
    assert same_bits([g.bfloat16() for g in gradients], by_hand)


# --- layers -----------------------------------------------------------------------------------------------------------

FEW = (
    8  # under a causal mask the loss is on later rows: earlier ones see so few keys that any formula is ill-conditioned
)

LAYER_SIZE = (3, 37, 24)
"""Batch, length and model width."""

LAYER_CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "padded": {"key_padding_mask": "padding"},
    "causal and padded": {"is_causal": True, "key_padding_mask": "padding"},
    "biases": {"attn_mask": "bias"},
}


@needs_native
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, name in enumerate(ALL)
        for j, how in enumerate(LAYER_CALLS)
        if name in CAUSAL or "causal" not in how  # another W_A would leak the future: the layer refuses
    ],
)
def test_layers_agree_with_the_reference(name: str, how: str, rng: np.random.Generator) -> None:
    """Outputs and gradients are those of the float64 layer, within what rounding explains."""
    arguments = dict(LAYER_CALLS[how])
    first = FEW if arguments.get("is_causal") else 0
    batch, length, _ = LAYER_SIZE
    if "key_padding_mask" in arguments:
        arguments["key_padding_mask"] = padding(batch, length, 5)
    if "attn_mask" in arguments:
        arguments["attn_mask"] = torch.randn(length, length)
    for batch_first in (False, True):
        check_layer(rng, name, how, arguments, first, batch_first=batch_first)


def check_layer(
    rng: np.random.Generator, name: str, how: str, arguments: dict[str, Any], first: int, *, batch_first: bool
) -> None:
    """One layer from row ``first`` on, its dimensions in either order."""
    batch, length, width = LAYER_SIZE
    module, double = (
        layer(name, width, 3, max_len=41, impl=impl, spread=0.3, batch_first=batch_first)
        for impl in ("native", "reference")
    )
    double.load_state_dict(module.state_dict())
    double.double()
    shape = (batch, length, width) if batch_first else (length, batch, width)
    x = tokens(*shape, dtype=torch.float32)
    upstream = torch.randn(*shape)
    upstream[(slice(None), slice(first)) if batch_first else slice(first)] = 0
    wide = {k: m.double() if k == "attn_mask" else m for k, m in arguments.items()}
    y, y_wide = x.requires_grad_(), x.detach().double().requires_grad_()

    def results(output: Tensor, inputs: Tensor, layer: nn.Module) -> list[Tensor]:
        gradients = torch.autograd.grad(output, [inputs, *layer.parameters()], upstream.to(output.dtype))
        return [output.transpose(0, int(not batch_first))[:, first:], *gradients]

    with poisoned():
        found = results(module(y, y, y, need_weights=False, **arguments)[0], y, module)
    exact = [array(t) for t in results(double(*[y_wide] * 3, need_weights=False, **wide)[0], y_wide, double)]
    allowed = expected_errors(
        lambda: results(rounded_layer(double, y_wide, wide, Rounding(rng)), y_wide, double), exact
    )
    note = f"{name}, {how}, batch_first={batch_first}"
    assert_within_rounding(found[0], exact[0], allowed[0], note, cap=True)
    names = ["input", *(n for n, _ in module.named_parameters())]
    for parameter, ours, true, error in zip(names, found[1:], exact[1:], allowed[1:], strict=True):
        vacuous = bool(np.abs(true).max() < 1e-9)  # a key bias moves no softmax
        assert_within_rounding(ours, true, error, f"gradient of {parameter}, {note}", vacuous=vacuous)


def rounded_layer(
    module: nn.Module, x: Tensor, arguments: dict[str, Any], rounding: Rounding, first: int = 0
) -> Tensor:
    """Self-attention by a float64 layer with drawn rounding errors, dimensions in its order, from row ``first`` on."""
    x = x if module.batch_first else x.transpose(0, 1)
    output = plain_module(
        module,
        x,
        x,
        x,
        padding=arguments.get("key_padding_mask"),
        bias=arguments.get("attn_mask"),
        causal=arguments.get("is_causal", False),
        align_causal=module.mechanism.aligned and module.align.causal,
        rounding=rounding,
    )
    return output[:, first:] if module.batch_first else output.transpose(0, 1)[first:]


@needs_native
@pytest.mark.parametrize("name", ALL)
def test_layers_in_inference(name: str, rng: np.random.Generator) -> None:
    """Without gradients a layer may go another way, and a small one as a whole: the numbers are right all the same."""
    for batch, length, width, heads, how in (
        (1, 1, 16, 2, "plain"),
        (3, 11, 24, 3, "padded"),
        (64, 64, 32, 4, "plain"),
        (5, 37, 64, 4, "biases"),
        (2, 41, 24, 3, "causal and padded"),
    ):
        arguments = dict(LAYER_CALLS[how])
        if arguments.get("is_causal") and name not in CAUSAL:
            continue
        masks = {"key_padding_mask": padding(batch, length, 3), "attn_mask": torch.randn(length, length)}
        arguments |= {k: masks[k] for k in masks.keys() & arguments.keys()}
        first = FEW if "is_causal" in arguments else 0
        modules = {
            impl: layer(name, width, heads, max_len=67, impl=impl, spread=0.2).eval()
            for impl in ("auto", "native", "reference")
        }
        for twin in modules.values():
            twin.load_state_dict(modules["auto"].state_dict())
        x = tokens(batch, length, width, dtype=torch.float32)
        with torch.inference_mode():
            impls = ("auto", "native")
            found = {i: modules[i](x, x, x, need_weights=False, **arguments)[0][:, first:] for i in impls}
            wide = {k: m.double() if k == "attn_mask" else m for k, m in arguments.items()}
            double = modules["reference"].double()
            exact = array(double(*[x.double()] * 3, need_weights=False, **wide)[0][:, first:])
            draw = partial(rounded_layer, double, x.double(), wide, Rounding(rng), first)
            (allowed,) = expected_errors(lambda draw=draw: [draw()], [exact])
            for impl in impls:
                note = f"{impl} {name} {how} {batch}x{length}x{width}"
                assert_within_rounding(found[impl], exact, allowed, note, cap=True)
                again, _ = modules[impl](x, x, x, need_weights=False, **arguments)
                assert same_bits([again[:, first:]], [found[impl]]), note


@needs_native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_a_small_layer_is_one_call_with_biases_and_without(name: str, bias: bool) -> None:
    options = {"bias": bias, "batch_first": True, "mechanism": name, **ba.Mechanism.of(name).layer_options(5)}
    module, stepwise = (ba.MultiheadAttention(6, 3, impl=impl, **options).eval() for impl in ("auto", "reference"))
    stepwise.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 6)
    with torch.inference_mode():
        output = fast_path.attend(module, read(module, Arguments(x, x, x, None, False, None, True, False)))
        assert output is not None
        torch.testing.assert_close(output, stepwise(x, x, x, need_weights=False)[0])


def draw_layer_call(name: str, rng: np.random.Generator) -> tuple[nn.Module, list[Tensor], dict[str, object]]:
    """A layer of any settings, its inputs in any of torch's forms, and masks."""

    def maybe(p: float = 0.5) -> bool:
        return bool(rng.random() < p)

    heads, head, batch = (int(rng.integers(1, n)) for n in (5, 20, 4))
    length, keys = int(rng.integers(0 if maybe(0.1) else 1, 40)), int(rng.integers(0 if maybe(0.1) else 1, 40))
    width = heads * head
    options: dict[str, object] = {"bias": maybe(0.8), "batch_first": maybe(), "dropout": 0.3 if maybe(0.2) else 0.0}
    options |= {"add_bias_kv": maybe(0.15), "add_zero_attn": maybe(0.15)}
    options["impl"] = "native" if maybe() else "auto"
    if "scale" not in LAYERS[name] and maybe(0.3):
        options["scale"] = float(rng.uniform(-1, 1))
    module = layer(name, width, heads, max_len=max(keys, length) + int(rng.integers(0, 3)), **options).eval()
    own = maybe()
    keys = length if own else keys
    shape = lambda n: (batch, n, width) if options["batch_first"] else (n, batch, width)  # noqa: E731
    query = torch.randn(shape(length))
    key = query if own else torch.randn(shape(keys))
    value = key if maybe() else torch.randn(shape(keys))
    masks: dict[str, object] = {}
    if maybe(0.3):
        masks["key_padding_mask"] = torch.rand(batch, keys) < (1.0 if maybe(0.1) else 0.3)
    if maybe(0.3):
        masks["attn_mask"] = torch.rand(length, keys) < 0.3 if maybe() else torch.randn(batch * heads, length, keys)
    if name in CAUSAL and maybe(0.3):
        masks["is_causal"] = True
    return module, [query, key, value], masks


@needs_native
@pytest.mark.parametrize("count", [25, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_inference_is_the_forward_pass_of_training(name: str, count: int, rng: np.random.Generator) -> None:
    """Whatever way a layer takes without gradients, for any settings, masks and sizes."""
    seen = 0
    for index in range(count):
        module, inputs, masks = draw_layer_call(name, rng)
        if name not in CAUSAL and "attn_mask" in masks and hides_every_later_key(masks["attn_mask"]):
            continue  # what looks causal is refused where W_A would leak
        expected, _ = module(*inputs, need_weights=False, **masks)
        for context in (torch.no_grad, torch.inference_mode):
            with context(), poisoned():
                output, weights = module(*inputs, need_weights=False, **masks)
            assert weights is None
            assert output.stride() == expected.stride(), f"{index} {module}"
            assert_close(output, expected, f"{index} {module} {masks}", tolerance=1e-5, vacuous=True)
        seen += output.numel() > 0
        with torch.no_grad():
            assert module.train()(*inputs, need_weights=False, **masks)[0].isfinite().all()
            if module.dropout and output.numel() > 500 and not masks:
                assert not torch.allclose(module(*inputs, need_weights=False)[0], output), "no dropout in training"
    assert seen > count / 2


def hides_every_later_key(mask: Tensor) -> bool:
    """Whether a mask (True = hide) could be taken for causal."""
    return mask.dtype == torch.bool and bool((mask | torch.ones_like(mask).tril()).all())


class Shifted(nn.Module):
    """Stands in the place of a sub-module, as an adapter would."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        shifted: Tensor = 1.25 * self.module(x) + 0.5
        return shifted


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def interventions(module: nn.Module, child: str) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a layer, one of whose sub-modules was changed from outside in some way."""
    for how in ("hook", "hook before", "replaced", "parametrised", "pruned", "other weight"):
        twin = copy.deepcopy(module)
        inner = getattr(twin, child)
        if how == "hook":
            inner.register_forward_hook(lambda module, inputs, output: 1.5 * output)
        elif how == "hook before":
            inner.register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],))
        elif how == "replaced":
            setattr(twin, child, Shifted(inner))
        elif not hasattr(inner, "weight"):
            continue
        elif how == "parametrised":
            register_parametrization(inner, "weight", Doubled())
        elif how == "pruned":
            l1_unstructured(inner, "weight", 0.5)
        else:
            inner.weight = nn.Parameter(inner.weight.detach().flip(0).mT.contiguous().mT)
        yield how, twin


@needs_native
@pytest.mark.parametrize("name", ["standard", "efficient", "super", "super per head", "expressive"])
def test_inference_goes_through_the_sub_modules(name: str) -> None:
    """What hooks, adapters, parametrisations and pruning do to a sub-module, they do in inference too."""
    module = layer(name, 16, 2, max_len=9, impl="native").eval()
    x = tokens(2, 9, 16, dtype=torch.float32)
    before = module(x, x, x, need_weights=False)[0].detach()
    for child in ("q_proj", "k_proj", "v_proj", "align", "out_proj"):
        for how, twin in interventions(module, child):
            expected, _ = twin(x, x, x, need_weights=False)
            assert not torch.allclose(expected, before, atol=1e-3), f"{how} of {child} does nothing"
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    output, _ = twin(x, x, x, need_weights=False)
                assert_close(output, expected, f"{how} of {child} in {context.__name__}", tolerance=1e-5)


@needs_native
@pytest.mark.parametrize(("name", "tensors"), [("efficient", 2), ("optimised", 3), ("standard", 3), ("super", 3)])
def test_the_efficient_layer_hands_over_one_tensor(name: str, tensors: int) -> None:
    module = layer(name, 16, 2, max_len=19, impl="native")
    for arguments in ({}, {"key_padding_mask": padding(2, 19)}):
        x = tokens(2, 19, 16, dtype=torch.float32, requires_grad=True)
        with Operators() as watch:
            module(x, x, x, need_weights=False, **arguments)[0].sum().backward()
        calls = [arguments for function, arguments, _ in watch.calls if str(function).split(".")[1] == "native"]
        assert len(calls) == 1
        places = {t.data_ptr() for t in calls[0] if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == 19}
        assert len(places) == tensors


@needs_native
@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles(name: str) -> None:
    module = layer(name, 16, 2, max_len=13, impl="native").eval()
    x = tokens(2, 11, 16, dtype=torch.float32)
    expected = module(x, x, x, need_weights=False)[0]
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]  # noqa: S301 - our own bytes
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = layer(name, 16, 2, max_len=13, impl="native").eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (*twins, loaded):
        assert same_bits([twin(x, x, x, need_weights=False)[0]], [expected])
        assert "impl='native'" in repr(twin)


@needs_native
def test_a_layer_that_must_use_the_kernels_says_why_it_cannot() -> None:
    module = layer("standard", 16, 2, impl="native")
    x = tokens(2, 5, 16, dtype=torch.float32)
    refused(lambda: module.eval()(x, x, x, need_weights=True), "native", "weights", kind=ValueError)
    refused(lambda: module.double()(x.double(), x.double(), x.double(), need_weights=False), "float64", kind=ValueError)
    assert module.float()(x, x, x, need_weights=False)[0].isfinite().all()


# --- W_A --------------------------------------------------------------------------------------------------------------


def plain_alignment(
    align: Alignment, value: Tensor, upstream: Tensor, count: int, rounding: Rounding | None = None
) -> list[Tensor]:
    """W_A V + a and its gradients in float64, with drawn rounding errors if asked for."""
    leaves = [x.detach().double().requires_grad_() for x in (value, *align.parameters())]
    length = value.shape[1]
    weight = leaves[1][..., :length, :length]
    weight = weight.tril() if align.causal else weight
    weight = weight if weight.ndim == 3 else weight[None]
    v = leaves[0].unflatten(-1, (count, -1)).transpose(1, 2)
    shift = leaves[2][..., :length] if len(leaves) > 2 else None
    if rounding is not None:
        mixed = Align.apply(weight, v, shift, rounding)
    else:
        mixed = weight @ v if shift is None else weight @ v + shift[..., None]
    output = mixed.transpose(1, 2).flatten(2)
    return [output, *torch.autograd.grad(output, leaves, upstream.double())]


@needs_native
@isas
@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_alignment(heads: str, causal: bool, dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
    """W_A V + a against the plain product: whole and shorter inputs, with and without a bias, in any layout."""
    for length, max_len, batch, count, width, bias, layout in (
        (67, 67, 3, 4, 16, True, "plain"),
        (64, 64, 32, 4, 32, True, "plain"),
        (31, 67, 2, 3, 7, True, "heads inside"),
        (131, 139, 1, 2, 24, False, "packed"),
        (97, 97, 5, 2, 31, True, "every second number"),
        (1, 5, 2, 2, 8, True, "odd offset"),
        (257, 257, 2, 2, 16, False, "features outermost"),
    ):
        note = f"{isa} {dtype} {heads} {causal=} {length} of {max_len}, {layout}"
        align = Alignment(max_len, count, heads=heads, causal=causal, bias=bias, dtype=dtype)
        with torch.no_grad():
            for parameter in align.parameters():
                parameter.copy_(normal(rng, *parameter.shape) / (8 * length) ** 0.5)  # outputs well below 1
            if causal:
                upper = torch.ones(max_len, max_len, dtype=torch.bool).triu(1)
                align.weight.masked_fill_(upper, torch.nan)
        value = LAYOUTS[layout](normal(rng, 1, batch, length, count * width, dtype=dtype) / 2)[0]
        upstream = normal(rng, batch, length, count * width, dtype=dtype)

        with native.instruction_set(isa), poisoned():
            leaf = value.detach().requires_grad_()
            output = align(leaf)
            found = [output, *torch.autograd.grad(output, [leaf, *align.parameters()], upstream)]
        exact = [array(x) for x in plain_alignment(align, value, upstream, count)]
        draw = partial(plain_alignment, align, value, upstream, count, Rounding(rng, dtype))
        allowed = expected_errors(draw, exact)
        for name, ours, true, error in zip(("output", "value", "weight", "bias"), found, exact, allowed, strict=False):
            assert_within_rounding(ours, true, error, f"{name}, {note}", cap=name == "output")
        weight_gradient = found[2]
        assert not weight_gradient[..., length:, :].any()
        assert not weight_gradient[..., length:].any()
        if causal:
            assert not weight_gradient.triu(1).any(), note


@needs_native
@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", ["shared", "per_head"])
@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 5, 6), (0, 0, 6)], ids=str)
def test_alignment_of_nothing(shape: tuple[int, int, int], heads: str, causal: bool, dtype: torch.dtype) -> None:
    align = Alignment(5, 3, heads=heads, causal=causal, dtype=dtype)
    value = torch.ones(shape, dtype=dtype, requires_grad=True)
    with poisoned():
        output = align(value)
        gradients = torch.autograd.grad(output.sum(), [value, *align.parameters()])
        with torch.no_grad():
            assert align(value).shape == shape
    assert output.shape == shape
    assert not any(g.any() for g in gradients)


@needs_native
@dtypes
def test_alignment_to_the_last_bit(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The same for one and two threads, run to run, whatever the later positions hold and wherever they lie."""
    for heads, size in (("shared", 131), ("per_head", 67)):
        align = Alignment(size, 4, heads=heads, causal=True, dtype=dtype)
        value, upstream = (normal(rng, 5, size, 64, dtype=dtype) for _ in range(2))

        def run(value: Tensor, align: Alignment = align, upstream: Tensor = upstream) -> list[Tensor]:
            leaf = value.detach().requires_grad_()
            output = align(leaf)
            return [output.detach(), *torch.autograd.grad(output, [leaf, *align.parameters()], upstream)]

        for isa in ISAS:
            with native.instruction_set(isa), poisoned():
                expected = run(value)
                for count in (1, 2):
                    with threads(count):
                        assert same_bits(run(value), expected), f"{isa} {heads} {count}"
                for kind in ("heads inside", "packed", "odd offset"):
                    assert same_bits(run(LAYOUTS[kind](value[None])[0])[:1], expected[:1]), kind
                for now, noise in ((1, 1e30), (64, 7.0), (50, torch.nan)):
                    loud = value.clone()
                    loud[:, now:] = noise
                    assert same_bits([align(loud)[:, :now]], [expected[0][:, :now]]), f"{isa} {heads} {noise}"


@needs_native
def test_the_compiled_alignment_is_used_somewhere_and_is_a_proper_operator() -> None:
    """Where it is faster is the layer's business; but a kernel that no shape reaches would be tested by nobody."""
    reached = []
    for heads, causal in (("shared", False), ("shared", True), ("per_head", False), ("per_head", True)):
        for batch, size, width in ((64, 64, 64), (32, 257, 256), (2, 97, 32), (1, 512, 64)):
            align = Alignment(size, 4, heads=heads, causal=causal)
            value = tokens(batch, size, width, dtype=torch.float32, requires_grad=True)
            with Operators() as watch:
                align(value).sum().backward()
            if watch.calls:
                assert watch.names()[0] == "align"
                reached.append((batch * size * width, watch, [value, *align.parameters()]))
    assert reached
    _, watch, leaves = min(reached, key=lambda item: item[0])
    check_operators(watch, leaves)


# --- instruction sets -------------------------------------------------------------------------------------------------


@needs_native
def test_instruction_sets_are_known_by_name() -> None:
    assert ISAS
    assert len(set(ISAS)) == len(ISAS)
    assert set(ISAS) <= {"avx512", "avx2", "neon", "portable"}
    assert ISAS[-1] == "portable", "the slowest, and always there"
    order = [name for name in ("avx512", "avx2", "neon", "portable") if name in ISAS]
    assert list(ISAS) == order


@needs_native
def test_an_instruction_set_is_forced_within_the_block_alone() -> None:
    outside = fingerprint()
    digests = {}
    for isa in ISAS:
        with native.instruction_set(isa):
            digests[isa] = fingerprint()
            for other in ISAS:
                with native.instruction_set(other):
                    inner = fingerprint()
                assert other not in digests or inner == digests[other]
            assert fingerprint() == digests[isa], "the inner block lasted beyond its end"
        assert fingerprint() == outside
    if "BETTER_ATTENTION_ISA" not in os.environ:
        assert outside == digests[ISAS[0]], "the fastest is what is used"
    # Other widths add up in another order; were all the same, the name would have chosen nothing.
    assert len(ISAS) == 1 or len(set(digests.values())) > 1
    with pytest.raises(ZeroDivisionError), native.instruction_set("portable"):
        raise ZeroDivisionError
    assert fingerprint() == outside


@needs_native
def test_an_unknown_instruction_set_is_refused() -> None:
    for wrong in ("sse9", "AVX2", "", *({"neon", "avx512"} - set(ISAS))):
        with pytest.raises(ValueError, match="portable") as caught, native.instruction_set(wrong):
            pass
        assert all(repr(isa) in str(caught.value) or isa in str(caught.value) for isa in ISAS)
        assert wrong in str(caught.value)


FINGERPRINT = """
import json, torch
torch.set_num_threads(1)
from helpers import native_cases
print(json.dumps(native_cases.fingerprint()))
"""


@needs_native
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=[] if isa == "portable" else pytest.mark.slow) for isa in ISAS]
)
def test_the_environment_chooses_an_instruction_set(isa: str) -> None:
    with native.instruction_set(isa):
        expected = fingerprint()
    assert answer(FINGERPRINT, BETTER_ATTENTION_ISA=isa) == expected


@needs_native
@pytest.mark.slow
def test_an_unknown_instruction_set_in_the_environment_is_a_clear_error() -> None:
    program = "import torch, better_attention as ba; q = torch.ones(1, 1, 2, 4); ba.attention(q, q, q, impl='native')"
    done = python(program, BETTER_ATTENTION_ISA="sse9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1] + done.stderr
    for word in ("ValueError", "BETTER_ATTENTION_ISA", "sse9", "portable"):
        assert word in last, done.stderr


# --- without the kernels ----------------------------------------------------------------------------------------------

WITHOUT = """
import json, torch
torch.set_num_threads(1)
import better_attention as ba
from better_attention.impl import native

torch.manual_seed(3)
q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (37, 67, 67))
found = {"missing": native.missing(), "why": [], "chosen": [], "refusals": [], "errors": []}
for score in ("softmax", "expressive"):
    told = ba.explain(q, k, v, score=score)
    found["chosen"].append(told.chosen)
    found["why"].append(told.reasons["native"])
    output, plain = (ba.attention(q, k, v, score=score, impl=impl) for impl in ("auto", "reference"))
    output.sum().backward()
    found["errors"].append((output - plain).abs().max().item())
    try:
        ba.attention(q, k, v, score=score, impl="native")
    except ValueError as error:
        found["refusals"].append(str(error))
x = torch.randn(2, 64, 64)
for name in ba.MECHANISMS:
    options = {"max_len": 64} if "super" in name else {}
    layer = ba.MultiheadAttention(64, 4, batch_first=True, mechanism=name, **options)
    twin = ba.MultiheadAttention(64, 4, batch_first=True, mechanism=name, impl="reference", **options)
    twin.load_state_dict(layer.state_dict())
    output, plain = (module(x, x, x, need_weights=False)[0] for module in (layer, twin))
    output.sum().backward()
    found["errors"].append((output - plain).abs().max().item())
print(json.dumps(found))
"""


def check_without_kernels(found: dict[str, list], *words: str) -> None:
    """Why there are no kernels is told, in ``missing()`` and by ``explain``; all else works without them."""
    assert found["missing"]
    for word in words:
        assert word in found["missing"], found["missing"]
    assert all(found["missing"] in " ".join(why) for why in found["why"]), found["why"]
    assert not {None, "native"} & set(found["chosen"])
    assert len(found["refusals"]) == 2
    assert all(found["missing"] in text for text in found["refusals"])
    assert len(found["errors"]) == 2 + len(ba.MECHANISMS)
    assert max(found["errors"]) < 1e-5


def test_switched_off_by_the_environment() -> None:
    check_without_kernels(answer(WITHOUT, BETTER_ATTENTION_NATIVE="0"), "BETTER_ATTENTION_NATIVE")


OTHER_LIBRARIES = {
    "of another interface": "long long ba_abi(void) { return 999; }",
    "without an interface": "int unrelated(void) { return 1; }",
    "without its functions": "long long ba_abi(void) { return 1; }",
}


def damage(library: Path, how: str) -> None:
    """Makes the library what ``how`` says, in place."""
    if how == "absent":
        library.unlink(missing_ok=True)
    elif how == "empty":
        library.write_bytes(b"")
    elif how == "text":
        library.write_text("not a library\n" * 1000)
    elif how == "of another machine":
        image = bytearray(library.read_bytes())
        image[18:20] = (0xF3FE).to_bytes(2, "little")  # e_machine of an ELF header: nobody's
        library.write_bytes(image)
    else:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler (cc) to make another library with")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)],
            input=OTHER_LIBRARIES[how], text=True, check=True,
        )  # fmt: skip


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("how", ["absent", "empty", "text", "of another machine", *OTHER_LIBRARIES])
def test_a_library_that_cannot_be_used(how: str, tmp_path: Path) -> None:
    """A copy of the package with such a library says so, and computes without it."""
    package = tmp_path / "better_attention"
    shutil.copytree(Path(ba.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    libraries = [f for f in (package / "native").iterdir() if f.suffix in (".so", ".dylib", ".dll")]
    if len(libraries) != 1:
        pytest.skip("the library does not lie in the package's folder: an editable installation")
    damage(libraries[0], how)
    found_first = f"""
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, {str(tmp_path)!r})
import better_attention
assert better_attention.__file__.startswith({str(tmp_path)!r}), better_attention.__file__
"""
    check_without_kernels(answer(found_first + WITHOUT))


# --- forked processes -------------------------------------------------------------------------------------------------

FORK = """
import json, os, signal, warnings
import torch
import better_attention as ba

warnings.simplefilter("ignore")  # newer Pythons remark on a fork beside threads, which is the point here
torch.manual_seed(3)
q, k, v = (torch.randn(4, 4, 257, 32, requires_grad=True) for _ in range(3))

def run():
    output = ba.attention(q, k, v, score="expressive", is_causal=True, impl="native")
    one = ba.attention(q[:, :, :1], k, k, impl="native")
    gradients = torch.autograd.grad(output.square().sum() + one.sum(), (q, k, v))
    return [hash(x.detach().contiguous().numpy().tobytes()) for x in (output, one, *gradients)]

torch.set_num_threads(2)
expected = run()
seen = []
for _ in range(3):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is killed, and has written nothing
        torch.set_num_threads(1)
        with torch.no_grad():
            ba.attention(q, k, v, impl="native")
        os.write(writing, json.dumps(run()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        seen.append(pipe.read())
    os.waitpid(child, 0)
    assert run() == expected, "the parent computes on"
print(json.dumps([json.loads(text or "null") == expected for text in seen]))
"""


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_and_does_not_hang() -> None:
    """As the workers of a data loader: forked after the parent used two threads, themselves with one."""
    assert answer(FORK, PYTHONHASHSEED="0") == [True] * 3


@pytest.mark.parametrize("part", ["q_proj", "out_proj"])
@pytest.mark.parametrize("sizes", [(64, 32), (64, 128), (32, 64)], ids=str)
def test_a_map_of_another_width_is_refused_and_not_read_beyond_its_end(part: str, sizes: tuple[int, int]) -> None:
    layer = ba.MultiheadAttention(64, 4, batch_first=True, mechanism="efficient").eval()
    x, cache = torch.randn(2, 5, 64), ba.KVCache(layer, 2)
    with torch.no_grad():
        layer(x, x, x, cache=cache, need_weights=False)
        setattr(layer, part, torch.nn.Linear(*sizes))
        for options in ({}, {"cache": cache}):
            try:
                output, _ = layer(x, x, x, need_weights=False, **options)
            except (ValueError, RuntimeError):
                continue
            # Any width behind the last map is the caller's affair.
            assert (part, output.shape[2]) == ("out_proj", sizes[1])
