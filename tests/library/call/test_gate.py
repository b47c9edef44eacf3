"""What reaches code that reads memory by address: every kind of tensor, in every place, under every machinery.

A kind of tensor or a machinery is one row of a table; each is held to the plain formula in float64 on ordinary tensors.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import better_attention as ba
from better_attention.native.library import missing
from better_attention.scores import SCORES
from helpers.layers import padding

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # comparisons of sizes, as in torch's own layer
]


class Tagged(Tensor):
    """A subclass without rules of its own."""


# --- kinds of tensors -------------------------------------------------------------------------------------------------


def negated(x: Tensor) -> Tensor:
    """``x`` behind torch's lazy negation."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def without_memory(x: Tensor) -> Tensor:
    """Zeros that exist as a promise only."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def of_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@dataclass(frozen=True)
class Kind:
    """A kind of tensor: how one is made of ordinary values, and whether it holds these or zeros."""

    make: Callable[[Tensor], Tensor]
    zeros: bool = False

    def values(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.zeros else x


KINDS = {
    "ordinary": Kind(lambda x: x),
    "parameter": Kind(lambda x: nn.Parameter(x, requires_grad=False)),
    "transposed": Kind(lambda x: x.mT.contiguous().mT),
    "every second": Kind(lambda x: torch.stack([x, x + 1], dim=-1)[..., 0]),
    "negated": Kind(negated),
    "zero without memory": Kind(without_memory, zeros=True),
    "of inference": Kind(of_inference),
    "shared memory": Kind(lambda x: x.clone().share_memory_()),
    "subclass": Kind(lambda x: x.as_subclass(Tagged)),
}


def trains(kind: str) -> bool:
    """Whether torch itself keeps such a tensor for a backward pass."""
    return kind != "of inference"


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to float32 accuracy; a value that was never written is not."""
    got = got.as_subclass(Tensor) if isinstance(got, Tagged) else got
    got, expected = got.detach().double(), expected.detach().double()
    largest = max(1.0, float(expected.abs().amax())) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * largest)


B, N, L, S, H = 4, 8, 17, 19, 8


def inputs() -> dict[str, Tensor]:
    """Arguments of ``attention`` for which the compiled kernels are chosen."""
    q, k, v = (torch.randn(B, N, length, H) for length in (L, S, S))
    return {"query": q, "key": k, "value": v, "attn_mask": torch.randn(B, N, L, S)}


def test_the_kernels_are_what_is_tested() -> None:
    if missing() is not None:
        pytest.skip(f"the compiled kernels are missing: {missing()}")
    for score in SCORES:
        assert ba.explain(**inputs(), score=score).chosen == "native"


@pytest.mark.parametrize("argument", ["query", "key", "value", "attn_mask"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("kind", "training"), [(k, t) for k in KINDS for t in (False, True) if trains(k) or not t])
def test_a_kind_in_each_argument_of_the_function(kind: str, score: str, argument: str, training: bool) -> None:
    given = inputs()
    plain = {n: KINDS[kind].values(x) if n == argument else x for n, x in given.items()}
    special = {n: KINDS[kind].make(x) if n == argument else x for n, x in given.items()}
    other = "value" if argument == "query" else "query"
    if training:
        special[other] = special[other].clone().requires_grad_()
        plain[other] = plain[other].clone().requires_grad_()
    expected = ba.attention(**{n: x.double() for n, x in plain.items()}, score=score, impl="reference")
    got = ba.attention(**special, score=score)
    close(got, expected)
    if training:
        weights = torch.randn(got.shape)
        (gradient,) = torch.autograd.grad((got * weights).sum(), special[other])
        (right,) = torch.autograd.grad((expected * weights.double()).sum(), plain[other])
        close(gradient, right)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("parameter", "subclass")])
def test_a_kind_as_the_incoming_gradient(kind: str, score: str) -> None:
    q, k, v, mask = (x.requires_grad_(n != "attn_mask") for n, x in inputs().items())
    gradient = torch.randn(B, N, L, H)
    got = torch.autograd.grad(
        ba.attention(q, k, v, attn_mask=mask, score=score),
        (q, k, v),
        KINDS[kind].make(gradient),
        materialize_grads=True,
    )
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    output = ba.attention(*wide, attn_mask=mask.double(), score=score, impl="reference")
    for a, b in zip(got, torch.autograd.grad(output, wide, KINDS[kind].values(gradient).double()), strict=True):
        close(a, b)


# --- the layer, and W_A -----------------------------------------------------------------------------------------------

LAYERS = {
    "one call": ({"mechanism": "standard+align"}, 12, False),
    "one call, expressive": ({"mechanism": "super+expressive"}, 12, False),
    "triangular W_A in inference": ({"mechanism": "super", "align_causal": True}, 193, False),
    "W_A in training": ({"mechanism": "standard+align"}, 67, True),
    "W_A per head in training": ({"mechanism": "super+expressive", "align_heads": "per_head"}, 67, True),
}
"""Layers by the compiled path that they take: their settings, length, and whether they are trained."""
D = 16


def layer(name: str) -> tuple[ba.MultiheadAttention, Tensor, bool]:
    options, length, training = LAYERS[name]
    module = ba.MultiheadAttention(D, 2, batch_first=True, max_len=length, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.train(training), torch.randn(3, length, D), training


PARTS = ("input", "attn_mask", "key_padding_mask", "q_proj.weight", "out_proj.bias", "align.weight", "align.bias")


EVERYWHERE = [
    (kind, name, part)
    for kind in KINDS
    for name, (_, _, training) in LAYERS.items()
    for part in PARTS
    if (trains(kind) or not training)
    and not (kind == "transposed" and part.endswith("bias"))  # vectors have no transpose
]


@pytest.mark.parametrize(("kind", "name", "argument"), EVERYWHERE)
def test_a_kind_in_each_argument_and_parameter_of_a_layer(kind: str, name: str, argument: str) -> None:
    module, x, training = layer(name)
    length = x.shape[1]
    state = {n: p.detach() for n, p in module.named_parameters()}
    given = {"input": x, "attn_mask": torch.randn(length, length), "key_padding_mask": torch.randn(3, length), **state}

    def run(make: Callable[[Tensor], Tensor], module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        parts = {n: (make(t) if n == argument else t).to(dtype) for n, t in given.items()}
        masks = {argument: parts[argument]} if argument.endswith("mask") else {}
        point = parts["input"]
        if training and argument != "input":
            point = point.clone().requires_grad_()
        values = {n: parts[n] for n in state}
        with torch.set_grad_enabled(training):
            output = functional_call(module, values, (point, point, point), {"need_weights": False, **masks})[0]
        return [output, *(torch.autograd.grad(output.sin().sum(), point) if point.requires_grad else ())]

    got = run(KINDS[kind].make, module, torch.float32)
    options, _, _ = LAYERS[name]
    oracle = ba.MultiheadAttention(D, 2, batch_first=True, max_len=length, impl="reference", **options).double()
    for a, b in zip(got, run(KINDS[kind].values, oracle, torch.float64), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", [n for n, (_, _, training) in LAYERS.items() if training])
@pytest.mark.parametrize("kind", ["negated", "zero without memory", "transposed"])
def test_a_kind_as_the_gradient_of_a_layer(kind: str, name: str) -> None:
    module, x, _ = layer(name)
    x.requires_grad_()
    gradient = torch.randn(x.shape)
    points = (x, *module.parameters())
    got = torch.autograd.grad(module(x, x, x, need_weights=False)[0], points, KINDS[kind].make(gradient))
    wanted = KINDS[kind].values(gradient)
    for a, b in zip(got, torch.autograd.grad(module(x, x, x, need_weights=False)[0], points, wanted), strict=True):
        close(a, b)


# --- machinery --------------------------------------------------------------------------------------------------------


class Passing(TorchDispatchMode):
    """Looks at every operator and lets it pass, keeping its name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class PassingFunctions(TorchFunctionMode):
    """The same for torch's Python functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


Function = Callable[..., Tensor]


def within(context: Callable[[], AbstractContextManager[object]]) -> Callable[[Function, list[Tensor]], Tensor]:
    def run(function: Function, tensors: list[Tensor]) -> Tensor:
        with context():
            return function(*tensors)

    return run


class SelfAttention(nn.Module):
    """A model that consists of one layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


def traced(function: Function, tensors: list[Tensor]) -> Tensor:
    """The trace of other numbers, on these."""
    return torch.jit.trace(function, tuple(torch.randn_like(x) for x in tensors), check_trace=False)(*tensors)


def mapped(function: Function, tensors: list[Tensor]) -> Tensor:
    return vmap(function)(*(torch.stack([x + 1, x]) for x in tensors))[1]


def with_tangents(function: Function, tensors: list[Tensor]) -> Tensor:
    return jvp(function, tuple(tensors), tuple(torch.randn_like(x) for x in tensors))[0]


def as_graph(function: Function, tensors: list[Tensor]) -> Tensor:
    return make_fx(function)(*(torch.randn_like(x) for x in tensors))(*tensors)


def compiled(function: Function, tensors: list[Tensor]) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)


MACHINERY: dict[str, Callable[[Function, list[Tensor]], Tensor]] = {
    "nothing": within(nullcontext),
    "no_grad": within(torch.no_grad),
    "inference mode": within(torch.inference_mode),
    "dispatch mode": within(Passing),
    "function mode": within(PassingFunctions),
    "FLOP counter": within(lambda: FlopCounterMode(display=False)),
    "profiler": within(lambda: torch.autograd.profiler.profile(use_kineto=False)),
    "dual level": within(forward_ad.dual_level),
    "default device": within(lambda: torch.device("cpu")),
    "jit.trace": traced,
    "vmap": mapped,
    "jvp": with_tangents,
    "vjp": lambda function, tensors: vjp(function, *tensors)[0],
    "functionalize": lambda function, tensors: functionalize(function)(*tensors),
    "make_fx": as_graph,
    "compile": compiled,
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("machinery", MACHINERY)
def test_the_function_under_each_machinery(machinery: str, score: str) -> None:
    tensors = list(inputs().values())

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ba.attention(q, k, v, attn_mask=mask, score=score, is_causal=True)

    got = MACHINERY[machinery](function, tensors)
    q, k, v, mask = (x.double() for x in tensors)
    close(got, ba.attention(q, k, v, attn_mask=mask, score=score, is_causal=True, impl="reference"))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("machinery", [m for m in MACHINERY if m not in ("no_grad", "inference mode", "jit.trace")])
def test_gradients_under_each_machinery(machinery: str, score: str) -> None:
    def gradient(impl: str) -> Function:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return vjp(lambda q: ba.attention(q, k, v, score=score, impl=impl), q)[1](v[..., :L, :].sin())[0]

        def autograd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = q.detach().requires_grad_()
            output = ba.attention(q, k, v, score=score, impl=impl)
            return torch.autograd.grad(output, q, v[..., :L, :].sin())[0]

        func = machinery in ("vmap", "jvp", "vjp", "functionalize", "make_fx", "compile")
        return function if func else autograd

    tensors = list(inputs().values())[:3]
    got = MACHINERY[machinery](gradient("auto"), tensors)
    close(got, gradient("reference")(*(x.double() for x in tensors)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("machinery", MACHINERY)
def test_layers_under_each_machinery(machinery: str, name: str) -> None:
    module, x, training = layer(name)
    oracle = ba.MultiheadAttention(D, 2, batch_first=True, max_len=x.shape[1], impl="reference", **LAYERS[name][0])
    oracle.load_state_dict(module.state_dict())
    oracle.double().train(training)
    mode = nullcontext() if training else torch.no_grad()
    with mode:
        got = MACHINERY[machinery](SelfAttention(module), [x])
        expected = oracle(*[x.double()] * 3, need_weights=False)[0]
    close(got, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_is_right_at_other_sizes_and_can_be_trained(name: str) -> None:
    module, x, training = layer(name)
    with torch.set_grad_enabled(training):
        trace = torch.jit.trace(SelfAttention(module), (x,), check_trace=False)
        for batch, length in ((2, 5), (1, 1), (5, x.shape[1])):
            other = torch.randn(batch, length, D, requires_grad=training)
            got, expected = trace(other), module(other, other, other, need_weights=False)[0]
            close(got, expected)
            if training:
                close(
                    torch.autograd.grad(got.sin().sum(), other)[0], torch.autograd.grad(expected.sin().sum(), other)[0]
                )


# --- forward-mode derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", PARTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_tangent_in_each_argument_and_parameter_arrives(name: str, argument: str) -> None:
    """Even where no gradient is recorded, as in forward-mode differentiation of a frozen model."""
    module, x, _ = layer(name)
    module.requires_grad_(False)
    length = x.shape[1]
    state = dict(module.named_parameters())
    point = {"input": x, "attn_mask": torch.randn(length, length), "key_padding_mask": torch.randn(3, length), **state}[
        argument
    ].detach()
    tangent = torch.randn_like(point)

    def run(value: Tensor, module: nn.Module = module) -> Tensor:
        dtype = value.dtype
        values = {n: value if n == argument else p.to(dtype) for n, p in state.items()}
        masks = {argument: value} if argument.endswith("mask") else {}
        source = value if argument == "input" else x.to(dtype)
        return functional_call(module, values, (source, source, source), {"need_weights": False, **masks})[0]

    with torch.no_grad(), forward_ad.dual_level():
        arrived = forward_ad.unpack_dual(run(forward_ad.make_dual(point, tangent))).tangent
    step = 1e-6 * tangent.double()
    options, _, _ = LAYERS[name]
    oracle = ba.MultiheadAttention(D, 2, batch_first=True, max_len=length, impl="reference", **options).double()
    with torch.no_grad():
        difference = (run(point.double() + step, oracle) - run(point.double() - step, oracle)) / 2e-6
    assert arrived is not None, "the tangent was lost"
    torch.testing.assert_close(arrived.double(), difference, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("score", SCORES)
def test_a_dual_mask_of_the_function(score: str) -> None:
    given = inputs()
    mask = given.pop("attn_mask")
    run = lambda m: ba.attention(**{n: x.to(m.dtype) for n, x in given.items()}, attn_mask=m, score=score)  # noqa: E731
    direction = torch.randn_like(mask)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(mask, direction))).tangent
    step = 1e-6 * direction.double()
    difference = (run(mask.double() + step) - run(mask.double() - step)) / 2e-6
    torch.testing.assert_close(tangent.double(), difference, rtol=1e-3, atol=1e-4)


# --- those who observe ------------------------------------------------------------------------------------------------

SMALL = {"standard": 4, "efficient": 2, "super": 2}
"""Mechanisms of small layers, which take one compiled call in inference, and their numbers of linear maps."""


def small(mechanism: str) -> tuple[ba.MultiheadAttention, Tensor]:
    module = ba.MultiheadAttention(
        D, 2, batch_first=True, mechanism=mechanism, max_len=8 if mechanism == "super" else None
    )
    return module.eval(), torch.randn(2, 8, D)


def counted(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("mechanism", SMALL)
def test_whoever_replaces_linear_maps_is_called(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = small(mechanism)
    expected = counted(module, x)
    calls: list[object] = []
    forward, linear = nn.Linear.forward, nn.functional.linear

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
        close(counted(module, x), expected)
    assert len(calls) == SMALL[mechanism]
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda *a: (calls.append(a), linear(*a))[1])
        close(counted(module, x), expected)
    assert len(calls) == 2 * SMALL[mechanism]
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda part, *_: calls.append(part) if isinstance(part, nn.Linear) else None)
        close(counted(module, x), expected)
        handle.remove()
    assert len(calls) == 4 * SMALL[mechanism]
    call = nn.Module._call_impl
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.Module,
            "_call_impl",
            lambda self, *a, **k: (calls.append(self) if isinstance(self, nn.Linear) else None, call(self, *a, **k))[1],
        )
        close(counted(module, x), expected)
    assert len(calls) == 5 * SMALL[mechanism]


@pytest.mark.parametrize("mechanism", SMALL)
def test_modes_and_profilers_see_the_linear_maps(mechanism: str) -> None:
    module, x = small(mechanism)
    with PassingFunctions() as functions:
        counted(module, x)
    assert functions.seen.count(nn.functional.linear) == SMALL[mechanism]
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        counted(module, x)
    assert {e.name: e for e in profile.function_events}.keys() >= {"aten::linear"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [12, 128])
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("mechanism", list(ba.MECHANISMS))
def test_a_flop_counter_counts_what_cost_says(mechanism: str, impl: str, length: int, training: bool) -> None:
    aligned = ba.MECHANISMS[mechanism].aligned
    module = ba.MultiheadAttention(
        64, 4, batch_first=True, mechanism=mechanism, impl=impl, max_len=length if aligned else None
    )
    x = torch.randn(2, length, 64, requires_grad=training)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        output = module(x, x, x, need_weights=False)[0]
        if training:
            output.sum().backward()
    expected = ba.cost(64, 4, length, mechanism=mechanism, batch=2, backward=training).flops
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("impl", ["native", "chunked"])
def test_the_flops_of_the_function(impl: str, score: str, shared: bool) -> None:
    q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16 if shared else 6)
    v = k if shared else v
    q.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ba.attention(q, k, v, score=score, enable_gqa=True, impl=impl).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 8 * 5 * 7 * (16 + v.shape[-1])


# --- refusals, and torch as it may be tomorrow ------------------------------------------------------------------------


def test_freed_memory_is_an_error_and_not_a_crash() -> None:
    """Sharded training resizes the storage of parameters to zero between uses."""
    q, k, v, _ = inputs().values()
    k.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        ba.attention(q, k, v, impl="native")


@pytest.mark.parametrize("impl", ["native", "chunked"])
def test_an_implementation_that_cannot_be_traced_says_so(impl: str) -> None:
    q, k, v, _ = inputs().values()
    with pytest.raises(ValueError, match=r"(?s)torch.jit.trace.*impl='auto'"):
        torch.jit.trace(lambda q: ba.attention(q, k, v, impl=impl), (q,))


@pytest.mark.parametrize("impl", ["native", "chunked"])
def test_subclasses_are_named(impl: str) -> None:
    q, k, v, _ = inputs().values()
    why = ba.explain(q, k.as_subclass(Tagged), v, score="expressive")
    assert any("key is a Tagged" in reason for reason in why.reasons[impl])
    assert why.chosen == "reference"


def test_fake_tensors_have_the_shape_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(B, N, L, H, requires_grad=True)
        output = ba.attention(q, q, q, score="expressive")
        assert output.shape == (B, N, L, H)
        (gradient,) = torch.autograd.grad(output.sum(), q)
        assert gradient.shape == q.shape


# --- torch.fx and torch.jit.script ------------------------------------------------------------------------------------


class Model(nn.Module):
    """What holds a layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        output, _ = self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)
        return output + x


@pytest.mark.parametrize("mechanism", list(ba.MECHANISMS))
def test_symbolic_trace_keeps_the_layer_as_a_leaf_as_it_does_torchs(mechanism: str) -> None:
    aligned = ba.MECHANISMS[mechanism].aligned
    own = ba.MultiheadAttention(D, 2, batch_first=True, mechanism=mechanism, max_len=7 if aligned else None)
    model = Model(own)
    graph = torch.fx.symbolic_trace(model)
    leaves = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    torchs = torch.fx.symbolic_trace(Model(nn.MultiheadAttention(D, 2, batch_first=True)))
    assert leaves == [node.target for node in torchs.graph.nodes if node.op == "call_module"] == ["attention"]
    x, hidden = torch.randn(3, 7, D), padding(3, 7)
    torch.testing.assert_close(graph(x, hidden), model(x, hidden), rtol=0, atol=0)


def test_symbolic_trace_keeps_the_function_as_a_node() -> None:
    class Own(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return ba.attention(q, k, k, score="expressive", is_causal=True)

    graph = torch.fx.symbolic_trace(Own())
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(graph(q, k), Own()(q, k), rtol=0, atol=0)


def test_a_layer_alone_cannot_be_its_own_leaf() -> None:
    with pytest.raises(TypeError, match=r"Trace a model that contains it"):
        torch.fx.symbolic_trace(ba.MultiheadAttention(D, 2))


class CallsTheFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ba.attention(x, x, x)


def calls_the_function(x: Tensor) -> Tensor:
    return ba.attention(x, x, x)


@pytest.mark.parametrize(
    ("scripted", "name"),
    [
        (ba.MultiheadAttention(D, 2), "MultiheadAttention"),
        (Model(ba.MultiheadAttention(D, 2)), "MultiheadAttention"),
        (ba.attention, "attention"),
        (calls_the_function, "attention"),
        (CallsTheFunction(), "attention"),
    ],
    ids=["layer", "layer within", "function", "called by a function", "called by a module"],
)
def test_script_is_refused_with_a_way_out(scripted: object, name: str) -> None:
    with pytest.raises(TypeError, match=rf"(?s)better_attention\.{name} .*torch\.jit\.script.*torch\.export"):
        torch.jit.script(scripted)


# --- distributed tensors, and derivatives in one batch ----------------------------------------------------------------


@pytest.mark.slow
def test_a_distributed_tensor_takes_the_kernels_or_is_refused_and_explain_says_so() -> None:
    """In a process of its own: a process group is global state."""
    result = subprocess.run([sys.executable, "-c", DISTRIBUTED], capture_output=True, text=True, check=False)
    assert result.stdout == "right\n", result.stderr


DISTRIBUTED = """
import torch, better_attention as ba
import torch.distributed as dist
from better_attention.native.library import missing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
x = torch.randn(4, 16, 40, 16)
q = distribute_tensor(x, mesh, [Shard(1)])
impls = ["native", "reference"] if missing() is None else ["reference"]
for score in ("softmax", "expressive"):
    why = ba.explain(q, q, q, score=score)
    assert why.chosen == ba.explain(x, x, x, score=score).chosen and "divided over heads" in str(why), why
    for impl in ("auto", *impls):
        got = ba.attention(q, q, q, score=score, impl=impl).full_tensor()
        torch.testing.assert_close(got, ba.attention(x, x, x, score=score, impl="reference"), rtol=1e-4, atol=1e-5)
    over_length = distribute_tensor(x, mesh, [Shard(2)])
    assert ba.explain(over_length, over_length, over_length, score=score).chosen is None
    try:
        ba.attention(over_length, over_length, over_length, score=score)
    except ValueError as error:
        assert "sequence_attention" in str(error), error
    else:
        raise AssertionError("divided over the length, it was computed")

plan = {p: ColwiseParallel() for p in ("q_proj", "k_proj", "v_proj")} | {"out_proj": RowwiseParallel()}
for mechanism in ("standard", "expressive"):
    layer = ba.MultiheadAttention(32, 4, batch_first=True, mechanism=mechanism)
    x = torch.randn(2, 7, 32)
    right = layer(x, x, x, need_weights=False)[0]
    parallelize_module(layer, mesh, plan)
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], right)
dist.destroy_process_group()
print("right")
"""


def test_heads_of_a_tensor_parallel_layer_have_to_be_divided() -> None:
    """What a rank of tensor-parallel training sees: projections of a part of the columns."""
    module = ba.MultiheadAttention(D, 4, batch_first=True)
    for p in (module.q_proj, module.k_proj, module.v_proj):
        p.weight = nn.Parameter(p.weight[: D // 2].detach())
        p.bias = nn.Parameter(p.bias[: D // 2].detach())
    x = torch.randn(2, 5, D)
    with pytest.raises(ValueError, match=r"(?s)_proj returned width 8.*16.*num_heads"):
        module(x, x, x, need_weights=False)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_jacobian_in_one_batch_of_gradients(name: str, vectorize: bool) -> None:
    module, x, _ = layer(name)
    x = x[:1, : min(x.shape[1], 67)]

    def function(x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False)[0][:, :2].sum(dim=-1)

    jacobian = torch.autograd.functional.jacobian(function, x, vectorize=vectorize)
    rows = [torch.autograd.grad(function(p := x.clone().requires_grad_())[0, i], p)[0] for i in range(2)]
    close(jacobian, torch.stack(rows)[None])
