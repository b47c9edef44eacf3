"""The suite "model": an update, or an evaluation, of a whole model, against the same on ``nn.MultiheadAttention``.

The models are those of the experiments in arXiv 2403.01643, at their sizes, with random inputs and labels. An update is
what training repeats: forward pass with dropout, loss, backward pass, the optimiser's step. In float32 alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import better_attention as ba
from better_attention.bench.edge.timing import random_inputs
from better_attention.bench.registry import Contender, Results, Row, Run, Shape, Suite, Work, here
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.catalogue import TASKS
from better_attention.lab.tasks.image import ImageTask
from better_attention.lab.tasks.text import TextTask
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


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model reads, (B, ...), and the class of each sample, (B,)."""

    inputs: Tensor
    targets: Tensor


def task_of(row: Row) -> Task | None:
    """The experiment of a row at the row's sizes; None where its model cannot have them: pictures are square."""
    task, length = TASKS[row.variant]("paper"), row.shape.length
    if isinstance(task, ImageTask):
        side = math.isqrt(length - task.class_token)
        if side < 1 or side**2 != length - task.class_token:
            return None
        task = replace(task, image_size=side * task.patch, raw_size=side * task.patch)
    return replace(task, batch_size=row.shape.batch, width=row.shape.width, length=length)


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
    own, standard = (
        ba.cost(D, N, L, mechanism=name, batch=B, backward=row.backward).flops for name in (mechanism, "standard")
    )
    whole, layers = _standard(row)
    flops = whole + layers * (own - standard)
    return Work(flops=flops, flop_ratio=whole / flops)


@cache
def _standard(row: Row) -> tuple[float, int]:
    """FLOPs of the standard model, and how many attention layers it has."""
    one = replace(row, shape=row.shape._replace(batch=1))
    task, given, model = _task(one), _inputs(one), _build(one, "standard", "reference")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(row.backward):
        loss = task.losses(model(given.inputs), given.targets).mean()
        if row.backward:
            loss.backward()
    layers = sum(isinstance(module, MultiheadAttention) for module in model.modules())
    return float(row.shape.batch * counter.get_total_flops()), layers


def _task(row: Row) -> Task:
    task = task_of(row)
    if task is None:
        raise ValueError(f"the model of {row.variant} has square pictures: {row.shape.length} positions are none.")
    return task


def _mechanism(contender: str) -> str:
    return "standard" if contender == BASELINE else contender


def _inputs(row: Row) -> Inputs:
    task = _task(row)
    assert isinstance(task, ImageTask | TextTask)  # noqa: S101 - for the type checker: SHAPES names no others
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(task.classes, (row.shape.batch,), generator=generator)
    return Inputs(random_inputs(task, row.shape.batch), targets)


def _build(row: Row, mechanism: str, impl: str = "auto") -> nn.Module:
    """A model whose weights depend on the row alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        model = _task(row).build(mechanism, row.shape.heads)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.impl = impl
    return model


def _make(row: Row, inputs: Callable[[], Inputs], name: str) -> Run:
    task, given = _task(row), inputs()
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


def _results(task: Task, model: nn.Module, given: Inputs, *, backward: bool) -> Results:
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


def _truth(row: Row, inputs: Callable[[], Inputs], mechanism: str) -> Results:
    """The same in float64 by the reference."""
    model = _build(row, mechanism, "reference").double()
    with torch.set_grad_enabled(row.backward):
        results = _results(_task(row), model, inputs(), backward=row.backward)
    return {name: x.detach() for name, x in results.items()}


def _other(row: Row) -> bool:
    return row.shape != SHAPES[row.variant]


SUITE = Suite(
    "model",
    "an update and an evaluation of the paper's models, against the same on nn.MultiheadAttention",
    contenders,
    shapes=tuple(SHAPES.values()),
    quick=(SHAPES["imdb"],),
    variants=tuple(SHAPES),
    modes=("inference", "training"),
    skipped=_other,
    # bfloat16 weights are not what anybody trains, and their rounding adds up over a model's layers beyond any gate
    fits=lambda row: row.dtype == torch.float32 and task_of(row) is not None,
)
