"""What a finished run shows of its inside: attention maps beside its predictions, and W_A beside where it started."""

from __future__ import annotations

import torch
from torch import nn

from better_attention.inspect import alignment_kernels, attention_maps
from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap
from better_attention.lab.runs.folder import Run
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.tasks.variant import Variant
from better_attention.lab.training.randomness import initial_model

EXAMPLES = 2
"""Test samples whose attention maps are drawn."""


def draw_maps(name: str, model: nn.Module, task: Task, splits: Splits) -> list[AttentionMap]:
    """The attention maps of every layer on a few test samples, and what the model says of each."""
    maps = []
    for row, label in task.examples(splits, EXAMPLES):
        inputs = splits.test.inputs[row].cpu()
        shown = task.show(inputs, splits.assets)
        with torch.inference_mode():
            (found,) = task.predictions(model.eval(), inputs[None], splits.assets)
        maps += [
            AttentionMap(
                name,
                layer,
                label,
                weights[0].numpy(),
                tokens=task.key_tokens(layer, shown),
                picture=shown.picture,
                queries=task.query_tokens(layer, shown),
                predicted=f"{found.label} ({100 * found.probability:.0f} %)",
            )
            for layer, weights in attention_maps(model, inputs[None]).items()
        ]
    return maps


def draw_kernels(name: str, run: Run) -> list[AlignmentPicture]:
    """W_A of every layer of a finished run, and where it started."""
    trained = alignment_kernels(run.model)
    if not trained:
        return []
    what = run.config["run"]
    fresh = initial_model(run.task, Variant.of(what["mechanism"]), what["heads"], what["seed"])
    initial = dict(alignment_kernels(fresh))
    return [AlignmentPicture(name, layer, w.numpy(), initial[layer].numpy()) for layer, w in trained]
