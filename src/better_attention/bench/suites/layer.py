"""The suite "layer": whole self-attention layers, in inference and in training, against ``nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

import better_attention as ba
from better_attention.bench import contenders as others
from better_attention.bench.contenders import Layer
from better_attention.bench.registry import PAPER, Contender, Results, Row, Run, Shape, Suite, Work, here, normal

OURS = (*ba.MECHANISMS, "efficient+expressive")
THEIRS: tuple[tuple[str, Callable[[Shape, torch.dtype], Layer], bool, tuple[str, ...]], ...] = (
    ("nn.MultiheadAttention", others.torch_layer, True, ()),
    ("fused QKV on SDPA", others.fused_layer, True, ()),
    ("x-transformers", others.x_transformers_layer, False, ("x_transformers",)),
)
"""Name, maker, whether it has biases, and the packages it needs."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """x and the gradient of the output, (B, L, D)."""

    x: Tensor
    grad: Tensor

    @classmethod
    def of(cls, row: Row) -> Inputs:
        """The inputs of a row, the same in every run. In training x too has a gradient, as inside a network."""
        x, grad = (normal(seed, *row.shape[:3], dtype=row.dtype) for seed in (0, 1))
        return cls(x.requires_grad_(row.backward), grad)


def contenders(row: Row) -> list[Contender]:
    """torch's layer, three more of other people's, and our mechanisms."""
    inputs = cache(partial(Inputs.of, row))
    truth = cache(partial(_truth, row, inputs))
    row_contenders = []
    for name, make, bias, modules in THEIRS:
        set_up = partial(_make, row, inputs, partial(_loaded, row, make, bias))
        missing = partial(others.missing, *modules)
        row_contenders.append(Contender(name, set_up, partial(truth, "standard", bias), work(row, "standard"), missing))
    set_up, missing = partial(_make_keras, row, inputs), partial(others.missing, "keras", "jax")
    row_contenders.append(
        Contender("Keras on JAX", set_up, partial(truth, "standard", True), work(row, "standard"), missing)
    )
    for mechanism in OURS:
        set_up = partial(_make, row, inputs, partial(_own, row, mechanism))
        row_contenders.append(Contender(mechanism, set_up, partial(truth, mechanism, True), work(row, mechanism)))
    return row_contenders


def work(row: Row, mechanism: str) -> Work:
    """FLOPs as in :func:`better_attention.cost`, and standard's over them: the speed that the arithmetic promises."""
    B, L, D, N = row.shape
    flops, standard = (
        ba.cost(D, N, L, mechanism=m, batch=B, backward=row.backward).flops for m in (mechanism, "standard")
    )
    return Work(flops=flops, flop_ratio=standard / flops)


def _ours(row: Row, mechanism: str, *, bias: bool) -> ba.MultiheadAttention:
    """A layer of ours whose weights and biases depend on the row alone."""
    options = ba.Mechanism.of(mechanism).layer_options(row.shape.length)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        layer = ba.MultiheadAttention(
            row.shape.width, row.shape.heads, bias=bias, batch_first=True, mechanism=mechanism, **options
        )
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("bias"):  # biases start at zero, which would hide that one is ignored
                    parameter.normal_(std=0.1)
    return layer.to(row.dtype)


def _loaded(row: Row, make: Callable[[Shape, torch.dtype], Layer], bias: bool) -> Layer:
    return make(row.shape, row.dtype).load(_ours(row, "standard", bias=bias))


def _own(row: Row, mechanism: str) -> Layer:
    return others.our_layer(_ours(row, mechanism, bias=True))


def _make(row: Row, inputs: Callable[[], Inputs], make: Callable[[], Layer]) -> Run:
    layer, given = make(), inputs()
    if not row.backward:
        layer.module.eval()
        return here(lambda: layer.forward(given.x), lambda: {"output": layer.forward(given.x)}, grad=False)
    layer.module.train()

    def call() -> Tensor:
        # Gradients would otherwise add up over the calls, which costs time and changes the results.
        layer.module.zero_grad(set_to_none=True)
        given.x.grad = None
        output = layer.forward(given.x)
        output.backward(given.grad)  # the gradients of sum(output grad)
        return output

    def results() -> Results:
        output = call()
        assert given.x.grad is not None  # noqa: S101 - for the type checker: backward has just made it
        return {"output": output, "input": given.x.grad, **layer.gradients()}

    return here(call, results, grad=True)


def _make_keras(row: Row, inputs: Callable[[], Inputs]) -> Run:
    given = inputs()
    return others.keras_run(_ours(row, "standard", bias=True), given.x, given.grad if row.backward else None)


def _truth(row: Row, inputs: Callable[[], Inputs], mechanism: str, bias: bool) -> Results:
    """The same in float64 by the reference, one sequence at a time, gradients of parameters summed."""
    layer = _ours(row, mechanism, bias=bias).double()
    layer.impl = "reference"
    x = inputs().x.detach().double().requires_grad_(row.backward)
    outputs = []
    with torch.set_grad_enabled(row.backward):
        for b in range(len(x)):
            part = x[b : b + 1]
            output = layer(part, part, part, need_weights=False)[0]
            if row.backward:
                output.backward(inputs().grad[b : b + 1].double())
            outputs.append(output.detach())
    results = {"output": torch.cat(outputs)}
    if x.grad is not None:
        results |= {"input": x.grad, **others.our_layer(layer).gradients()}
    return results


SUITE = Suite(
    "layer",
    "self-attention layers at the papers' shapes, against nn.MultiheadAttention",
    contenders,
    shapes=PAPER,
    quick=(PAPER[2],),
    variants=("plain",),
    modes=("inference", "training"),
    rates="whole",
)
