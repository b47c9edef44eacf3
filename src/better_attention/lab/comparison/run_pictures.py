"""The inside of a finished run: attention maps beside its predictions, and W_A beside its initial values."""

from __future__ import annotations

import torch
from torch import nn

from better_attention.inspect import alignment_kernels, attention_maps
from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap
from better_attention.lab.runs.job import Job
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.randomness import initial_model

EXAMPLES = 2
"""Test samples whose attention maps are drawn."""


def draw_maps(name: str, model: nn.Module, task: Task, splits: Splits) -> list[AttentionMap]:
    """The attention maps of every layer on a few test samples, and what the model predicts for each.

    Args:
        name: of the run.
        model: on the CPU.
        task, splits: the task and its data.
    """
    maps = []
    for row, label in task.examples(splits, EXAMPLES):
        inputs = splits.test.inputs[row].cpu()
        shown = task.show(inputs, splits.assets)
        with torch.inference_mode():
            (prediction,) = task.predictions(model.eval(), inputs[None], splits.assets)
        maps += [
            AttentionMap(
                name,
                layer,
                label,
                weights[0].numpy(),
                tokens=task.key_tokens(layer, shown),
                picture=shown.picture,
                queries=task.query_tokens(layer, shown),
                predicted=f"{prediction.label} ({100 * prediction.probability:.0f} %)",
            )
            for layer, weights in attention_maps(model, inputs[None]).items()
        ]
    return maps


def draw_kernels(name: str, model: nn.Module, job: Job) -> list[AlignmentPicture]:
    """W_A of every layer of a trained model, and its initial values.

    Args:
        name: of the run.
        model: on the CPU.
        job: what it was trained for.
    """
    trained = alignment_kernels(model)
    if not trained:
        return []
    # Initial weights follow from the seed, so no run has to keep them.
    initial = dict(alignment_kernels(initial_model(job.task, job.variant, job.heads, job.seed)))
    return [AlignmentPicture(name, layer, w.numpy(), initial[layer].numpy()) for layer, w in trained]
