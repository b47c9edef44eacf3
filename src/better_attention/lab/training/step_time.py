"""How fast a model trains: the hours that a comparison will take, and the same model on torch's own layer beside it.

Seconds of an epoch depend on what else the machine does that hour; the ratio of two updates that follow each other
does so far less. Both are measured before training, a few updates each, alternately; then one batch is evaluated.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn

from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.splits import Split, Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.timing import alternate
from better_attention.lab.training.randomness import drawing
from better_attention.layer.multihead import MultiheadAttention

ROUNDS = (3, 25)  # at least, at most
BUDGET = 1.5
"""Seconds for the rounds beyond the least number."""
SCORED = 32  # samples that a throw-away model is scored on


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed of a model in training.

    Args:
        seconds: of one update, the median.
        times_as_fast: update time of the same model on ``torch.nn.MultiheadAttention`` over its own, the median of
            neighbouring pairs: above 1 is faster. None where torch's layer cannot stand in, see
            :meth:`Task.torch_twin`.
        evaluated, scored: seconds to evaluate a sample, and to score it by :meth:`Task.scores`.
    """

    seconds: float
    times_as_fast: float | None
    evaluated: float = 0.0
    scored: float = 0.0

    def run_seconds(self, task: Task, train: int, validation: int, test: int) -> float:
        """Time of a run that uses all its epochs, for splits of these numbers of samples."""
        updates = task.epoch_updates_of(train) * task.epochs
        evaluated = validation * task.epochs + train + validation + test
        scored = task.scored(train) + task.scored(test)
        return self.seconds * updates + self.evaluated * evaluated + self.scored * scored


class Measure(Protocol):
    """How a comparison or a ladder finds the speed of a model: :func:`measure`, or what knows it already."""

    def __call__(
        self,
        task: Task,
        splits: Splits,
        variant: Variant,
        heads: int,
        device: torch.device,
        *,
        stop: Callable[[], bool] = ...,
        quick: bool = ...,
    ) -> Pace:
        """See :func:`measure`."""


def measure(
    task: Task,
    splits: Splits,
    variant: Variant,
    heads: int,
    device: torch.device,
    *,
    seconds: float = BUDGET,
    stop: Callable[[], bool] = lambda: False,
    quick: bool = False,
) -> Pace:
    """Train throw-away models for a moment, ours and one on torch's layer alternately, and evaluate ours once.

    Args:
        task, splits, variant, heads, device: what is trained, on what and where.
        seconds: no further round begins after this long, once there were as many as :data:`ROUNDS` asks for.
        stop: asked after every round; once it says yes, what was measured by then is enough.
        quick: for an estimate of many models: one update of ours alone, after one of a single sample, without the
            optimiser's step, which takes a fiftieth of it and makes torch import its compiler (seconds).
    """
    # The models that are thrown away draw random numbers, which must not disturb those of the run.
    with torch.random.fork_rng(devices=[]):
        model = task.build(variant, heads)
        updates = {"ours": _updates(task, model, splits.train, device, not quick)}
        rival = None if quick else on_torch(task.torch_twin().build("standard", heads))
        if rival is not None:
            updates["torch's"] = _updates(task, rival, splits.train, device, True)
        # An update that is not timed first: it does what happens only once. Of one sample where an estimate is awaited.
        probe = Split(*splits.train.batch(slice(1)))
        first = {"ours": _updates(task, model, probe, device, False)} if quick else updates
        for update in first.values():
            update()
        taken: dict[str, list[float]] = {name: [] for name in updates}
        least, most = (1, 1) if quick else ROUNDS
        for _, name in alternate(list(updates), most, least=least, seconds=seconds, stop=stop):
            taken[name].append(updates[name]())
        pairs = zip(taken["ours"], taken.get("torch's", ()), strict=rival is not None)
        times_as_fast = None if rival is None else median(theirs / ours for ours, theirs in pairs)
        return Pace(median(taken["ours"]), times_as_fast, *_evaluation(task, model, splits))


def _updates(task: Task, model: nn.Module, train: Split, device: torch.device, learn: bool) -> Callable[[], float]:
    """A function that does one update of ``model`` and returns its seconds; ``learn``: its weights change by it."""
    model.to(device).train()
    optimiser = task.make_optimiser(model) if learn else None
    batch = slice(min(task.batch_size, len(train)))

    def update() -> float:
        began = time.perf_counter()
        inputs, targets = train.batch(batch)
        with drawing(device, (0,), rank=0, processes=1):  # as in training
            loss = task.losses(model(task.augment(inputs)), targets).mean()
            loss.backward()
        if optimiser is not None:
            optimiser.step()
        model.zero_grad()
        # Asking for the number waits until the device has computed it.
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return update


def _evaluation(task: Task, model: nn.Module, splits: Splits) -> tuple[float, float]:
    """Seconds to evaluate one sample with ``model``, and to score one."""
    model.eval()
    with torch.inference_mode():
        model(splits.train.batch(slice(1))[0])  # what happens only once
        began = time.perf_counter()
        inputs, targets = splits.train.batch(slice(min(task.batch_size, task.evaluation_batch)))
        task.losses(model(inputs), targets).sum().item()
        evaluated = (time.perf_counter() - began) / len(targets)
        few = Split(*splits.train.batch(slice(SCORED)))
        began = time.perf_counter()
        task.scores(model, few, splits.assets)
        return evaluated, (time.perf_counter() - began) / len(few)


def on_torch(model: nn.Module) -> nn.Module | None:
    """A copy of a standard model whose attention layers are torch's own; None where torch's cannot compute them."""
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, MultiheadAttention):
            try:
                layer = _TorchLayer(module)
            except ValueError:
                return None
            holder, _, own = name.rpartition(".")
            setattr(copied.get_submodule(holder), own, layer)
    return copied


class _TorchLayer(nn.Module):
    """``torch.nn.MultiheadAttention``, which takes ``is_causal`` only together with the mask it stands for."""

    def __init__(self, ours: MultiheadAttention) -> None:
        super().__init__()
        weights = ours.to_torch_state_dict()
        sizes = {"kdim": ours.kdim, "vdim": ours.vdim, "bias": "in_proj_bias" in weights}
        self.layer = nn.MultiheadAttention(
            ours.embed_dim, ours.num_heads, ours.dropout, batch_first=ours.batch_first, **sizes
        )
        self.layer.load_state_dict(weights)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``torch.nn.MultiheadAttention``."""
        if is_causal:
            axis = 1 if self.layer.batch_first else 0
            shape = query.shape[axis], key.shape[axis]
            future = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1)
            if attn_mask is not None:  # torch would take the hint for the mask and forget the bias
                future, is_causal = attn_mask.masked_fill(future, -torch.inf), False
            attn_mask = future
        output: tuple[Tensor, Tensor | None] = self.layer(
            *(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        )
        return output
