"""Keys and values with fewer heads than queries: numbers against the oracle, gradients against repeated heads."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import better_attention as ba
from better_attention.positions import alibi_slopes
from better_attention.scores import SCORES
from helpers import oracle
from helpers.bridge import array, assert_close, oracle_masks, oracle_weights
from helpers.grouped import (
    EVERY,
    MAX_LEN,
    MECHANISMS,
    B,
    D,
    H,
    L,
    N,
    S,
    drawn,
    expanded,
    gathered,
    has_full_kernel,
    three,
)
from helpers.layers import MASKS, padding, refused, tokens
from helpers.registry import computing

GROUPS = (1, 2, N)
FEWER = (1, 3)

WINDOWS: dict[str, dict[str, Any]] = {
    "no W_A": {"mechanism": "standard"},
    "no W_A, slices": {"mechanism": "optimised+expressive"},
    "W_A": {"mechanism": "standard+align"},
    "W_A per head": {"mechanism": "standard+align+expressive", "align_heads": "per_head"},
    "W_A of slices": {"mechanism": "optimised+align"},
    "W_A per head of slices": {"mechanism": "optimised+align+expressive", "align_heads": "per_head"},
}

MORE: dict[str, dict[str, Any]] = {
    "no biases": {"bias": False},
    "a learned scale": {"scale": "learned"},
    "a fixed scale": {"scale": 0.83},
    "widths": {"kdim": 5, "vdim": 11},
    "an added key": {"add_bias_kv": True},
    "an added zero": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True},
    "rotary": {"rotary": True},
    "rotary, an added key": {"rotary": 77.0, "add_bias_kv": True},
}


def truth(
    module: ba.MultiheadAttention, options: dict[str, Any], inputs: tuple[Tensor, ...], **arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's output and weights for a layer built with ``options``."""
    weights = oracle_weights(
        module,
        scale=options["scale"] if isinstance(options.get("scale"), float) else None,
        align_causal=options.get("align_causal", False),
        add_zero_attn=options.get("add_zero_attn", False),
    )
    base = options.get("rotary")
    weights = oracle.Weights(**{**vars(weights), "rotary": 10_000.0 if base is True else base})
    query, key, _ = inputs
    length, keys, heads = query.shape[1], key.shape[1], module.num_heads
    floor = (
        torch.finfo(torch.float64).min if module.mechanism.aligned or "expressive" in module.mechanism.name else -np.inf
    )
    masks: dict[str, Any] = oracle_masks(
        arguments.get("attn_mask"), arguments.get("key_padding_mask"), len(query), heads, length, keys, floor=floor
    )
    if (place := options.get("alibi")) is not None:
        distance = np.arange(length)[:, None] - np.arange(keys)
        bias = -np.array(alibi_slopes(heads))[:, None, None] * (distance if place == "score" else np.abs(distance))
        masks["inside" if place == "score" else "bias"] = bias if place == "score" else masks["bias"] + bias
    return oracle.multihead(weights, *(array(x) for x in inputs), causal=arguments.get("is_causal", False), **masks)


def held(
    options: dict[str, Any],
    groups: int,
    inputs: tuple[Tensor, ...],
    *,
    heads: int = N,
    width: int = D,
    **arguments: Any,
) -> None:
    """The layer's output and weights are the oracle's, by every implementation in float64 and float32."""
    module = drawn(width, heads, groups, **options, dtype=torch.float64)
    output, weights = truth(module, options, inputs, **arguments)
    note = f"{groups} of {heads} heads, {options}, {list(arguments)}"
    found, apart = module(*inputs, **arguments, average_attn_weights=False)
    assert_close(found, output, note)
    assert_close(apart, weights, f"weights, {note}")
    assert_close(module(*inputs, **arguments)[1], weights.mean(1), f"mean weights, {note}")
    # In float32 the kernels compute what they can, and in evaluation some of it in other ways than in training.
    for dtype, training, tolerance in ((torch.float64, True, 1e-12), (torch.float32, False, 2e-5)):
        given = tuple(x.to(dtype) for x in inputs)
        masks = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
        for impl in computing(module.mechanism.score, dtype):
            settings = {**options, "impl": impl, "dtype": dtype, "batch_first": True}
            other = ba.MultiheadAttention(width, heads, num_kv_heads=groups, **settings).train(training)
            other.load_state_dict(module.state_dict())
            run = partial(other, *given, **masks, need_weights=False)
            try:
                with torch.set_grad_enabled(training):
                    result, nothing = run()
            except ValueError:  # where it refuses ordinary heads, too
                plain = ba.MultiheadAttention(width, heads, **settings)
                words = f"impl={impl!r}"
                refused(run, words)
                refused(partial(plain, *given, **masks, need_weights=False), words)
                continue
            assert nothing is None
            assert_close(result, output, f"{impl} {dtype}, {note}", tolerance=tolerance)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", EVERY)
def test_every_mask(name: str, groups: int) -> None:
    options = EVERY[name]
    for index, (mask, make) in enumerate(MASKS.items()):
        if has_full_kernel(options) and "is_causal" in mask:
            continue
        inputs = three(options) if index % 2 else (tokens(B, S, D),) * 3
        held(options, groups, inputs, **make(B, inputs[0].shape[1], S, N, torch.float64))


def fits(name: str, more: str) -> bool:
    projections = ba.Mechanism.of(EVERY[name]["mechanism"]).projections
    return more != "widths" or {"k", "v"} <= projections


@pytest.mark.parametrize("groups", [2])
@pytest.mark.parametrize(("name", "more"), [(n, m) for n in EVERY for m in MORE if fits(n, m)])
def test_every_option(name: str, more: str, groups: int) -> None:
    options = EVERY[name] | MORE[more]
    if has_full_kernel(options):
        held(options, groups, three(options), key_padding_mask=padding(B, S))
    else:
        held(options, groups, three(options, S), is_causal=True, attn_mask=torch.randn(S, S, dtype=torch.float64))


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("place", ["score", "weight"])
@pytest.mark.parametrize("name", [name for name, options in EVERY.items() if not has_full_kernel(options)])
def test_alibi_gives_each_query_head_its_own_slope(name: str, place: str, groups: int) -> None:
    options = EVERY[name] | {"alibi": place}
    x = tokens(B, S, D)
    held(options, groups, (x, x, x), is_causal=True)
    held(options, groups, (x, x, x), is_causal=True, key_padding_mask=padding(B, S))


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_window(name: str, window: int, groups: int) -> None:
    options = WINDOWS[name] | {"window": window}
    x = tokens(B, 13, D)
    held(options, groups, (x, x, x))
    held(
        options | {"rotary": True},
        groups,
        (x, x, x),
        key_padding_mask=padding(B, 13),
        attn_mask=torch.rand(13, 13) < 0.3,
    )


def test_values_of_another_width_beside_grouped_keys() -> None:
    """kdim with values that are slices, whose heads are the queries' own."""
    options = {"mechanism": "optimised", "kdim": 5}
    for groups in GROUPS:
        held(options, groups, three(options))


@pytest.mark.parametrize("score", SCORES)
def test_any_of_many_heads(score: str) -> None:
    """More query heads for a key head than a kernel has rows, and group sizes that are no powers of two."""
    for heads, groups in ((16, 1), (24, 2), (9, 3), (20, 4), (14, 7)):
        for length in (1, 2, 9, 33):
            options = {"mechanism": ba.Mechanism(frozenset("qkvo"), score=score)}
            x = tokens(1, length, heads * 2)
            held(options, groups, (x, x, x), heads=heads, width=heads * 2, is_causal=True)


def drawn_settings(rng: np.random.Generator) -> tuple[dict[str, Any], int, int, int]:
    """Random settings, with the number of heads, the groups, and the width of a head."""

    def maybe(p: float) -> bool:
        return bool(rng.random() < p)

    projections = frozenset("k") | {p for p in "qvo" if maybe(0.6)}
    aligned = maybe(0.4)
    mechanism = ba.Mechanism(frozenset(projections), aligned=aligned, score=str(rng.choice(list(SCORES))))
    options: dict[str, Any] = {"mechanism": mechanism, "bias": maybe(0.7)}
    options["scale"] = (None, "learned", 0.7)[rng.integers(3)]
    window = int(rng.integers(1, 9)) if maybe(0.3) else None
    if window is not None:
        options["window"] = window
    if aligned:
        options["align_heads"] = str(rng.choice(["shared", "per_head"]))
        options |= {} if window else {"max_len": 11, "align_causal": maybe(0.7)}
    if maybe(0.3):
        options["alibi"] = str(rng.choice(["score", "weight"]))
    elif not (aligned and window):
        options |= {"add_bias_kv": maybe(0.3), "add_zero_attn": maybe(0.3)}
    if maybe(0.4):
        options["rotary"] = float(rng.uniform(5, 1e4))
    groups = int(rng.integers(1, 5))
    return options, groups * int(rng.integers(1, 5)), groups, 2 * int(rng.integers(1, 6))


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_random_layers(count: int, seed: int) -> None:
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        torch.manual_seed(int(rng.integers(2**31)))
        options, heads, groups, width = drawn_settings(rng)
        length = int(rng.integers(2, 11))
        x = tokens(B, length, heads * width)
        masks = [m for m in MASKS if "is_causal" not in m or not has_full_kernel(options)]
        arguments = MASKS[str(rng.choice(masks))](B, length, length, heads, torch.float64)
        if "alibi" in options:
            if has_full_kernel(options):
                options.pop("alibi")
            else:
                arguments["is_causal"] = True
        if has_full_kernel(options) and length < 4 and "attn_mask" in arguments:
            arguments.pop("attn_mask")  # by chance it hides all that is above the diagonal
        held(options, groups, (x, x, x), heads=heads, width=heads * width, **arguments)


def test_the_yardstick_notices_heads_in_another_order() -> None:
    """Heads that are dealt out in turn, 0 1 0 1, are another layer than 0 0 1 1."""
    module = drawn(D, N, 2, dtype=torch.float64)
    x = tokens(B, S, D)
    right = expanded(module, 2)
    turn = copy.deepcopy(right)
    with torch.no_grad():
        for part, own in ((turn.k_proj, module.k_proj), (turn.v_proj, module.v_proj)):
            part.weight.copy_(own.weight.repeat(N // 2, 1))
            part.bias.copy_(own.bias.repeat(N // 2))
    torch.testing.assert_close(module(x, x, x)[0], right(x, x, x)[0], rtol=1e-10, atol=1e-12)
    assert (module(x, x, x)[0] - turn(x, x, x)[0]).abs().max() > 0.1


# --- gradients --------------------------------------------------------------------------------------------------------

GRADIENTS: dict[str, dict[str, Any]] = {
    **EVERY,
    **{f"window, {name}": options | {"window": 3} for name, options in WINDOWS.items()},
    **{f"standard, {more}": {"mechanism": "standard", **options} for more, options in MORE.items()},
    **{f"optimised, {more}": EVERY["optimised"] | MORE[more] for more in MORE if more != "widths"},
    "alibi": {"mechanism": "expressive", "alibi": "score"},
}


def gradients_are_summed(options: dict[str, Any], groups: int, dtype: torch.dtype, tolerance: float) -> None:
    plain = options.get("window") is None and "kdim" not in options
    module = drawn(D, N, groups, **options, dtype=dtype)
    full = expanded(module, groups, **{**options, "impl": "reference"})
    inputs = three(options, S)
    inputs = inputs if "kdim" in options else inputs[:1] * 3 if not plain else inputs
    arguments: dict[str, Any] = {"key_padding_mask": padding(B, S), "need_weights": False}
    arguments["is_causal"] = not has_full_kernel(options)
    upstream = tokens(B, S, D, dtype=dtype)
    results = []
    for layer in (module, full):
        leaves = {id(x): x.to(dtype).clone().requires_grad_() for x in inputs}
        given = [leaves[id(x)] for x in inputs]
        output, _ = layer(*given, **arguments)
        output.backward(upstream)
        results.append([output, *(leaf.grad for leaf in leaves.values())])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, tolerance=tolerance)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        constant = name in ("k_proj.bias", "extra_k.weight")  # softmax does not notice it, or few keys do
        assert_close(
            parameter.grad, gathered(full, name, parameter, groups), name, tolerance=tolerance, vacuous=constant
        )


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_the_sums_over_the_copies(name: str, groups: int) -> None:
    options = GRADIENTS[name]
    for impl in ("reference", "chunked"):
        if impl == "chunked" and "window" in options and ba.Mechanism.of(options["mechanism"]).aligned:
            continue  # W_A of a window is computed in one way
        gradients_are_summed(options | {"impl": impl}, groups, torch.float64, 1e-11)
    gradients_are_summed(options, groups, torch.float32, 5e-5)  # the kernels, where they serve


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradients_by_the_kernels(mechanism: str, groups: int) -> None:
    options = {"mechanism": mechanism, "impl": "native"}
    if "native" not in computing(ba.Mechanism.of(mechanism).score, torch.float32):
        pytest.skip("the compiled kernels are missing")
    gradients_are_summed(options, groups, torch.float32, 5e-5)


@pytest.mark.parametrize(("heads", "groups"), [(16, 1), (17, 1), (24, 3)])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradients_of_few_queries_by_many_heads(mechanism: str, heads: int, groups: int) -> None:
    """More query heads for a head of keys than the kernel for few queries takes at once."""
    score = ba.Mechanism.of(mechanism).score
    if "native" not in computing(score, torch.float32):
        pytest.skip("the compiled kernels are missing")
    kernels = drawn(4 * heads, heads, groups, spread=0.2, mechanism=mechanism, impl="native")
    full = expanded(kernels, groups, mechanism=mechanism, impl="reference")
    for length, keys in ((1, 9), (3, 40), (8, 40), (9, 40)):
        given = [tokens(B, n, 4 * heads, dtype=torch.float32) for n in (length, keys)]
        results = []
        for layer in (kernels, full):
            layer.zero_grad()
            query, key = (x.clone().requires_grad_() for x in given)
            output, _ = layer(query, key, key, need_weights=False)
            output.square().sum().backward()
            results.append([output, query.grad, key.grad])
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs, tolerance=5e-5)
        for name, parameter in kernels.named_parameters():
            if name == "k_proj.bias" and score == "softmax":
                continue  # it adds the same to all scores of a query, and so its gradient is rounding alone
            assert_close(parameter.grad, gathered(full, name, parameter, groups), name, tolerance=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_derivatives_of_both_orders(mechanism: str, groups: int) -> None:
    module = drawn(4, 4, groups, mechanism=mechanism, dtype=torch.float64, impl="reference")
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (x, x, x), {"need_weights": False})[0]

    inputs = (tokens(1, 3, 4, requires_grad=True), *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, (inputs[0], *(p.detach() for p in inputs[1:])))


# --- dtypes, dropout, layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("training", [True, False])
def test_sixteen_bits(mechanism: str, groups: int, training: bool) -> None:
    """bfloat16 layers, and float32 layers under autocast, are as close to the oracle as those of ordinary heads."""
    module = drawn(96, N, groups, spread=0.15, mechanism=mechanism, dtype=torch.float64).train(training)
    x = tokens(B, 37, 96).bfloat16().double()
    exact, _ = truth(module.bfloat16().double(), {"mechanism": mechanism}, (x, x, x), is_causal=True)
    narrow = copy.deepcopy(module).bfloat16()
    autocast = copy.deepcopy(module).float()
    with torch.set_grad_enabled(training):
        outputs = [narrow(*[x.bfloat16()] * 3, is_causal=True, need_weights=False)[0]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(autocast(*[x.float()] * 3, is_causal=True, need_weights=False)[0])
    late = slice(8, None)  # the first queries see so few keys that expressive weights hang on rounding
    for output in outputs:
        assert output.dtype == torch.bfloat16
        assert_close(output[:, late], exact[:, late], tolerance=2e-2)
    if training:
        upstream = tokens(B, 37 - late.start, 96)
        full, rounded = (expanded(m, groups, mechanism=mechanism) for m in (module, narrow))
        outputs += [layer(*[x.to(layer.k_proj.weight.dtype)] * 3, is_causal=True)[0] for layer in (full, rounded)]
        for output in outputs:
            output[:, late].backward(upstream.to(output.dtype))
        for name, parameter in module.named_parameters():
            if name == "k_proj.bias":
                continue  # of softmax it is 0 but for rounding
            expected, ordinary = (gathered(layer, name, parameter, groups) for layer in (full, rounded))
            for layer in (narrow, autocast):
                error = (layer.get_parameter(name).grad.double() - expected).norm() / expected.norm()
                assert error < 0.02 + 1.5 * (ordinary.double() - expected).norm() / expected.norm(), name


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "native"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["standard", "optimised+expressive"])
def test_dropout(name: str, groups: int, impl: str) -> None:
    """It is reproducible, keeps the mean, and drops each query head's weights by themselves."""
    score = ba.Mechanism.of(name).score
    if impl not in computing(score, torch.float32):
        pytest.skip("the compiled kernels are missing")
    module = drawn(D, N, groups, mechanism=name, impl=impl, dropout=0.5).train()
    x = tokens(1, S, D, dtype=torch.float32)
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(module(x, x, x, need_weights=False)[0])
    assert torch.equal(*outputs)
    many = x.expand(4000, S, D)
    with torch.no_grad():
        dropped, _ = module(many, many, many, need_weights=False)
        exact, _ = module.eval()(x, x, x, need_weights=False)
    spread = dropped.std(0) / len(many) ** 0.5
    assert spread.min() > 0
    assert ((dropped.mean(0) - exact[0]).abs() <= 5 * spread).all()
    # Without W_O, with equal values and equal queries, heads of a group differ by what was dropped alone.
    bare = ba.MultiheadAttention(
        D,
        N,
        dropout=0.5,
        batch_first=True,
        mechanism=ba.Mechanism(frozenset("kv"), score=score),
        num_kv_heads=1,
        impl=impl,
    )
    same = tokens(1, S, H, dtype=torch.float32).repeat(1, 1, N)
    heads = bare(same, same, same, need_weights=False)[0].unflatten(-1, (N, H))
    for n in range(1, N):
        assert not torch.allclose(heads[:, :, 0], heads[:, :, n])
    heads = bare.eval()(same, same, same, need_weights=False)[0].unflatten(-1, (N, H))
    torch.testing.assert_close(heads, heads[:, :, :1].expand_as(heads))


def test_weights_are_dropped_in_training() -> None:
    module = drawn(D, N, 2, dropout=0.5).train()
    x = tokens(B, S, D, dtype=torch.float32)
    torch.manual_seed(3)
    output, weights = module(x, x, x, average_attn_weights=False)
    assert weights.shape == (B, N, S, S)
    assert 0.3 < (weights == 0).float().mean() < 0.7
    v = module.v_proj(x).unflatten(-1, (2, H)).transpose(1, 2)
    values = torch.stack([v[:, n // 3] for n in range(N)], 1)
    joined = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out_proj(joined), output)


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("name", EVERY)
def test_layouts(name: str, groups: int) -> None:
    """The length first, and without a batch."""
    options = EVERY[name]
    module = drawn(D, N, groups, **options)
    inputs = tuple(x.float() for x in three(options))
    output, weights = module(*inputs, average_attn_weights=False)
    for need_weights in (True, False):
        alone, its = module(*(x[1] for x in inputs), need_weights=need_weights, average_attn_weights=False)
        torch.testing.assert_close(alone, output[1])
        if need_weights:
            torch.testing.assert_close(its, weights[1])
        mask = torch.rand(N, L, S) < 0.3
        torch.testing.assert_close(
            module(*(x[1] for x in inputs), attn_mask=mask, need_weights=need_weights)[0],
            module(*(x[1:] for x in inputs), attn_mask=mask, need_weights=need_weights)[0][0],
        )
        module.batch_first = False
        second, _ = module(*(x.transpose(0, 1) for x in inputs), need_weights=need_weights)
        module.batch_first = True
        torch.testing.assert_close(second.transpose(0, 1), output)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("groups", [1, 2, N])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_nested_tensors(mechanism: str, groups: int, layout: torch.layout) -> None:
    """As ordinary layers take them, or refuse them in words."""
    module = drawn(D, N, groups, mechanism=mechanism).eval()
    full = expanded(module, groups, mechanism=mechanism)
    samples = [tokens(n, D, dtype=torch.float32) for n in (3, 5)]
    results: list[Any] = []
    for layer in (full, module):
        x = torch.nested.nested_tensor(samples, layout=layout)
        try:
            with torch.no_grad():
                results.append(layer(x, x, x, need_weights=False)[0].unbind())
        except (TypeError, ValueError) as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[1] == results[0]
        return
    for ours, sample in zip(results[1], samples, strict=True):
        torch.testing.assert_close(ours, module(sample, sample, sample)[0], rtol=1e-4, atol=1e-5)


# --- what is hidden ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", [torch.nan, 1e30])
@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("name", EVERY)
def test_padding_never_reaches_the_output(name: str, groups: int, spoiled: float) -> None:
    options = EVERY[name]
    module = drawn(D, N, groups, **options)
    query, key, value = (x.float() for x in three(options))
    hidden = padding(B, S)
    loud = [x.masked_fill(hidden[..., None], spoiled) for x in (key, value)]
    for training, need_weights in ((True, False), (True, True), (False, False), (False, True)):
        with torch.set_grad_enabled(training):
            before, after = (
                module.train(training)(query, *given, key_padding_mask=hidden, need_weights=need_weights)[0]
                for given in ((key, value), loud)
            )
        assert torch.equal(before, after)


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("name", EVERY)
def test_a_query_that_sees_nothing(name: str, groups: int) -> None:
    """It has weights of zero, and the output bias for output; for all heads or, with a mask per head, for some."""
    options = EVERY[name]
    module = drawn(D, N, groups, **options)
    inputs = [x.float() for x in three(options)]
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[2] = True
    bias = getattr(module.out_proj, "bias", torch.zeros(D))
    for need_weights in (True, False):
        output, weights = module(*inputs, attn_mask=mask, need_weights=need_weights, average_attn_weights=False)
        assert torch.equal(output[:, 2], bias.expand(B, D))
        assert weights is None or not weights[:, :, 2].any()
    each = torch.zeros(B, N, L, S, dtype=torch.bool)
    each[0, 1, 2] = True
    _, weights = module(*inputs, attn_mask=each.flatten(0, 1), average_attn_weights=False)
    assert not weights[0, 1, 2].any()
    alive = weights.sum(-1)
    alive[0, 1, 2] = 1
    torch.testing.assert_close(alive, torch.ones(B, N, L))


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize("name", [*(n for n in EVERY if not has_full_kernel(EVERY[n])), "window"])
def test_causality_bit_for_bit(name: str, groups: int) -> None:
    options = EVERY.get(name, {"mechanism": "standard+align", "window": 3, "align_heads": "per_head"})
    module = drawn(D, N, groups, **options)
    x = tokens(B, MAX_LEN, D, dtype=torch.float32)
    for training in (True, False):
        module.train(training)
        with torch.set_grad_enabled(training):
            ba.assert_causal(lambda y: module(y, y, y, is_causal=True, need_weights=False)[0], x)


@pytest.mark.parametrize("groups", FEWER)
@pytest.mark.parametrize(
    ("name", "window"), [*((n, None) for n in EVERY if not has_full_kernel(EVERY[n])), *((n, 3) for n in WINDOWS)]
)
def test_a_later_token_that_is_no_number(name: str, window: int | None, groups: int) -> None:
    """Bit for bit, with weights and without, with a mask and without, in training and in evaluation."""
    options = EVERY[name] if window is None else WINDOWS[name] | {"window": window}
    module = drawn(D, N, groups, **options)
    x = tokens(B, MAX_LEN, D, dtype=torch.float32)
    mask = torch.randn(MAX_LEN, MAX_LEN)
    for spoiled in (torch.nan, torch.inf):
        other = x.clone()
        other[:, 5:] = spoiled
        for training in (True, False):
            module.train(training)
            for arguments in ({"need_weights": False}, {}, {"attn_mask": mask, "need_weights": False}):
                with torch.set_grad_enabled(training):
                    before, after = (module(y, y, y, is_causal=True, **arguments)[0][:, :5] for y in (x, other))
                assert torch.equal(before, after), f"{spoiled} {training=} {list(arguments)}"
