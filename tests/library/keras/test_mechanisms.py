"""Every mechanism: the numbers of the oracle, and of the torch layer, with weights that were moved either way."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch

import better_attention as ba
import better_attention.keras as bk
from better_attention.keras.scores import SCORES
from helpers import oracle
from helpers.bridge import oracle_weights

N, H, D, S = 2, 3, 6, 7
TOLERANCE = 1e-5

LAYERS: dict[str, dict[str, Any]] = {
    **{name: {"mechanism": name} for name in ba.MECHANISMS if name != "super"},
    "efficient+expressive": {"mechanism": "efficient", "score": "expressive"},
    "super": {"mechanism": "super", "max_len": 8},
    "super causal": {"mechanism": "super", "max_len": S, "align_causal": True},
    "super per head": {"mechanism": "super+expressive", "max_len": 8, "align_heads": "per_head", "align_causal": True},
    "standard+align, no bias": {"mechanism": "standard+align", "max_len": S, "use_bias": False},
    "learned scale": {"mechanism": "efficient+expressive", "scale": "learned"},
    "fixed scale": {"mechanism": "optimised", "scale": 0.9},
    "super window": {"mechanism": "super", "sliding_window": 3},
    "super window per head": {
        "mechanism": "standard+align+expressive",
        "sliding_window": 4,
        "align_heads": "per_head",
    },
    "no projections": {"mechanism": ba.Mechanism(projections=frozenset())},
}
MASKS = ("none", "padding", "attention mask", "causal", "causal and padding")


def _hardest(options: dict[str, Any]) -> str:
    """The mask that hides most, of those that a layer may be given."""
    causal = options.get("align_causal") or "sliding_window" in options
    return "causal and padding" if causal or not ba.Mechanism.of(options["mechanism"]).aligned else "padding"


def _may_have(mask: str, options: dict[str, Any]) -> bool:
    """W_A of a window is causal always, and a full one never."""
    return "sliding_window" not in options if "causal" not in mask else "causal" in _hardest(options)


PAIRS = [
    # JAX compiles every operation: one mask for each layer in the unit tests, all of them in the long ones.
    pytest.param(name, mask, marks=[] if mask == _hardest(options) else pytest.mark.slow)
    for name, options in LAYERS.items()
    for mask in MASKS
    if _may_have(mask, options)
]


def layer(name: str, rng: np.random.Generator, **options: Any) -> Any:
    """The layer called ``name``, built; every weight is random."""
    one = bk.MultiHeadAttention(N, H, **{**LAYERS[name], **options})
    one.build((None, None, D), (None, None, D))
    for variable in one.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.5)
    return one


def in_torch(one: Any) -> ba.MultiheadAttention:
    """A torch layer with the weights of a Keras layer."""
    module = ba.MultiheadAttention(**bk.torch_options(one)).eval()
    module.load_state_dict({name: torch.from_numpy(x) for name, x in bk.to_torch_state(one).items()})
    return module


def case(mask: str, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """One mask as Keras, torch and the oracle take it."""
    present = np.arange(S) < np.array([[4], [S]])
    keep = rng.random((2, S, S)) < 0.6
    keep[..., 0] = True
    keep[1, 2] = False  # a query that sees nothing
    ours, theirs, truth = ({"return_attention_scores": True}, {"average_attn_weights": False}, {})  # type: ignore[var-annotated]
    if "padding" in mask:
        ours |= {"value_mask": present}
        theirs |= {"key_padding_mask": torch.from_numpy(~present)}
        truth |= {"present": present}
    if mask == "attention mask":
        ours |= {"attention_mask": keep}
        theirs |= {"attn_mask": torch.from_numpy(~np.repeat(keep, N, axis=0))}
        truth |= {"keep": np.repeat(keep[:, None], N, axis=1)}
    if "causal" in mask:
        ours, theirs, truth = ours | {"use_causal_mask": True}, theirs | {"is_causal": True}, truth | {"causal": True}
    return ours, theirs, truth


def numbers(x: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(x), dtype=np.float64)


def agree(got: Any, expected: Any) -> None:
    got, expected = numbers(got), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(("name", "mask"), PAIRS)
def test_the_oracle_and_the_torch_layer_say_the_same(name: str, mask: str, rng: np.random.Generator) -> None:
    one = layer(name, rng)
    module = in_torch(one)
    ours, theirs, truth = case(mask, rng)
    x = rng.normal(size=(2, S, D)).astype("float32")
    x[0, 4:] *= 50.0  # what is padded would be seen
    output, weights = one(x, x, **ours)
    scale = LAYERS[name].get("scale")
    weights_of = oracle_weights(
        module,
        scale=scale if isinstance(scale, float) else None,
        align_causal=LAYERS[name].get("align_causal", False),
    )
    expected, expected_weights = oracle.multihead(weights_of, x, x, x, **truth)
    agree(output, expected)
    agree(weights, expected_weights)
    t = torch.from_numpy(x)
    torch_output, torch_weights = module(t, t, t, **theirs)
    agree(output, torch_output.detach())
    agree(weights, torch_weights.detach())
    ours.pop("return_attention_scores")
    agree(one(x, x, **ours), expected)  # the way without weights


@pytest.mark.parametrize("name", LAYERS)
def test_weights_come_back_from_torch(name: str, rng: np.random.Generator) -> None:
    one, other = layer(name, rng), layer(name, rng)
    before = bk.to_torch_state(other)
    module = in_torch(one)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    bk.from_torch_state(other, module.state_dict())
    after = bk.to_torch_state(other)
    assert after.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        np.testing.assert_array_equal(after[key], value.numpy())
        assert not np.array_equal(before[key], after[key])


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [("standard", {}), ("optimised", {}), ("standard+align", {"max_len": S, "align_heads": "per_head"})],
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_that_are_shared_in_torch_are_copied(
    mechanism: str, options: dict[str, Any], kv_heads: int, rng: np.random.Generator
) -> None:
    module = ba.MultiheadAttention(12, 4, batch_first=True, mechanism=mechanism, num_kv_heads=kv_heads, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    one = bk.MultiHeadAttention(4, 3, mechanism=mechanism, **options)
    x = rng.normal(size=(2, S, 12)).astype("float32")
    one.build(x.shape, x.shape)
    bk.from_torch_state(one, module.state_dict())
    t = torch.from_numpy(x)
    agree(one(x, x), module(t, t, t, need_weights=False)[0].detach())
    # What comes back is of a layer that shares none.
    whole = ba.MultiheadAttention(**bk.torch_options(one))
    whole.load_state_dict({name: torch.from_numpy(x) for name, x in bk.to_torch_state(one).items()})
    torch.testing.assert_close(whole(t, t, t)[0], module(t, t, t)[0], rtol=1e-4, atol=1e-4)


def test_the_same_weights_give_the_same_bits(rng: np.random.Generator) -> None:
    """On NumPy, too, whose products depend on how a weight lies in memory."""
    one = bk.MultiHeadAttention(4, 8, mechanism="super+expressive", max_len=10)
    x = rng.normal(size=(2, 10, 32)).astype("float32")
    expected = np.array(keras.ops.convert_to_numpy(one(x, x)))
    bk.from_torch_state(one, bk.to_torch_state(one))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(one(x, x)), expected)


def test_cross_attention_with_widths_of_its_own(rng: np.random.Generator) -> None:
    one = bk.MultiHeadAttention(N, H, mechanism="expressive")
    query, key, value = (rng.normal(size=shape).astype("float32") for shape in ((2, 5, D), (2, S, 4), (2, S, 3)))
    one(query, value, key)
    module = in_torch(one)
    output, _ = module(*map(torch.from_numpy, (query, key, value)))
    agree(one(query, value, key), output.detach())


def test_parameters_are_those_of_the_paper() -> None:
    for name, expected in {"standard": 4224, "optimised": 3168, "efficient": 2112, "super": 3168}.items():
        one = bk.MultiHeadAttention(4, 8, mechanism=name, max_len=32 if name == "super" else None)
        one.build((None, 32, 32), (None, 32, 32))
        assert one.count_params() == expected == ba.cost(32, 4, 32, mechanism=name).params


def test_every_score_of_the_library_is_here() -> None:
    assert tuple(SCORES) == tuple(ba.scores.SCORES)


# --- the expressive score ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-35, 1e-12, 1.0, 1e4, 1e18])
def test_expressive_weights_of_every_size(size: float, rng: np.random.Generator) -> None:
    z = (rng.normal(size=(1, 1, 5, S)) * size).astype("float32")
    keep = rng.random(z.shape) < 0.7
    keep[..., 0, :] = False
    weights = numbers(SCORES["expressive"](keras.ops.convert_to_tensor(z), keras.ops.convert_to_tensor(keep)))
    for row, (scores, seen) in enumerate(zip(z[0, 0].astype("float64"), keep[0, 0], strict=True)):
        expected = np.zeros(S)
        if seen.any():
            expected[seen] = oracle.expressive_row(scores[seen], np.zeros(seen.sum()))
        np.testing.assert_allclose(weights[0, 0, row], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="derivatives are taken with JAX here")
@pytest.mark.parametrize("score", SCORES)
def test_derivatives_are_those_of_torch(score: str, rng: np.random.Generator) -> None:
    import jax

    z = rng.normal(size=(1, 1, 5, S)).astype("float32")
    z[..., 1, :] *= 1e-12  # a row whose scores are all small
    z[..., 2, :] = 0.0
    z[..., 3, 0] = 1e9
    keep = rng.random(z.shape) < 0.7
    keep[..., 4, :] = False
    grad = rng.normal(size=z.shape).astype("float32")
    ours = np.asarray(jax.grad(lambda z: (SCORES[score](z, keep) * grad).sum())(z))
    one = torch.ones(1, 1, 1, 1)
    for row in range(5):  # row by row as products of a query of width 1 with its keys
        keys = torch.from_numpy(z[:, :, row, :, None]).requires_grad_()
        hide = torch.from_numpy(~keep[:, :, row : row + 1])
        weights = ba.scores.SCORES[score].weights(one, keys, None, hide)
        (weights * torch.from_numpy(grad[:, :, row : row + 1])).sum().backward()
        expected = keys.grad[..., 0].numpy()  # type: ignore[index]
        np.testing.assert_allclose(ours[:, :, row], expected, rtol=1e-4, atol=1e-6 * max(1.0, np.abs(expected).max()))


# --- what padded and later numbers may not do -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["super", *(pytest.param(n, marks=pytest.mark.slow) for n in ("standard", "efficient+expressive"))]
)
def test_not_a_number_in_padding_never_reaches_the_output(name: str, rng: np.random.Generator) -> None:
    one = layer(name, rng)
    x = rng.normal(size=(2, S, D)).astype("float32")
    bad = x.copy()
    present = np.arange(S) < np.array([[4], [S]])
    bad[~present] = np.nan
    for scores in (False, True):
        settings = {"value_mask": present, "return_attention_scores": scores}
        got, expected = (keras.tree.flatten(one(x, one_value, **settings)) for one_value in (bad, x))
        for a, b in zip(got, expected, strict=True):
            agree(a, numbers(b))


def test_no_later_token_changes_an_earlier_output(rng: np.random.Generator) -> None:
    for name in ("standard", "expressive", "super causal", "super window"):
        one = layer(name, rng)
        x = rng.normal(size=(1, S, D)).astype("float32")
        changed = x.copy()
        changed[:, 4:] += 1.0
        a, b = (numbers(one(v, v, use_causal_mask=True)) for v in (x, changed))
        np.testing.assert_array_equal(a[:, :4], b[:, :4])
        assert np.abs(a[:, 4:] - b[:, 4:]).max() > 1e-3
