"""The compiled kernels in JAX: the numbers of the oracle and of keras.ops, forward and backward, in transforms."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import better_attention.keras as bk
from better_attention.impl import native
from better_attention.keras.scores import SCORES
from better_attention.native import structs
from helpers import oracle
from helpers.layers import refused

if keras.backend.backend() != "jax":
    pytest.skip("the kernels are for JAX", allow_module_level=True)

import jax
import jax.numpy as jnp

from better_attention.keras import kernels

# Building them takes a C++ compiler some seconds, once for each version of jaxlib: not in the unit tests.
pytestmark = pytest.mark.slow
B, L, S, N, G, H, W = 2, 5, 7, 4, 2, 3, 6


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        pytest.skip("there is no C++ compiler")
    if (reason := native.missing()) is not None:
        pytest.skip(reason)
    # Whatever else keeps the kernels away is a fault, and nothing to skip.
    assert kernels.missing() is None


def inputs(rng: np.random.Generator, *, heads: int = G, dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    shapes = (B, L, N, H), (B, S, heads, H), (B, S, heads, W)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)  # type: ignore[return-value]


def reference(q: Any, k: Any, v: Any, mask: Any = None, *, score: str, causal: bool, scale: float = H**-0.5) -> Any:
    """The same in jax.numpy, for derivatives."""
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    z = jnp.einsum("blnh,bsnh->bnls", q, k) * scale
    keep = jnp.ones(z.shape, bool) if mask is None else jnp.broadcast_to(mask, z.shape)
    keep = keep & jnp.tril(jnp.ones(z.shape, bool)) if causal else keep
    return jnp.einsum("bnls,bsnw->blnw", SCORES[score](z, keep), v)


MASKS = {"none": None, "(B,1,1,S)": (B, 1, 1, S), "(1,1,L,S)": (1, 1, L, S), "(B,N,L,S)": (B, N, L, S)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("score", kernels.SCORES)
def test_forward_and_backward(score: str, causal: bool, mask: str, rng: np.random.Generator) -> None:
    q, k, v = inputs(rng)
    shape = MASKS[mask]
    keep = None if shape is None else jnp.asarray(rng.random(shape) < 0.6)
    settings = {"score": score, "causal": causal}
    out = kernels.attention(q, k, v, keep, **settings)
    truth, _ = oracle.attention(
        *(np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q, k, v)),
        score=score,
        causal=causal,
        keep=None if keep is None else np.broadcast_to(np.asarray(keep), (B, N, L, S)),
    )
    np.testing.assert_allclose(np.swapaxes(np.asarray(out), 1, 2), truth, atol=2e-6)
    grad = jnp.asarray(rng.normal(size=out.shape), jnp.float32)

    def loss(function: Any) -> Any:
        return lambda *x: (function(*x, keep, **settings) * grad).sum()

    ours = jax.jit(jax.grad(loss(kernels.attention), argnums=(0, 1, 2)))(q, k, v)
    expected = jax.grad(loss(reference), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


def test_bfloat16_scale_and_threads(rng: np.random.Generator) -> None:
    q, k, v = inputs(rng, dtype=jnp.bfloat16)
    out = kernels.attention(q, k, v, score="expressive", scale=0.9, threads=2)
    assert out.dtype == jnp.bfloat16
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = reference(*wide, score="expressive", causal=False, scale=0.9)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)


def test_vmap_goes_over_one_call_at_a_time(rng: np.random.Generator) -> None:
    pairs = [inputs(rng) for _ in range(3)]
    stacked = [jnp.stack(x) for x in zip(*pairs, strict=True)]
    mapped = jax.vmap(lambda q, k, v: kernels.attention(q, k, v, causal=True))(*stacked)
    for out, pair in zip(mapped, pairs, strict=True):
        np.testing.assert_array_equal(out, kernels.attention(*pair, causal=True))


@pytest.mark.parametrize("mechanism", ["standard", "efficient+expressive", "super"])
def test_a_layer_with_kernels_is_the_same_layer(mechanism: str, rng: np.random.Generator) -> None:
    options = {"mechanism": mechanism, **({"max_len": S, "align_causal": True} if mechanism == "super" else {})}
    plain, fast = (bk.MultiHeadAttention(2, 3, impl=impl, **options) for impl in ("ops", "kernels"))
    x = rng.normal(size=(B, S, 6)).astype("float32")
    for layer in (plain, fast):
        layer.build(x.shape, x.shape)
    fast.set_weights(plain.get_weights())
    present = np.arange(S) < np.array([[4], [S]])
    for settings in ({}, {"use_causal_mask": True}, {"value_mask": present}, {"return_attention_scores": True}):
        got, expected = (keras.tree.flatten(layer(x, x, **settings))[0] for layer in (fast, plain))
        np.testing.assert_allclose(got, expected, atol=2e-6)
    inside = keras.Input((S, 6))
    model = keras.Model(inside, fast(inside, inside, use_causal_mask=True))
    model.compile(keras.optimizers.Adam(0.03), "mse")
    losses = model.fit(x, np.roll(x, 1, axis=1) * 0.5, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_numbers_are_those_of_the_interface() -> None:
    assert kernels.SCORES == structs.SCORES


def test_wrong_arguments(rng: np.random.Generator) -> None:
    q, k, v = inputs(rng)
    refused(lambda: kernels.attention(q[0], k, v), "batch, length, heads, width", "(5, 4, 3)")
    refused(lambda: kernels.attention(q, k[:, :, :, :2], v), "agree", "(2, 7, 2, 2)")
    refused(lambda: kernels.attention(q[:, :, :3], k, v), "multiple of G")
    refused(lambda: kernels.attention(q, k.astype(jnp.float16), v), "bfloat16", "float16")
    refused(lambda: kernels.attention(q, k, v, jnp.ones((L, S), bool)), "4 dimensions", "(5, 7)")
    refused(lambda: kernels.attention(q, k, v, jnp.ones((B, 1, L, S))), "bool", "float32")
    refused(lambda: kernels.attention(q, k, v, score="relu"), "score", "'relu'")
    refused(lambda: kernels.attention(q, k, v, threads=0), "threads", "0")


def test_the_build_says_what_is_wrong(tmp_path: Path) -> None:
    def command(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "better_attention.keras.kernels"],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    absent = command(CXX="no-such-compiler")
    assert absent.returncode == 1
    assert "no C++ compiler 'no-such-compiler'" in absent.stderr
    failing = command(CXX=f"{sys.executable} -c raise(SystemExit('nothing_compiles'))")
    assert failing.returncode == 1
    assert "could not be built" in failing.stderr
    assert "nothing_compiles" in failing.stderr
    off = command(BETTER_ATTENTION_NATIVE="0", CXX="no-such-compiler")
    assert off.returncode == 1
    assert "switched off by BETTER_ATTENTION_NATIVE=0" in off.stderr
    assert list(tmp_path.rglob("*.so")) == []
