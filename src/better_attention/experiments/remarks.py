"""What a comparison has to say of its own setting, on the screen and in its report."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from better_attention.errors import counted
from better_attention.experiments import paper
from better_attention.experiments.paper_tables import changed_settings
from better_attention.experiments.task import Task
from better_attention.experiments.variant import Variant


def remarks(task: Task, variants: Sequence[Variant], heads: Sequence[int]) -> tuple[str, ...]:
    """Sentences on what differs from the paper's setting, and on how equal the models are that are to be equal.

    Args:
        task: the task, its settings resolved.
        variants, heads: what is compared.
    """
    found = []
    changed = changed_settings(task.name, task.settings()) if paper.rows(task.name) else {}
    if changed:
        named = ", ".join(f"{key}={value}" for key, value in changed.items())
        found.append(f"the setting is not the paper's: {named}")
    if task.equal_params:
        found += [
            f"equal parameters with {counted(number, 'head')}: {_sizes(task, variants, number)}" for number in heads
        ]
    return tuple(found)


def _sizes(task: Task, variants: Sequence[Variant], heads: int) -> str:
    """Parameters, width and layers of each model: ``standard 9,770 (width 32, layers 2)``."""
    parts = []
    for variant in variants:
        own = task.sized(variant, heads)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in task.build(variant, heads).parameters())
        parts.append(f"{variant.name} {count:,} (width {own.width}, layers {own.layers})")
    return ", ".join(parts)
