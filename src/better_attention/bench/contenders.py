"""Layers and kernels of other libraries, each used as its own documentation recommends.

Such a layer gets the weights of one of ours, and its gradients are reported under our names, so that the correctness
gate checks all of them alike.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import better_attention as ba
from better_attention.bench import keras_worker
from better_attention.bench.registry import Results, Run, Shape, Unavailable

INSTALL = 'pip install "better-attention[bench]"'
GOODBYE = 5.0
"""Seconds after which a worker process that does not end by itself is killed."""


Part = tuple[Tensor, slice]
"""A parameter and some of its rows."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A self-attention layer of any library.

    Args:
        module: with the parameters.
        forward: (B, L, D) -> (B, L, D).
        parts: our name of a parameter -> theirs and its rows there.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    parts: Mapping[str, Part]

    def load(self, ours: nn.Module) -> Layer:
        """Take over the weights of one of our layers."""
        state = ours.state_dict()
        with torch.no_grad():
            # A parameter that requires a gradient may not be changed in place where gradients are recorded.
            for name, (parameter, rows) in self.parts.items():
                parameter[rows].copy_(state[name])
        return self

    def gradients(self) -> Results:
        """Gradients under our names."""
        grads = {name: (parameter.grad, rows) for name, (parameter, rows) in self.parts.items()}
        return {name: grad[rows] for name, (grad, rows) in grads.items() if grad is not None}


def our_layer(layer: nn.Module) -> Layer:
    """One of ours."""
    parts: dict[str, Part] = {name: (parameter, slice(None)) for name, parameter in layer.named_parameters()}
    return Layer(layer, lambda x: layer(x, x, x, need_weights=False)[0], parts)


def torch_layer(shape: Shape, dtype: torch.dtype) -> Layer:
    """``nn.MultiheadAttention``; in inference it takes torch's fused fast path."""
    layer = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True, dtype=dtype)
    packed = {"weight": layer.in_proj_weight, "bias": layer.in_proj_bias}
    return Layer(layer, lambda x: layer(x, x, x, need_weights=False)[0], _unpacked(packed, layer.out_proj))


class FusedAttention(nn.Module):
    """What experienced users write instead: one product for q, k and v, views, SDPA, one product."""

    def __init__(self, width: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, dtype=dtype)
        self.out_proj = nn.Linear(width, width, dtype=dtype)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        B, L, _ = x_BLD.shape
        # From (B, L, 3, N, H) to (3, B, N, L, H), so that q, k and v are the three entries of the first dimension.
        q, k, v = self.qkv_proj(x_BLD).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        heads_BNLH = F.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.out_proj(heads_BNLH.transpose(1, 2).flatten(2))
        return output


def fused_layer(shape: Shape, dtype: torch.dtype) -> Layer:
    """:class:`FusedAttention`."""
    layer = FusedAttention(shape.width, shape.heads, dtype)
    packed = {"weight": layer.qkv_proj.weight, "bias": layer.qkv_proj.bias}
    return Layer(layer, layer, _unpacked(packed, layer.out_proj))


def _unpacked(packed: Mapping[str, Tensor], out_proj: nn.Linear) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for kind, parameter in packed.items():
        rows = len(parameter) // 3
        parts |= {f"{p}_proj.{kind}": (parameter, slice(i * rows, (i + 1) * rows)) for i, p in enumerate("qkv")}
    return parts | {f"out_proj.{name}": (parameter, slice(None)) for name, parameter in out_proj.named_parameters()}


def x_transformers_layer(shape: Shape, dtype: torch.dtype) -> Layer:
    """``x_transformers.Attention`` on SDPA (``flash=True``); it has no biases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        package = importlib.import_module("x_transformers")
    layer: nn.Module = package.Attention(dim=shape.width, dim_head=shape.head_width, heads=shape.heads, flash=True).to(
        dtype
    )
    theirs = dict(layer.named_parameters())
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    return Layer(layer, layer, {f"{a}.weight": (theirs[f"{b}.weight"], slice(None)) for a, b in names.items()})


def missing(*modules: str) -> str | None:
    """The reason why a contender that imports ``modules`` cannot run, or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: {INSTALL}" if absent else None


def flex_attention(causal_length: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention, with a causal block mask of that length; the first call compiles."""
    from torch.nn.attention import flex_attention as flex

    torch.compiler.reset()  # otherwise the shapes of earlier rows count towards the limit of recompilations
    compiled: Any = torch.compile(flex.flex_attention, dynamic=False)
    if causal_length is None:
        return lambda q, k, v: compiled(q, k, v)
    block_mask = flex.create_block_mask(
        lambda b, h, q, k: q >= k, None, None, causal_length, causal_length, device="cpu"
    )
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def keras_run(ours: ba.MultiheadAttention, x: Tensor, grad: Tensor | None) -> Run:
    """Keras' layer with the weights of ours, compiled by JAX, in a process of its own.

    Args:
        ours: a standard layer.
        x: (B, L, D).
        grad: of the output, for training; None for inference.
    """
    task = keras_worker.Task(
        heads=ours.num_heads,
        dtype=str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        weights={name: p.detach().float().numpy() for name, p in ours.named_parameters()},
        x=x.detach().float().numpy(),
        grad=None if grad is None else grad.float().numpy(),
    )
    context = multiprocessing.get_context("spawn")  # a forked child would have torch's locks, but not its threads
    pipe, theirs = context.Pipe()
    process = context.Process(target=keras_worker.serve, args=(theirs, task), daemon=True)
    process.start()
    # Otherwise this process would hold the other end open, and the end of the worker would not show here.
    theirs.close()

    def ask(question: str, argument: int = 0) -> Any:
        try:
            pipe.send((question, argument))
            kind, answer = pipe.recv()
        except (EOFError, BrokenPipeError):
            raise Unavailable("the process with Keras and JAX ended before it answered") from None
        if kind == "error":
            raise Unavailable(f"Keras or JAX failed: {answer}")
        return answer

    def results() -> Results:
        return {name: torch.from_numpy(array) for name, array in ask("results").items()}

    def close() -> None:
        pipe.close()  # tells the worker to end
        process.join(GOODBYE)
        if process.is_alive():
            process.kill()

    try:
        note = str(ask("note"))
    # Ctrl-C, too, must not leave the worker behind.
    except BaseException:
        close()
        raise
    return Run(lambda calls: float(ask("sample", calls)), results, lambda: ask("memory"), note, close)
