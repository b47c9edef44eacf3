"""Notes on the setting of a comparison, for the screen and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from better_attention.lab import published
from better_attention.lab.analysis.departures import not_the_papers
from better_attention.lab.analysis.estimates import number
from better_attention.lab.tasks.base import Task
from better_attention.lab.tasks.splits import Splits, most_frequent
from better_attention.lab.tasks.variant import Variant
from better_attention.text import plural

EVEN = 8
"""Vector instructions process this number of float32 values at a time, or a multiple of it."""
FEW = 100
"""With fewer test samples, a single one weighs more than most differences between mechanisms."""


def remarks(
    task: Task, variants: Sequence[Variant], heads: Sequence[int], samples: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Sentences on what differs from the paper's setting or among models, and on how equal equal parameters are.

    Args:
        task: the task, its settings resolved.
        variants, heads: what is compared.
        samples: name of a split -> its number of samples.
    """
    found = list(not_the_papers(task.name, task.settings(), samples)) if published.rows(task.name) else []
    if samples and task.batch_size >= samples["train"]:
        every = plural(samples["train"], "sample")
        found.append(f"an epoch is a single update: a batch of {task.batch_size:,} holds all {every}")
    found += task.remarks(variants, heads)
    if task.equal_params:
        found += [f"equal parameters with {plural(n, 'head')}: {_sizes(task, variants, n)}" for n in heads]
        found += [odd for n in heads if (odd := _odd_widths(task, variants, n))]
    return tuple(found)


def guessing(splits: Splits) -> tuple[str, ...]:
    """Baseline accuracy of always predicting the most frequent class, on the test samples that are used.

    Empty where a sample has many targets. Very few test samples are mentioned, too.
    """
    targets = splits.test.targets
    if targets.ndim != 1 or "classes" not in splits.assets:
        return ()
    label, share = most_frequent(targets)
    often = splits.assets["classes"][label]
    notes = [f"guessing {often!r}, the most frequent class, is right for {share:.1f} % of the test samples"]
    if len(targets) < FEW:
        notes.append(f"the test split has {plural(len(targets), 'sample')}: one is {100 / len(targets):.1f} points")
    return tuple(notes)


def _odd_widths(task: Task, variants: Sequence[Variant], heads: int) -> str:
    """Which models have been widened to a width that computes less well, and so look slower than their mechanism."""
    widths = {variant.name: task.sized(variant, heads).width for variant in variants}
    odd = [f"{name} {width}" for name, width in widths.items() if width % EVEN and width != task.width]
    if not odd:
        return ""
    return (
        f"widths chosen with {plural(heads, 'head')} that are no multiple of {EVEN}, which may cost speed that is not "
        f"the mechanism's: {', '.join(odd)}"
    )


def _sizes(task: Task, variants: Sequence[Variant], heads: int) -> str:
    """Parameters, width and layers of each model: ``standard 9,770 (width 32, layers 2)``, and how far off it is."""
    aim = replace(task, equal_params=False).size("standard", heads)
    parts, other, widened = [], False, False
    for variant in variants:
        own, count = task.sized(variant, heads), task.size(variant, heads)
        off = f", {number(100 * (count / aim - 1), 1, sign=True)} %" if count != aim else ""
        parts.append(f"{variant.name} {count:,} (width {own.width}, layers {own.layers}{off})")
        other = other or count != aim
        widened = widened or (own.width, own.layers) != (task.width, task.layers)
    unchanged = "" if widened or not other else "; no other width comes nearer, so that nothing was widened"
    return ", ".join(parts) + unchanged
