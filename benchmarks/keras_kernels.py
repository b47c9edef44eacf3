"""The compiled kernels in JAX against ``keras.ops``, by turns in one process: times as fast, with the spread.

    python -m benchmarks.keras_kernels [--rounds 9] [--quick] [--out FILE.json]

Softmax attention in ``keras.ops`` is ``keras.ops.dot_product_attention``, which is jax.nn's; expressive attention is
what ``better_attention.keras`` computes by default. Both sides are jitted, and agree to 1e-4, which is checked
first. XLA takes its number of threads from NPROC and from the cores that this process may use, the kernels take theirs
from OMP_NUM_THREADS: this pins both to one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", NPROC="1", OMP_NUM_THREADS="1")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

import jax
import keras
import numpy as np

from better_attention.bench.machine import describe
from better_attention.keras import kernels
from better_attention.keras.scores import SCORES

SHAPES = ((8, 257, 8, 32), (1, 2048, 8, 32))
"""Batch, length, heads, width of a head."""


def in_ops(score: str, causal: bool) -> Callable[..., Any]:
    """Attention as the layer computes it by default."""

    def attention(q: Any, k: Any, v: Any) -> Any:
        if score == "softmax":
            return keras.ops.dot_product_attention(q, k, v, is_causal=causal)
        z = keras.ops.einsum("blnh,bsnh->bnls", q * q.shape[-1] ** -0.5, k)
        keep = keras.ops.tril(keras.ops.ones(z.shape[-2:], "bool")) if causal else None
        return keras.ops.einsum("bnls,bsnh->blnh", SCORES[score](z, keep), v)

    return attention


def seconds(call: Callable[[], Any], calls: int) -> float:
    """The mean time of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / calls


def compare(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: tuple[Any, ...], rounds: int) -> list[float]:
    """How many times as fast ours is, round by round, sorted."""
    ours, theirs = jax.jit(ours), jax.jit(theirs)
    for a, b in zip(jax.tree.leaves(ours(*inputs)), jax.tree.leaves(theirs(*inputs)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    calls = max(1, int(0.1 / seconds(lambda: theirs(*inputs), 1)))
    return sorted(
        seconds(lambda: theirs(*inputs), calls) / seconds(lambda: ours(*inputs), calls) for _ in range(rounds)
    )


def main() -> None:
    """Measure and print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the first shape, without the causal mask")
    parser.add_argument("--out", type=Path, help="write the figures and the machine into this JSON file")
    options = parser.parse_args()
    command = f"python -m benchmarks.keras_kernels --rounds {options.rounds}{' --quick' if options.quick else ''}"
    machine = describe(command)
    print(f"{machine['cpu']}, one thread, JAX {jax.__version__}, Keras {keras.__version__}, {options.rounds} rounds")
    print(f"{'shape':<18}{'score':<12}{'causal':<8}{'mode':<10}{'times as fast':>14}{'lowest':>8}{'highest':>9}")
    rng = np.random.default_rng(0)
    rows = []
    for shape in SHAPES[:1] if options.quick else SHAPES:
        inputs = tuple(rng.normal(size=shape).astype("float32") for _ in range(4))
        for score in kernels.SCORES:
            for causal in (False,) if options.quick else (False, True):
                for mode, ratios in modes(score, causal, inputs, options.rounds):
                    row = {"shape": shape, "score": score, "causal": causal, "mode": mode}
                    row |= {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
                    rows.append(row)
                    print(
                        f"{'x'.join(map(str, shape)):<18}{score:<12}{causal!s:<8}{mode:<10}"
                        f"{row['median']:>14.2f}{row['lowest']:>8.2f}{row['highest']:>9.2f}",
                        flush=True,
                    )
    if options.out is not None:
        document = {"machine": machine, "rounds": options.rounds, "rows": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def modes(score: str, causal: bool, inputs: tuple[Any, ...], rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Inference, then training: the output and all gradients."""
    *qkv, grad = inputs

    def ours(q: Any, k: Any, v: Any) -> Any:
        return kernels.attention(q, k, v, score=score, causal=causal, threads=1)

    theirs = in_ops(score, causal)
    yield "inference", compare(ours, theirs, tuple(qkv), rounds)
    both = (
        jax.grad(lambda q, k, v, function=function: (function(q, k, v) * grad).sum(), argnums=(0, 1, 2))
        for function in (ours, theirs)
    )
    yield "training", compare(*both, tuple(qkv), rounds)


if __name__ == "__main__":
    main()
