"""Every argument of the layer's ``forward`` and of ``attention`` on every path: honoured or refused, never dropped.

Each argument has perturbations, values that change the result; each path computes the layer or the function in its
own way. A cell holds if the path gives the float64 oracle's result for the perturbed call, which differs from the
result without the perturbation, or if it is in the table of refusals and the message holds the word there. A new
argument or path is one row.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.layer import fast_path
from better_attention.native.library import missing
from helpers import oracle
from helpers.bridge import array, oracle_masks, oracle_weights
from helpers.layers import layer, refused, tokens
from helpers.registry import CPU_IMPLS

B, N, L, D = 2, 2, 5, 6
LENGTHS = (5, 3)
CLOSE = {"rtol": 0.0, "atol": 2e-5}
"""float32 against float64 at sizes where nothing exceeds about 10."""
FAR = 1e-3
"""What a perturbation has to change at least; fifty times what two right results may differ by."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def drawn(*shape: int) -> Tensor:
    return tokens(*shape, dtype=torch.float32)


def hiding(*shape: int) -> Tensor:
    """A bool mask that hides some keys of every query, and the first of none."""
    mask = torch.rand(*shape) < 0.5
    mask[..., 0], mask[..., 1] = False, True
    return mask


# --- the layer --------------------------------------------------------------------------------------------------------

Arguments = dict[str, Any]
LAYER_ARGUMENTS: dict[str, dict[str, Callable[[], Arguments]]] = {
    "query": {"another": lambda: {"query": drawn(B, L, D)}},
    "key": {"another": lambda: {"key": drawn(B, L, D)}},
    "value": {"another": lambda: {"value": drawn(B, L, D)}},
    "key_padding_mask": {
        "bool": lambda: {"key_padding_mask": hiding(B, L)},
        "float": lambda: {"key_padding_mask": drawn(B, L)},
    },
    "need_weights": {"True": lambda: {"need_weights": True}},
    "attn_mask": {
        "bool": lambda: {"attn_mask": hiding(L, L)},
        "float": lambda: {"attn_mask": drawn(L, L)},
        "float for each head": lambda: {"attn_mask": drawn(B * N, L, L)},
        "float64": lambda: {"attn_mask": drawn(L, L).double()},
        "learned": lambda: {"attn_mask": drawn(L, L).requires_grad_()},
    },
    "average_attn_weights": {"False": lambda: {"need_weights": True, "average_attn_weights": False}},
    "is_causal": {
        "True": lambda: {"is_causal": True},
        "with padding": lambda: {"is_causal": True, "key_padding_mask": hiding(B, L)},
    },
}
MECHANISMS = {"standard": {}, "super+expressive": {"mechanism": "super+expressive", "align_causal": True}}


def nested(layout: torch.layout) -> Callable[..., Any]:
    def run(module: nn.Module, *inputs: Tensor, **options: Any) -> tuple[list[Tensor], Tensor | None]:
        made: dict[int, Tensor] = {}
        for x in inputs:
            made.setdefault(
                id(x), torch.nested.nested_tensor([s[:n] for s, n in zip(x, LENGTHS, strict=True)], layout=layout)
            )
        output, weights = module(*(made[id(x)] for x in inputs), **options)
        assert output.layout == layout
        return list(output.unbind()), weights

    return run


def compiled(backend: str) -> Callable[..., Any]:
    def run(module: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(module, backend=backend, fullgraph=True)(*inputs, **options)

    return run


def exported(module: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return torch.export.export(module, inputs, options).module()(*inputs, **options)


def plainly(module: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
    return module(*inputs, **options)


SLOW = {"compiled eager", "compiled aot_eager", "compiled inductor", "exported"}
LAYER_PATHS: dict[str, tuple[Callable[..., Any], Callable[[], AbstractContextManager[Any]], str, bool]] = {
    "one call": (plainly, torch.no_grad, "auto", False),
    "step by step": (plainly, nullcontext, "auto", False),
    "training": (plainly, nullcontext, "auto", True),
    "inference mode": (plainly, torch.inference_mode, "auto", False),
    "nested strided": (nested(torch.strided), nullcontext, "auto", False),
    "nested jagged": (nested(torch.jagged), nullcontext, "auto", False),
    "nested strided, no gradients": (nested(torch.strided), torch.no_grad, "auto", False),
    "compiled eager": (compiled("eager"), nullcontext, "auto", False),
    "compiled aot_eager": (compiled("aot_eager"), nullcontext, "auto", False),
    "compiled inductor": (compiled("inductor"), nullcontext, "auto", False),
    "exported": (exported, nullcontext, "auto", False),
    **{impl: (plainly, nullcontext, impl, False) for impl in CPU_IMPLS},
}
"""How the layer is called; under which context; its impl; whether it trains (without dropout)."""
IN_ONE_CALL = {"one call", "inference mode"}
"""The paths on which self-attention without masks is one compiled call; everything else goes step by step."""


def layer_refusal(path: str, argument: str, form: str, mechanism: str) -> str | None:
    """The word in the message of a cell that is refused; None where it is honoured."""
    if path.startswith("nested"):
        return None if argument == "query" or (argument, form) == ("is_causal", "True") else "nested"
    if path in CPU_IMPLS and path != "reference" and argument in ("need_weights", "average_attn_weights"):
        return "return"
    if path == "sdpa" and "expressive" in mechanism:
        return "softmax weights only"
    if form == "learned" and path in ("native", "sdpa"):
        return "differentiate"
    if form == "float64" and path == "native":
        return "float64"
    return None


def by_oracle(module: nn.Module, given: Arguments) -> tuple[np.ndarray, np.ndarray]:
    query = given["query"]
    masks = oracle_masks(
        None if given.get("attn_mask") is None else given["attn_mask"].detach(),
        given.get("key_padding_mask"), len(query), N, query.shape[1], given["key"].shape[1], floor=-1e3,
    )  # fmt: skip
    return oracle.multihead(
        oracle_weights(module, align_causal=getattr(module.align, "causal", False)),
        *(array(given[name]) for name in ("query", "key", "value")),
        causal=given.get("is_causal", False),
        **masks,
    )


def asked(given: Arguments, output: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """What a call returns, None left out: the weights averaged over heads or not."""
    if not given["need_weights"]:
        return [output]
    return [output, weights if given.get("average_attn_weights") is False else weights.mean(1)]


def differ(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) != len(b) or any(x.shape != y.shape or np.abs(x - y).max() > FAR for x, y in zip(a, b, strict=True))


def layer_cells() -> list[Any]:
    """Every path with every form; each with one mechanism in the unit tier, with both in the slow one."""
    cells = []
    for i, path in enumerate(LAYER_PATHS):
        for j, (argument, form) in enumerate((a, form) for a, forms in LAYER_ARGUMENTS.items() for form in forms):
            for k, mechanism in enumerate(MECHANISMS):
                slow = path in SLOW or (i + j + k) % len(MECHANISMS) > 0
                cells.append(pytest.param(path, argument, form, mechanism, marks=[pytest.mark.slow] if slow else []))
    return cells


def test_the_table_has_every_argument_of_forward() -> None:
    # What a cache does is tested in library/cache/: it changes no call without one.
    assert list(inspect.signature(ba.MultiheadAttention.forward).parameters)[1:] == [*LAYER_ARGUMENTS, "cache"]


@pytest.mark.parametrize(("path", "argument", "form", "mechanism"), layer_cells())
def test_the_layer_honours_or_refuses(
    path: str, argument: str, form: str, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, context, impl, trains = LAYER_PATHS[path]
    if impl == "native" and missing():
        pytest.skip("the compiled kernels are missing")
    options = MECHANISMS[mechanism]
    single = argument == "query" and path in IN_ONE_CALL
    if single and options:
        options = options | {"align_causal": False}  # the triangle is mixed in a call of its own
    module = layer("standard", D, N, impl=impl, max_len=L, **options).float().train(trains)
    x = drawn(B, L, D)
    base: Arguments = {"query": x, "key": x, "value": x, "need_weights": False}
    changes = LAYER_ARGUMENTS[argument][form]()
    # Nested input is taken for self-attention only, and one call computes nothing else.
    if single or (argument == "query" and path.startswith("nested")):
        changes = dict.fromkeys(("query", "key", "value"), changes["query"])
    given = base | changes
    expected = asked(given, *by_oracle(module, given))
    unperturbed = base if argument != "average_attn_weights" else base | {"need_weights": True}
    assert differ(expected, asked(unperturbed, *by_oracle(module, unperturbed))), "a perturbation that changes nothing"

    in_one: list[bool] = []
    attend = fast_path.attend

    def watched(*arguments: Any) -> Tensor | None:
        output = attend(*arguments)
        in_one.extend([True] * (output is not None))
        return output

    monkeypatch.setattr(fast_path, "attend", watched)

    def call() -> Any:
        inputs = [given[name] for name in ("query", "key", "value")]
        with context():
            return run(module, *inputs, **{k: v for k, v in given.items() if k not in ("query", "key", "value")})

    word = layer_refusal(path, argument, form, mechanism)
    if word is not None:
        refused(call, word)
        return
    output, weights = call()
    assert bool(in_one) == (single and not missing())
    if isinstance(output, list):
        for i, (found, n) in enumerate(zip(output, LENGTHS, strict=True)):
            alone = {k: v[i : i + 1, :n] if isinstance(v, Tensor) else v for k, v in given.items()}
            np.testing.assert_allclose(array(found), by_oracle(module, alone)[0][0], **CLOSE)
        return
    found = [output] if weights is None else [output, weights]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(array(a), b, **CLOSE)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_input_keeps_its_structure_and_gradients(layout: torch.layout) -> None:
    module = layer("standard", D, N).float()
    samples = [drawn(n, D) for n in (4, 0, 2)]
    x = torch.nested.nested_tensor(samples, layout=layout, requires_grad=True)
    output, _ = module(x, x, x, need_weights=False, is_causal=True)
    (x + output).sum().backward() if layout == torch.jagged else torch.nested.to_padded_tensor(
        x + output, 0.0
    ).sum().backward()
    for sample, found in zip(samples, x.grad.unbind(), strict=True):
        if len(sample):
            alone = sample[None].clone().requires_grad_()
            (alone + module(alone, alone, alone, need_weights=False, is_causal=True)[0]).sum().backward()
            torch.testing.assert_close(found, alone.grad[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [[], [torch.zeros(0, D)], [torch.zeros(0, D), torch.zeros(0, D)]])
def test_nested_input_without_a_token(samples: list[Tensor]) -> None:
    x = torch.nested.nested_tensor(samples)
    output, _ = layer("standard", D, N)(x, x, x, need_weights=False)
    assert output.is_nested
    assert [tuple(sample.shape) for sample in output.unbind()] == [tuple(sample.shape) for sample in samples]


def test_nested_input_of_another_shape_is_refused() -> None:
    x = torch.nested.nested_tensor([torch.zeros(3, D + 1), torch.zeros(2, D + 1)])
    refused(lambda: layer("standard", D, N)(x, x, x, need_weights=False), "embed_dim=6", "(3, 7)")


def test_a_full_alignment_refuses_causality_of_nested_input() -> None:
    x = torch.nested.nested_tensor([torch.zeros(3, D), torch.zeros(2, D)])
    refused(lambda: layer("super", D, N).float()(x, x, x, need_weights=False, is_causal=True), "align_causal")


def test_an_encoder_that_makes_nested_tensors_keeps_them_causal() -> None:
    """torch's own first layer decides that the padded input becomes nested; ours is the second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, N, 8, 0.0, batch_first=True), 2).eval()
    attention = encoder.layers[1].self_attn = layer("standard", D, N).float()
    seen: list[Any] = []
    attention.register_forward_hook(lambda _, given, options, out: seen.append((given, out)), with_kwargs=True)
    padded = torch.arange(L)[None] >= torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        encoder(drawn(B, L, D), src_key_padding_mask=padded, is_causal=True)
    ((x, *_), (output, _)), *rest = seen
    assert x.is_nested
    assert not rest, "hooks ran more than once"
    for sample, found in zip(x.unbind(), output.unbind(), strict=True):
        expected, _ = attention(*[sample[None]] * 3, need_weights=False, is_causal=True)
        torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_a_compiled_full_alignment_refuses_a_causal_mask(backend: str) -> None:
    module = layer("super", D, N, max_len=L).float()
    torch._dynamo.reset()
    run = torch.compile(module, backend=backend, fullgraph=True)
    x, causal = drawn(B, L, D), torch.ones(L, L, dtype=torch.bool).triu(1)
    other = hiding(L, L)
    other[0, -1] = False
    for mask, dtype in ((causal, torch.bool), (causal, torch.float32)):
        given = mask if dtype == torch.bool else torch.zeros(L, L).masked_fill(mask, -torch.inf)
        refused(
            lambda given=given: run(x, x, x, attn_mask=given, need_weights=False), "align_causal", kind=RuntimeError
        )
    torch.testing.assert_close(run(x, x, x, attn_mask=other)[0], module(x, x, x, attn_mask=other)[0])


def test_a_traced_full_alignment_refuses_a_causal_mask() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer("super", D, N, max_len=L).float()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    model, x, causal = Model(), drawn(B, L, D), torch.ones(L, L, dtype=torch.bool).triu(1)
    other = causal.clone()
    other[0, -1] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mask in (causal, torch.zeros(L, L).masked_fill(causal, -torch.inf)):
            refused(lambda mask=mask: torch.jit.trace(model, (x, mask)), "align_causal")
        traced = torch.jit.trace(model, (x, other))
    torch.testing.assert_close(traced(x, other), model(x, other))


# --- the function -----------------------------------------------------------------------------------------------------

S, H, V = 7, 4, 3
FUNCTION_ARGUMENTS: dict[str, dict[str, Callable[[], Arguments]]] = {
    "query": {"another": lambda: {"query": drawn(B, N, L, H)}},
    "key": {"another": lambda: {"key": drawn(B, N, S, H)}},
    "value": {"another": lambda: {"value": drawn(B, N, S, V)}},
    "score": {"the other": lambda: {"score": "expressive"}},
    "attn_mask": {
        "bool": lambda: {"attn_mask": ~hiding(L, S)},
        "float": lambda: {"attn_mask": drawn(B, 1, L, S)},
        "float64": lambda: {"attn_mask": drawn(L, S).double()},
        "learned": lambda: {"attn_mask": drawn(L, S).requires_grad_()},
    },
    "is_causal": {"True": lambda: {"is_causal": True}},
    "offset": {"two keys before": lambda: {"is_causal": True, "offset": 2}},
    "window": {
        "two keys": lambda: {"is_causal": True, "window": 2},
        "and offset": lambda: {"is_causal": True, "offset": 1, "window": 3},
    },
    "dropout_p": {"everything": lambda: {"dropout_p": 1.0}},
    "scale": {"another": lambda: {"scale": -0.9}},
    "enable_gqa": {"one key head": lambda: {"enable_gqa": True, "key": drawn(B, 1, S, H), "value": drawn(B, 1, S, V)}},
    "need_weights": {"True": lambda: {"need_weights": True}},
    "impl": {"unknown": lambda: {"impl": "quick"}},
}


class Function(nn.Module):
    """``attention`` as a module, for torch.export; settings are its own, tensors come with the call."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.run = partial(ba.attention, **settings)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Any:
        return self.run(query, key, value, attn_mask=attn_mask)


def training(module: Function, *inputs: Tensor, **masks: Any) -> Any:
    """The call on tensors that learn, its gradients held to those of the formulas in float64."""
    given = [*inputs, *masks.values()]
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point() and x.dtype == torch.float32) for x in given]
    exact = [x.detach().double().requires_grad_() if x.requires_grad else x for x in leaves]
    reference = Function(**module.settings | {"impl": "reference"})
    gradients = []
    for run, (*tensors, last) in ((module, leaves), (reference, exact)):
        tensors, options = ([*tensors, last], {}) if not masks else (tensors, dict(zip(masks, [last], strict=True)))
        found = run(*tensors, **options)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        learning = [x for x in (*tensors, *options.values()) if x.requires_grad]
        total = sum((x * (x + 1.0)).sum() for x in outputs)
        gradients.append((found, torch.autograd.grad(total, learning)))
    (found, ours), (_, theirs) = gradients
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-4)
    return found


def all_nested(layout: torch.layout) -> Callable[..., Any]:
    def run(module: Callable[..., Any], *inputs: Tensor, **masks: Any) -> Any:
        return module(*(torch.nested.nested_tensor(list(x), layout=layout) for x in inputs), **masks)

    return run


FUNCTION_PATHS: dict[str, tuple[Callable[..., Any], Callable[[], AbstractContextManager[Any]], str]] = {
    **{impl: (plainly, nullcontext, impl) for impl in ("auto", *CPU_IMPLS)},
    **{f"training {impl}": (training, nullcontext, impl) for impl in ("auto", *CPU_IMPLS)},
    "no gradients": (plainly, torch.no_grad, "auto"),
    "nested strided": (all_nested(torch.strided), nullcontext, "auto"),
    "nested jagged": (all_nested(torch.jagged), nullcontext, "auto"),
    "inference mode": (plainly, torch.inference_mode, "auto"),
    "compiled eager": (compiled("eager"), nullcontext, "auto"),
    "compiled aot_eager": (compiled("aot_eager"), nullcontext, "auto"),
    "compiled inductor": (compiled("inductor"), nullcontext, "auto"),
    "exported": (exported, nullcontext, "auto"),
}


def function_refusal(path: str, argument: str, form: str) -> str | None:
    if argument == "impl":
        return "impl"
    if path.startswith("nested"):
        return "nested"
    learns, path = path.startswith("training"), path.removeprefix("training ")
    if learns and form == "float" and path in ("native", "sdpa"):
        return "differentiate"
    if path == "sdpa" and argument == "score":
        return "softmax weights only"
    if path in CPU_IMPLS and path != "reference" and argument == "need_weights":
        return "return"
    if form == "learned" and path in ("native", "sdpa"):
        return "differentiate"
    if form == "float64" and path == "native":
        return "float64"
    return None


def function_by_oracle(given: Arguments) -> list[np.ndarray]:
    mask = given.get("attn_mask")
    options: Arguments = {}
    if mask is not None:
        values = np.broadcast_to(mask.detach().numpy(), (B, N, L, S))
        options = {"keep": values} if mask.dtype == torch.bool else {"bias": values}
    output, weights = oracle.attention(
        *(array(given[name]) for name in ("query", "key", "value")),
        score=given.get("score", "softmax"),
        causal=given.get("is_causal", False),
        offset=given.get("offset", 0),
        window=given.get("window"),
        scale=given.get("scale"),
        **options,
    )
    kept = 1.0 - given.get("dropout_p", 0.0)  # nothing or everything: no chance in it
    return [output * kept, weights * kept] if given.get("need_weights") else [output * kept]


def test_the_table_has_every_argument_of_attention() -> None:
    assert list(inspect.signature(ba.attention).parameters) == list(FUNCTION_ARGUMENTS)
    assert list(inspect.signature(ba.explain).parameters) == list(FUNCTION_ARGUMENTS)


@pytest.mark.parametrize(
    ("path", "argument", "form"),
    [
        pytest.param(path, argument, form, marks=[pytest.mark.slow] if path in SLOW else [])
        for path in FUNCTION_PATHS
        for argument, forms in FUNCTION_ARGUMENTS.items()
        for form in forms
    ],
)
def test_the_function_honours_or_refuses(path: str, argument: str, form: str) -> None:
    run, context, impl = FUNCTION_PATHS[path]
    if impl == "native" and missing():
        pytest.skip("the compiled kernels are missing")
    base: Arguments = {"query": drawn(B, N, L, H), "key": drawn(B, N, S, H), "value": drawn(B, N, S, V)}
    given = base | FUNCTION_ARGUMENTS[argument][form]()
    settings = {"impl": impl} | {k: v for k, v in given.items() if k not in (*base, "attn_mask")}
    tensors = [given[name] for name in base]
    masks = {"attn_mask": given["attn_mask"]} if "attn_mask" in given else {}

    def call() -> Any:
        with context():
            return run(Function(**settings), *tensors, **masks)

    word = function_refusal(path, argument, form)
    if word is not None:
        refused(call, word, kind=(ValueError, TypeError, torch._dynamo.exc.Unsupported))
        return
    expected = function_by_oracle(given)
    assert differ(expected, function_by_oracle(base)), "a perturbation that changes nothing"
    found = call()
    found = [found] if isinstance(found, Tensor) else list(found)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(array(a), b, **CLOSE)
