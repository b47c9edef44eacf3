"""The suite "model": an update, or an evaluation, of a whole model, against the same on ``nn.MultiheadAttention``.

The models are those of the experiments in arXiv 2403.01643, at their sizes, with random inputs and labels. An update is
what training repeats: forward pass with dropout, loss, backward pass, the optimiser's step. In float32 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import better_attention as ba
from better_attention.bench.registry import Contender, Results, Row, Run, Shape, Suite, Work, here
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.splits import Split
from better_attention.lab.training.step_time import on_torch
from better_attention.layer.multihead import MultiheadAttention

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "imdb": Shape(64, 32, 32, 4),
        "amazon": Shape(64, 64, 64, 4),
        "mnist": Shape(256, 64, 128, 4),
        "cifar100": Shape(32, 257, 256, 8),
        "imagenet": Shape(8, 196, 768, 12),
    }
)
"""Model -> its sizes in the paper; the batches of the last two are smaller than there, for time's sake."""

BASELINE = "nn.MultiheadAttention"


def task_of(row: Row) -> Task:
    """The experiment of a row at the row's sizes.

    Raises:
        ValueError: its model cannot have them; pictures are square, for example.
    """
    task = TASKS[row.variant]("paper").at_length(row.shape.length)
    return replace(task, batch_size=row.shape.batch, width=row.shape.width)


def contenders(row: Row) -> list[Contender]:
    """The standard model on torch's layer, and ours with each mechanism."""
    inputs = cache(partial(_inputs, row))
    return [
        Contender(
            name,
            partial(_make, row, inputs, name),
            partial(_truth, row, inputs, _mechanism(name)),
            work(row, _mechanism(name)),
        )
        for name in (BASELINE, *ba.MECHANISMS)
    ]


def work(row: Row, mechanism: str) -> Work:
    """FLOPs of the matrix products: of standard attention counted on one sample; and standard's over them.

    The mechanisms differ in their attention layers alone, by as much as :func:`better_attention.cost` says.
    """
    B, L, D, N = row.shape
    ours, standard = (
        ba.cost(D, N, L, mechanism=name, batch=B, backward=row.backward).flops for name in (mechanism, "standard")
    )
    whole, layers = _standard(row)
    flops = whole + layers * (ours - standard)
    return Work(flops=flops, flop_ratio=whole / flops)


@cache
def _standard(row: Row) -> tuple[float, int]:
    """FLOPs of the standard model, and how many attention layers it has."""
    single = replace(row, shape=row.shape._replace(batch=1))
    # The counter sees the products of plain torch operations, which a kernel of ours would hide.
    task, given, model = task_of(single), _inputs(single), _build(single, "standard", "reference")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(row.backward):
        loss = task.losses(model(given.inputs), given.targets).mean()
        if row.backward:
            loss.backward()
    layers = sum(isinstance(module, MultiheadAttention) for module in model.modules())
    return float(row.shape.batch * counter.get_total_flops()), layers


def _mechanism(contender: str) -> str:
    return "standard" if contender == BASELINE else contender


def _inputs(row: Row) -> Split:
    return task_of(row).random_samples(row.shape.batch)


def _build(row: Row, mechanism: str, impl: str = "auto") -> nn.Module:
    """A model whose weights depend on the row alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        model = task_of(row).build(mechanism, row.shape.heads)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.impl = impl
    return model


def _make(row: Row, inputs: Callable[[], Split], name: str) -> Run:
    task, given = task_of(row), inputs()
    model: nn.Module | None = _build(row, _mechanism(name))
    if name == BASELINE and model is not None:
        model = on_torch(model)
    assert model is not None  # noqa: S101 - torch's layer can compute every standard classifier
    if not row.backward:
        model.eval()
        return here(lambda: model(given.inputs), lambda: _results(task, model, given, backward=False), grad=False)
    optimiser = task.make_optimiser(model)

    def update() -> None:
        model.train()
        task.losses(model(given.inputs), given.targets).mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return here(update, lambda: _results(task, model, given, backward=True), grad=True)


def _results(task: Task, model: nn.Module, given: Split, *, backward: bool) -> Results:
    """Logits, and gradients of all that is no attention layer: what lies before one has its gradient through it.

    Without dropout, whose draws no two contenders share.
    """
    model.eval()
    logits = model(given.inputs)
    if not backward:
        return {"output": logits}
    inside = {
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, MultiheadAttention | nn.MultiheadAttention)
    }
    leaves = {n: p for n, p in model.named_parameters() if not any(n.startswith(name) for name in inside)}
    grads = torch.autograd.grad(task.losses(logits, given.targets).mean(), list(leaves.values()))
    return {"output": logits, **dict(zip(leaves, grads, strict=True))}


def _truth(row: Row, inputs: Callable[[], Split], mechanism: str) -> Results:
    """The same in float64 by the reference."""
    model = _build(row, mechanism, "reference").double()
    with torch.set_grad_enabled(row.backward):
        results = _results(task_of(row), model, inputs(), backward=row.backward)
    return {name: x.detach() for name, x in results.items()}


def _other(row: Row) -> bool:
    return row.shape != SHAPES[row.variant]


def _possible(row: Row) -> bool:
    """Whether the model of a row can have the row's sizes."""
    try:
        task_of(row)
    except ValueError:
        return False
    return True


SUITE = Suite(
    "model",
    "an update and an evaluation of the paper's models, against the same on nn.MultiheadAttention",
    contenders,
    shapes=tuple(SHAPES.values()),
    quick=(SHAPES["imdb"],),
    variants=tuple(SHAPES),
    modes=("inference", "training"),
    rates="whole",
    skipped=_other,
    # bfloat16 weights are not what anybody trains, and their rounding adds up over a model's layers beyond any gate
    fits=lambda row: row.dtype == torch.float32 and _possible(row),
)
