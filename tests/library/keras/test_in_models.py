"""The layer in the life of a Keras model: specs, training, precision, files, quantisation, symbolic and eager calls."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import better_attention as ba
import better_attention.keras as bk

N, H, D, S = 2, 3, 6, 7
BACKEND = keras.backend.backend()
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras on NumPy does not train")

OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {},
    "efficient+expressive": {"mechanism": "efficient+expressive"},
    "super": {"mechanism": "super", "max_len": S},
}


def numbers(x: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")), dtype=np.float64)


def tokens(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype("float32")


def model(name: str = "super", length: int | None = S, **options: Any) -> keras.Model:
    """Self-attention in a functional model."""
    inputs = keras.Input((length, D))
    outputs = bk.MultiHeadAttention(N, H, name="attention", **{**OPTIONS[name], **options})(inputs, inputs)
    return keras.Model(inputs, outputs)


class Subclassed(keras.Model):
    """The same as :func:`model`, built by its first call."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attention = bk.MultiHeadAttention(N, H, **OPTIONS[name])

    def call(self, x: Any, training: bool = False) -> Any:
        return self.attention(x, x, training=training)


# --- configurations ---------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "num_heads": N,
    "key_dim": H,
    "value_dim": 5,
    "dropout": 0.25,
    "use_bias": False,
    "output_shape": (5, 2),
    "attention_axes": (1,),
    "flash_attention": False,
    "kernel_initializer": keras.initializers.HeNormal(seed=3),
    "bias_initializer": "ones",
    "kernel_regularizer": keras.regularizers.L2(0.5),
    "bias_regularizer": keras.regularizers.L1(0.5),
    "activity_regularizer": keras.regularizers.L2(0.25),
    "kernel_constraint": keras.constraints.MaxNorm(3),
    "bias_constraint": "non_neg",
    "use_gate": True,
    "seed": 4,
    "mechanism": "standard+align",
    "score": "expressive",
    "max_len": 11,
    "align_heads": "per_head",
    "align_causal": True,
    "align_init": "identity",
    "scale": 0.5,
    "name": "attention",
    "dtype": "mixed_bfloat16",
}
"""Every argument with a value that is not its default."""


def test_a_configuration_holds_every_argument() -> None:
    layer = bk.MultiHeadAttention(**EVERYTHING)
    config = json.loads(json.dumps(layer.get_config()))  # as a file holds it
    twin = bk.MultiHeadAttention.from_config(config)
    assert json.loads(json.dumps(twin.get_config())) == config
    assert layer.mechanism == twin.mechanism == ba.Mechanism.of("standard+align+expressive")
    for name, value in EVERYTHING.items():
        if isinstance(value, int | float | str | tuple) and name not in ("mechanism", "score", "dtype"):
            written = config[name]
            if isinstance(written, dict):  # an initialiser or a constraint that came by its name
                assert written["class_name"] in ("Ones", "NonNeg")
            else:
                assert (tuple(written) if isinstance(written, list) else written) == value, name
    theirs = set(keras.layers.MultiHeadAttention(N, H).get_config())
    assert theirs <= config.keys()


@pytest.mark.parametrize(
    "mechanism",
    [*ba.MECHANISMS, "efficient+expressive", "optimized", ba.Mechanism(frozenset("kv"), score="expressive")],
)
def test_every_mechanism_survives_its_configuration(mechanism: Any) -> None:
    length = {"max_len": 5} if ba.Mechanism.of(mechanism).aligned else {}
    layer = bk.MultiHeadAttention(N, H, mechanism=mechanism, **length)
    config = json.loads(json.dumps(layer.get_config()))
    assert bk.MultiHeadAttention.from_config(config).mechanism == ba.Mechanism.of(mechanism)


def test_positions_of_the_arguments_are_those_of_keras() -> None:
    from inspect import Parameter, signature

    def listed(function: Any) -> list[tuple[str, Any]]:
        return [
            (p.name, p.default) for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD
        ]

    theirs = keras.layers.MultiHeadAttention
    assert listed(bk.MultiHeadAttention.__init__)[: len(listed(theirs.__init__))] == listed(theirs.__init__)
    for method in ("call", "build", "compute_output_shape", "compute_output_spec"):
        assert listed(getattr(bk.MultiHeadAttention, method)) == listed(getattr(theirs, method))


# --- shapes and symbols -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"output_shape": (5, 2)}]
    + [pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"value_dim": 5}, {"mechanism": "efficient"})],
)
def test_symbolic_shapes_are_those_of_numbers(options: dict[str, Any], rng: np.random.Generator) -> None:
    layer = bk.MultiHeadAttention(N, H, **options)
    query, value = tokens(rng, 2, 5, D), tokens(rng, 2, S, D)
    symbols = layer(keras.KerasTensor((2, 5, D)), keras.KerasTensor((2, S, D)), return_attention_scores=True)
    results = layer(query, value, return_attention_scores=True)
    assert [x.shape for x in symbols] == [tuple(x.shape) for x in results]
    assert layer.compute_output_shape((None, 5, D), (None, S, D)) == (None, *results[0].shape[1:])
    half = bk.MultiHeadAttention(N, H, dtype="mixed_bfloat16", **options)
    spec = half.compute_output_spec(keras.KerasTensor((2, 5, D)), keras.KerasTensor((2, S, D)))
    assert spec.dtype == keras.backend.standardize_dtype(half(query, value).dtype) == "bfloat16"


@pytest.mark.slow
def test_any_batch_and_length(rng: np.random.Generator) -> None:
    whole = model("super", length=None)
    for shape in ((1, 3, D), (4, S, D)):
        x = tokens(rng, *shape)
        layer = whole.get_layer("attention")
        np.testing.assert_allclose(whole.predict(x, verbose=0), numbers(layer(x, x)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_subclassed_and_functional_models_agree(name: str, rng: np.random.Generator) -> None:
    x = tokens(rng, 2, S, D)
    first, second = model(name), Subclassed(name)
    second(x)
    second.set_weights(first.get_weights())
    np.testing.assert_allclose(numbers(second(x)), first.predict_on_batch(x), atol=1e-6)


# --- training ---------------------------------------------------------------------------------------------------------


@trains
@pytest.mark.parametrize(
    ("name", "jit"),
    [("super", True), pytest.param("efficient+expressive", False, marks=pytest.mark.slow)]
    + [pytest.param(name, jit, marks=pytest.mark.slow) for name in OPTIONS for jit in (True, False)],
)
def test_it_learns_compiled_and_not(name: str, jit: bool, rng: np.random.Generator) -> None:
    if BACKEND == "torch" and jit:
        pytest.skip("Keras on torch compiles with a C++ compiler of its own")
    x = tokens(rng, 8, S, D)
    one = model(name, dropout=0.1)
    before = {variable.path: numbers(variable) for variable in one.trainable_variables}
    one.compile(keras.optimizers.Adam(0.03), "mse", jit_compile=jit)
    history = one.fit(x, np.roll(x, 1, axis=1) * 0.5, batch_size=4, epochs=12, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    for variable in one.trainable_variables:
        if "key/bias" not in variable.path:  # softmax does not see the keys' bias
            assert np.abs(numbers(variable) - before[variable.path]).max() > 1e-4, variable.path


@trains
@pytest.mark.slow
def test_masked_tokens_learn_nothing_and_disturb_nobody(rng: np.random.Generator) -> None:
    words = np.array([[3, 1, 4, 0, 0, 0, 0], [2, 7, 1, 8, 2, 8, 0]])
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, D, mask_zero=True)(inputs)
    x = bk.MultiHeadAttention(N, H, mechanism="super+expressive", max_len=S)(x, x)
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x))
    one = keras.Model(inputs, outputs)
    one.compile("adam", "mse")
    one.fit(words, np.array([0.0, 1.0]), epochs=3, verbose=0)
    assert all(np.isfinite(w).all() for w in one.get_weights())
    padded = one.predict(words, verbose=0)
    longer = one.predict(words[:, :6], verbose=0)
    np.testing.assert_allclose(padded, longer, atol=1e-6)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "bound"), [("mixed_bfloat16", 4e-2), pytest.param("mixed_float16", 4e-3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["super", pytest.param("efficient+expressive", marks=pytest.mark.slow)])
def test_half_precision_stays_near(name: str, policy: str, bound: float, rng: np.random.Generator) -> None:
    x = tokens(rng, 2, S, D)
    full = bk.MultiHeadAttention(N, H, **OPTIONS[name])
    half = bk.MultiHeadAttention(N, H, dtype=policy, **OPTIONS[name])
    for layer in (full, half):
        layer.build(x.shape, x.shape)
    half.set_weights(full.get_weights())
    assert {keras.backend.standardize_dtype(v.dtype) for v in half.trainable_variables} == {"float32"}
    expected, weights = full(x, x, return_attention_scores=True)
    got, got_weights = half(x, x, return_attention_scores=True)
    for value in (got, got_weights):
        assert keras.backend.standardize_dtype(value.dtype) == policy.removeprefix("mixed_")
    np.testing.assert_allclose(numbers(got), numbers(expected), atol=bound * np.abs(numbers(expected)).max())
    np.testing.assert_allclose(numbers(got_weights), numbers(weights), atol=bound)


def test_squares_of_large_scores_do_not_overflow_in_half_precision() -> None:
    layer = bk.MultiHeadAttention(
        1, 2, mechanism=ba.Mechanism(frozenset(), score="expressive"), dtype="float16", scale=1.0
    )
    x = np.array([[[20.0, 20.0], [20.0, -20.0], [15.0, 15.0]]], "float16")  # products of 800, squares of 640,000
    _, weights = layer(x, x, return_attention_scores=True)
    np.testing.assert_allclose(numbers(weights)[0, 0, 0], [0.5, 0.0, 0.5], atol=1e-3)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["super", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS if n != "super")])
def test_a_saved_model_is_the_same_model(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    one = model(name, dropout=0.1)
    file = tmp_path / "model.keras"
    one.save(file)
    twin = keras.models.load_model(file)
    x = tokens(rng, 2, S, D)
    assert np.abs(twin.predict_on_batch(x) - one.predict_on_batch(x)).max() == 0.0
    assert twin.get_layer("attention").mechanism == one.get_layer("attention").mechanism
    weights = tmp_path / "model.weights.h5"
    one.save_weights(weights)
    other = model(name, dropout=0.1)
    other.load_weights(weights)
    assert np.abs(other.predict_on_batch(x) - one.predict_on_batch(x)).max() == 0.0


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize")
@pytest.mark.filterwarnings("ignore:[^`]*`custom_gradient` for the numpy backend")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_like_keras(mode: str, tmp_path: Path, rng: np.random.Generator) -> None:
    x = tokens(rng, 2, S, D)
    inputs = keras.Input((S, D))
    theirs = keras.Model(inputs, keras.layers.MultiHeadAttention(N, H)(inputs, inputs))
    ours, aligned = model("standard"), model("super")
    ours.set_weights(theirs.get_weights())
    before = aligned.predict_on_batch(x)
    for one in (theirs, ours, aligned):
        one.quantize(mode)
    np.testing.assert_allclose(ours.predict_on_batch(x), theirs.predict_on_batch(x), atol=1e-6)
    layer = aligned.get_layer("attention")
    assert layer.query_dense.quantization_mode == layer.output_dense.quantization_mode == mode
    assert keras.backend.standardize_dtype(layer.align.kernel.dtype) == "float32"  # Keras quantises no other kernels
    after = aligned.predict_on_batch(x)
    assert 0 < np.abs(after - before).max() < (0.05 if mode == "int8" else 0.5) * np.abs(before).max()
    with pytest.raises(ValueError, match="quantised weights"):
        bk.to_torch_state(layer)
    # Keras' way to make such a layer again: a policy for each map that was quantised.
    policies = keras.dtype_policies.DTypePolicyMap()
    for dense in (layer.query_dense, layer.output_dense):
        policies[dense.path] = dense.dtype_policy
    weights = tmp_path / "quantised.weights.h5"
    aligned.save_weights(weights)
    twin = model("super", dtype=policies)
    twin.load_weights(weights)
    np.testing.assert_array_equal(twin.predict_on_batch(x), after)


def test_low_rank_adapters_go_on_the_maps(rng: np.random.Generator) -> None:
    x = tokens(rng, 2, S, D)
    layer = bk.MultiHeadAttention(N, H, mechanism="efficient")
    before = numbers(layer(x, x))
    layer.query_dense.enable_lora(2)
    np.testing.assert_allclose(numbers(layer(x, x)), before, atol=1e-6)
    layer.query_dense.lora_kernel_b.assign(rng.normal(size=layer.query_dense.lora_kernel_b.shape))
    adapted = numbers(layer(x, x))
    assert np.abs(adapted - before).max() > 1e-3
    merged = bk.MultiHeadAttention(N, H, mechanism="efficient")
    merged.build(x.shape, x.shape)
    bk.from_torch_state(merged, bk.to_torch_state(layer))
    np.testing.assert_allclose(numbers(merged(x, x)), adapted, atol=1e-5)
    with pytest.raises(ValueError, match="LoRA"):
        bk.from_torch_state(layer, bk.to_torch_state(merged))


def test_the_backend_is_the_one_that_was_asked_for() -> None:
    assert os.environ["KERAS_BACKEND"] == BACKEND
