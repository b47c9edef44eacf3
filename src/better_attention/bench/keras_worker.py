"""A separate process for Keras on JAX: backend and number of threads can be set only before the first import."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from better_attention.bench.machine import extra_memory


@dataclass(frozen=True, slots=True)
class Task:
    """What the worker computes; the arrays are NumPy's, float32.

    Args:
        heads, dtype, threads: settings.
        weights: those of our standard layer, by name.
        x: input (B, L, D).
        grad: of the output, for training; None for inference.
    """

    heads: int
    dtype: str
    threads: int
    weights: Mapping[str, Any]
    x: Any
    grad: Any


def serve(pipe: Connection, task: Task) -> None:
    """Answer ("sample", calls), ("results", 0), ("memory", 0) and ("note", 0) until the other side hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    try:
        call, results, note = _set_up(task)
        call()  # compiles
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        return
    answers: dict[str, Callable[[int], object]] = {
        "sample": lambda calls: _sample(call, calls),
        "results": lambda _: results(),
        "memory": lambda _: extra_memory(call),
        "note": lambda _: note(),
    }
    with suppress(EOFError, ConnectionError):
        while True:
            question, argument = pipe.recv()
            try:
                reply: tuple[str, object] = ("answer", answers[question](argument))
            except Exception as error:
                reply = ("error", f"{type(error).__name__}: {error}")
            pipe.send(reply)


def _set_up(task: Task) -> tuple[Callable[[], object], Callable[[], dict[str, Any]], Callable[[], str]]:
    # Before the import below: Keras and JAX read them once.
    os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", NPROC=str(task.threads))
    if hasattr(os, "sched_setaffinity"):  # JAX starts as many threads as there are cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    jax, keras, np = (importlib.import_module(name) for name in ("jax", "keras", "numpy"))
    _, _, width = task.x.shape
    layer = keras.layers.MultiHeadAttention(task.heads, width // task.heads, dtype=task.dtype)
    layer.build(task.x.shape, task.x.shape)
    # Keras lists the maps of q, k, v and the output, of each the kernel before the bias.
    layer.set_weights(list(_to_keras(task.weights, task.heads).values()))
    parameters = [variable.value for variable in layer.trainable_variables]
    x = jax.numpy.asarray(task.x, dtype=task.dtype)

    def forward(parameters: Any, x: Any) -> Any:
        return layer.stateless_call(parameters, [], x, x)[0]

    if task.grad is None:
        compiled = jax.jit(forward)
    else:
        grad = jax.numpy.asarray(task.grad, dtype=task.dtype)

        def loss(parameters: Any, x: Any, grad: Any) -> Any:
            output = forward(parameters, x)
            # The gradients of this sum are those that backward(grad) gives in torch.
            return (output * grad).sum(), output

        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

        def compiled(parameters: Any, x: Any) -> Any:
            return gradients(parameters, x, grad)

    def call() -> Any:
        # JAX returns before it has computed.
        return jax.block_until_ready(compiled(parameters, x))

    def results() -> dict[str, Any]:
        if task.grad is None:
            return {"output": np.asarray(call(), np.float32)}
        (_, output), (by_parameter, by_x) = call()
        arrays = {"output": output, "input": by_x} | _from_keras(by_parameter, width)
        return {name: np.array(array, np.float32) for name, array in arrays.items()}

    return call, results, _threads


def _to_keras(weights: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Our (out, in) weights as Keras' kernels: (in, heads, width) for q, k, v, and (heads, width, out)."""
    arrays = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = weights[f"{name}.weight"]
        arrays[f"{name}.weight"] = weight.T.reshape(weight.shape[1], heads, -1)
        arrays[f"{name}.bias"] = weights[f"{name}.bias"].reshape(heads, -1)
    weight = weights["out_proj.weight"]
    return arrays | {
        "out_proj.weight": weight.T.reshape(heads, -1, len(weight)),
        "out_proj.bias": weights["out_proj.bias"],
    }


def _from_keras(arrays: list[Any], width: int) -> dict[str, Any]:
    """Keras' list of gradients under our names and in our layout; the inverse of :func:`_to_keras`."""
    names = [f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    named = dict(zip(names, arrays, strict=True))
    return {
        name: array.reshape(width, width).T if name.endswith("weight") else array.reshape(width)
        for name, array in named.items()
    }


def _threads() -> str:
    """How many threads XLA computes with, counted, where the system lets us."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return "jit, in its own process; JAX chose its number of threads"
    names = [(task / "comm").read_text("utf-8").strip() for task in tasks.iterdir()]
    return f"jit, in its own process; threads of XLA: {names.count('tf_XLAEigen')}"


def _sample(call: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return perf_counter() - start
