"""Standard attention is Keras' own layer: the same weights, the same numbers, whatever the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import better_attention.keras as bk

N, H, D = 2, 3, 6
TOLERANCE = 1e-5


def numbers(x: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(x), dtype=np.float64)


def pair(rng: np.random.Generator, *shapes: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    """Keras' layer and ours, with the same random weights, biases too."""
    theirs = keras.layers.MultiHeadAttention(**{"num_heads": N, "key_dim": H, **options})
    ours = bk.MultiHeadAttention(**{"num_heads": N, "key_dim": H, **options})
    for layer in (theirs, ours):
        layer.build(*shapes)
    weights = [rng.normal(size=w.shape) * 0.4 for w in theirs.get_weights()]
    trainable = len(theirs.trainable_variables)
    assert [v.shape for v in ours.trainable_variables] == [v.shape for v in theirs.trainable_variables]
    theirs.set_weights([*weights[:trainable], *theirs.get_weights()[trainable:]])
    ours.set_weights([*weights[:trainable], *ours.get_weights()[trainable:]])
    return theirs, ours


def tokens(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype("float32")


def agree(ours: Any, theirs: Any, where: np.ndarray | None = None) -> None:
    ours, theirs = numbers(ours), numbers(theirs)
    assert ours.shape == theirs.shape
    if where is not None:
        ours, theirs = ours[where], theirs[where]
        assert len(ours)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, np.abs(theirs).max()))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value_dim": {"value_dim": 5},
    "no bias": {"use_bias": False},
    "output_shape": {"output_shape": 11},
    "output_shape of two": {"output_shape": (5, 2)},
    "gate": {"use_gate": True},
    "gate and value_dim": {"use_gate": True, "value_dim": 5},
    "sliding_window": {"sliding_window": 3},
    "dropout in inference": {"dropout": 0.5},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "scores": {"return_attention_scores": True},
    "scores and causal": {"return_attention_scores": True, "use_causal_mask": True},
}


COMPILED = {("plain", call) for call in CALLS} | {(options, "scores and causal") for options in OPTIONS}
COMPILED |= {("value_dim", "plain")}
"""What the unit tests run: JAX compiles every operation for every new shape, so that all pairs take their time."""


def unit(value: object, chosen: bool) -> object:
    """A parameter of the unit tests if it is chosen, and else of the long ones."""
    return value if chosen else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


@pytest.mark.parametrize(("options", "call"), [unit((o, c), (o, c) in COMPILED) for o in OPTIONS for c in CALLS])
def test_every_option_gives_the_numbers_of_keras(options: str, call: str, rng: np.random.Generator) -> None:
    query, value, key = tokens(rng, 2, 5, D), tokens(rng, 2, 7, 4), tokens(rng, 2, 7, 5)
    theirs, ours = pair(rng, query.shape, value.shape, key.shape, **OPTIONS[options])
    if "value_dim" in OPTIONS[options] and "return_attention_scores" not in CALLS[call]:
        # Keras' own layer ends in an error there on JAX, whose kernel has one width for keys and values.
        expected = theirs(query, value, key, return_attention_scores=True, **CALLS[call])[0]
    else:
        expected = theirs(query, value, key, **CALLS[call])
    got = ours(query, value, key, **CALLS[call])
    if "return_attention_scores" not in CALLS[call]:
        agree(got, expected)
        return
    agree(got[0], expected[0])
    agree(got[1], expected[1])


MASKS: dict[str, Any] = {
    "(B,L,S)": (2, 5, 7),
    "(1,L,S)": (1, 5, 7),
    "(L,S)": (5, 7),
    "(B,1,L,S)": (2, 1, 5, 7),
    "(B,N,L,S)": (2, N, 5, 7),
    "(B,1,1,S)": (2, 1, 1, 7),
}


@pytest.mark.parametrize("shape", [unit(shape, shape in ("(B,L,S)", "(B,N,L,S)")) for shape in MASKS])
def test_every_form_of_attention_mask(shape: str, rng: np.random.Generator) -> None:
    query, value = tokens(rng, 2, 5, D), tokens(rng, 2, 7, D)
    theirs, ours = pair(rng, query.shape, value.shape)
    mask = rng.random(MASKS[shape]) < 0.6
    mask[..., 0] = True  # a query that sees no key is where the two differ on purpose
    for settings in ({}, {"use_causal_mask": True}):
        agree(
            ours(query, value, attention_mask=mask, **settings), theirs(query, value, attention_mask=mask, **settings)
        )
    agree(ours(query, value, attention_mask=mask.astype("int32")), ours(query, value, attention_mask=mask))


def test_value_and_key_masks(rng: np.random.Generator) -> None:
    query, value, key = tokens(rng, 2, 5, D), tokens(rng, 2, 7, D), tokens(rng, 2, 7, D)
    theirs, ours = pair(rng, query.shape, value.shape, key.shape)
    masks = {"value_mask": rng.random((2, 7)) < 0.7, "key_mask": rng.random((2, 7)) < 0.7}
    for mask in masks.values():
        mask[:, 0] = True
    for settings in ({}, {"use_causal_mask": True}, {"return_attention_scores": True}):
        got, expected = (keras.tree.flatten(layer(query, value, key, **masks, **settings)) for layer in (ours, theirs))
        for a, b in zip(got, expected, strict=True):
            agree(a, b)


AXES: dict[str, Any] = {
    "last of two": (2,),
    "first of two": 1,
    "both": (1, 2),
    "both, reversed": (2, 1),
    "from the end": -2,
}


@pytest.mark.parametrize("axes", [unit(axes, axes in ("first of two", "both, reversed")) for axes in AXES])
def test_attention_axes(axes: str, rng: np.random.Generator) -> None:
    attended = (AXES[axes],) if isinstance(AXES[axes], int) else AXES[axes]
    attended = tuple(axis % 4 for axis in attended)
    shape, other = [2, 3, 5, D], [2, 3, 5, D]
    for axis in attended:
        other[axis] += 1
    query, value = tokens(rng, *shape), tokens(rng, *other)
    theirs, ours = pair(rng, query.shape, value.shape, attention_axes=AXES[axes])
    expected, weights = theirs(query, value, return_attention_scores=True)
    got, ours_weights = ours(query, value, return_attention_scores=True)
    agree(got, expected)
    agree(ours_weights, weights)
    lengths = [s[axis] for s in (shape, other) for axis in attended]
    mask = rng.random((2, *(shape[axis] for axis in (1, 2) if axis not in attended), *lengths)) < 0.7
    mask[(..., *[0] * len(attended))] = True
    agree(ours(query, value, attention_mask=mask), theirs(query, value, attention_mask=mask))
    agree(ours(query, value), expected)


@pytest.mark.slow
def test_a_causal_mask_follows_the_attended_axis(rng: np.random.Generator) -> None:
    """Keras takes the first axis for the sequence whichever is attended over: with equal lengths the two agree."""
    x = tokens(rng, 2, 5, 5, D)
    theirs, ours = pair(rng, x.shape, x.shape, attention_axes=2)
    agree(ours(x, x, use_causal_mask=True), theirs(x, x, use_causal_mask=True))
    y = tokens(rng, 2, 3, 5, D)
    alone = ours(y[:, 1:2], y[:, 1:2], use_causal_mask=True)
    agree(ours(y, y, use_causal_mask=True)[:, 1:2], alone)


def test_masks_are_carried_through_a_model(rng: np.random.Generator) -> None:
    words = np.array([[3, 1, 4, 0, 0], [2, 7, 1, 8, 2]])
    theirs, ours = pair(rng, (None, None, D), (None, None, D))
    embedding = keras.layers.Embedding(9, D, mask_zero=True)
    inputs = keras.Input((None,), dtype="int32")
    outputs = []
    for layer in (theirs, ours):
        x = embedding(inputs)
        x = layer(x, x)
        outputs += [x, keras.layers.GlobalAveragePooling1D()(x)]
    model = keras.Model(inputs, outputs)
    real = words != 0
    expected, expected_mean, got, got_mean = model.predict_on_batch(words)
    agree(got, expected, real)
    agree(got_mean, expected_mean)  # pooling reads the mask that the layer passes on
    unmasked = ours(embedding(words) * 1.0, embedding(words) * 1.0)
    assert np.abs(numbers(unmasked)[0, 0] - numbers(got)[0, 0]).max() > 1e-3


def test_dropout_drops_the_same_weights_with_the_same_seed(rng: np.random.Generator) -> None:
    x = tokens(rng, 2, 7, D)
    theirs, ours = pair(rng, x.shape, x.shape, dropout=0.4, seed=11)
    agree(ours(x, x, training=True), theirs(x, x, training=True))
    again, other = ours(x, x, training=True), ours(x, x)
    assert np.abs(numbers(again) - numbers(other)).max() > 1e-3


def test_initial_weights_are_those_of_keras() -> None:
    for initial in ("glorot_uniform", "he_normal"):
        layers = []
        for kind in (keras.layers.MultiHeadAttention, bk.MultiHeadAttention):
            keras.utils.set_random_seed(5)
            layer = kind(N, H, kernel_initializer=initial, bias_initializer="ones", use_gate=True)
            layer.build((2, 5, D), (2, 7, 4))
            layers.append(layer)
        for a, b in zip(*(layer.get_weights() for layer in layers), strict=True):
            np.testing.assert_array_equal(a, b)


def test_regularisers_and_constraints() -> None:
    l2 = keras.regularizers.L2
    options = {"kernel_regularizer": l2(0.1), "bias_regularizer": l2(0.2), "activity_regularizer": l2(0.3)}
    options |= {"kernel_constraint": "non_neg", "bias_constraint": "max_norm", "bias_initializer": "ones"}
    x = np.ones((2, 5, D), "float32")
    losses = []
    for kind in (keras.layers.MultiHeadAttention, bk.MultiHeadAttention):
        keras.utils.set_random_seed(3)
        layer = kind(N, H, **options)
        layer(x, x)
        losses.append([float(numbers(loss)) for loss in layer.losses])
        assert [type(v.constraint).__name__ for v in layer.trainable_variables] == ["NonNeg", "MaxNorm"] * 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    aligned = bk.MultiHeadAttention(N, H, mechanism="super", max_len=5, **options)
    aligned.build(x.shape, x.shape)
    assert aligned.align.kernel.regularizer is options["kernel_regularizer"]
    assert type(aligned.align.kernel.constraint).__name__ == "NonNeg"


@pytest.mark.slow
def test_a_weight_file_of_keras_loads_into_ours_and_back(tmp_path: Path, rng: np.random.Generator) -> None:
    x = tokens(rng, 2, 7, D)
    models = []
    for kind in (keras.layers.MultiHeadAttention, bk.MultiHeadAttention):
        inputs = keras.Input((7, D))
        models.append(keras.Model(inputs, kind(N, H, name="attention")(inputs, inputs)))
    theirs, ours = models
    file = tmp_path / "one.weights.h5"
    for source, target in ((theirs, ours), (ours, theirs)):
        source.set_weights([rng.normal(size=w.shape) for w in source.get_weights()])
        source.save_weights(file)
        target.load_weights(file)
        agree(target.predict_on_batch(x), source.predict_on_batch(x))


def test_queries_that_see_nothing_give_the_bias_and_no_mean_of_hidden_values(rng: np.random.Generator) -> None:
    """The deliberate difference: Keras mixes all values there, hidden ones too."""
    x = tokens(rng, 2, 7, D)
    theirs, ours = pair(rng, x.shape, x.shape)
    mask = np.ones((2, 7, 7), bool)
    mask[0, 3] = False
    bias = numbers(ours.output_dense.bias)
    for settings in ({}, {"return_attention_scores": True}):
        got, expected = (
            keras.tree.flatten(layer(x, x, attention_mask=mask, **settings))[0] for layer in (ours, theirs)
        )
        np.testing.assert_allclose(numbers(got)[0, 3], bias, atol=1e-6)
        if keras.backend.backend() == "jax" and not settings:  # asked for scores, Keras has zeros there as well
            assert np.abs(numbers(expected)[0, 3] - bias).max() > 1e-2
        agree(got, expected, np.arange(14).reshape(2, 7) != 3)


def test_an_explicit_query_mask_is_honoured(rng: np.random.Generator) -> None:
    x = tokens(rng, 2, 7, D)
    _, ours = pair(rng, x.shape, x.shape)
    real = np.arange(7) < np.array([[4], [7]])
    got = numbers(ours(x, x, query_mask=real))
    agree(got, ours(x, x), real)
    np.testing.assert_allclose(got[~real], np.broadcast_to(numbers(ours.output_dense.bias), (3, D)), atol=1e-6)
