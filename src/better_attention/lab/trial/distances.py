"""How far back a trained model looks: the mean weight of a key over its distance from the query, and its picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn

from better_attention.inspect import attention_maps
from better_attention.lab.report.plot_style import bare, blank, saved, style
from better_attention.lab.report.style import LIGHT, look
from better_attention.lab.tasks.splits import Split

from .grid import SOFTMAX, Trial
from .quick import train
from .stages import Row

FURTHEST = 2.0
"""The picture ends at this many delays."""
MARK = 4
"""Width of the mark at a distance at which the rule reads, in points."""


def over_distance(model: nn.Module, split: Split, delay: int) -> dict[str, Tensor]:
    """Layer -> mean weight (heads, L) over the distance l - s of query and key.

    The mean is over samples and over the queries from which a symbol is to be predicted, l >= delay - 1, each of which
    sees a key at all distances up to its own position.

    Args:
        model: a causal model of one sequence.
        split: what it reads.
        delay: tau.
    """
    found = {}
    for name, weights_BNLS in attention_maps(model, split.inputs).items():
        L = weights_BNLS.shape[-1]
        mean_NLS = weights_BNLS.mean(dim=0)
        # A diagonal of the map is one distance; a query that has no key so far back has no part in its mean.
        lines = [mean_NLS.diagonal(-d, dim1=1, dim2=2)[:, max(0, delay - 1 - d) :].mean(dim=1) for d in range(L)]
        found[name] = torch.stack(lines, dim=1)
    return found


def picture(panels: Sequence[tuple[str, str, dict[str, Tensor]]], delay: int) -> bytes:
    """SVG: one panel per model, one line per head, mean weight over distance; marks where the rule reads; a legend.

    Args:
        panels: title, mechanism and what :func:`over_distance` gives, of each model.
        delay: tau. After reading x_{t-1} the two symbols that decide stand 0 and tau - 1 tokens back.
    """
    with style():
        figure = blank(2.3 * len(panels), 2.6)
        for place, (title, mechanism, layers) in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), place)
            for at in (0, delay - 1):
                axes.axvline(at, color=LIGHT.faint, linewidth=MARK, zorder=0)
            weights = torch.cat(list(layers.values()))[:, : int(FURTHEST * delay)]
            for head, line in enumerate(weights.tolist()):
                axes.plot(line, color=look(mechanism).colour(dark=False), linestyle=_dashes(head), linewidth=1.4)
            axes.set_title(title, fontsize=8, color=LIGHT.ink)
            axes.set_xlabel("distance")
            axes.set_ylim(bottom=0)
            bare(axes, LIGHT.ink, LIGHT.faint)
        lines = _legend(panels, delay)
        figure.legend(
            [line for line, _ in lines],
            [label for _, label in lines],
            loc="outside lower center",
            ncols=max(1, min(len(lines), 2 * len(panels))),
            fontsize=8,
            frameon=False,
            labelcolor=LIGHT.ink,
        )
        return saved(figure, "svg")


def _dashes(head: int) -> tuple[int, tuple[int, ...]]:
    """The line of a head: solid for the first, then with ever longer dashes."""
    return (0, ()) if head == 0 else (0, (1 + head, head))


def _legend(panels: Sequence[tuple[str, str, dict[str, Tensor]]], delay: int) -> list[tuple[Line2D, str]]:
    """What colours, lines and marks stand for: scores, heads, and the distances at which the rule reads."""
    named = {mechanism: "softmax" if mechanism == SOFTMAX else mechanism for _, mechanism, _ in panels}
    found = [(Line2D([], [], color=look(of).colour(dark=False), linewidth=3), name) for of, name in named.items()]
    widest = max((layers for _, _, layers in panels), key=lambda layers: sum(map(len, layers.values())))
    head = 0
    for layer, lines in enumerate(widest.values(), 1):
        for own in range(1, len(lines) + 1):
            label = f"head {own}" if len(widest) == 1 else f"layer {layer}, head {own}"
            found.append((Line2D([], [], color=LIGHT.ink, linestyle=_dashes(head), linewidth=1.4), label))
            head += 1
    reads = f"the rule reads here: 0 and {delay - 1}" if delay > 1 else "the rule reads here: 0"
    return [*found, (Line2D([], [], color=LIGHT.faint, linewidth=MARK), reads)]


def drawing(trial: Trial, rows: Sequence[Row]) -> bytes:
    """The picture of these cells, which are trained again; all have one delay."""
    panels = []
    for row in rows:
        model, split = trained(trial, row)
        found = row.outcome.test_accuracy
        accuracy = "diverged" if found is None else f"{found:.0f} %"
        name = "softmax" if row.cell.mechanism == SOFTMAX else row.cell.mechanism
        title = f"{name}\n{row.cell.positions}: {accuracy}"
        panels.append((title, row.cell.mechanism, over_distance(model, split, row.cell.delay)))
    return picture(panels, rows[0].cell.delay)


def trained(trial: Trial, row: Row) -> tuple[nn.Module, Split]:
    """The model of a finished cell, trained again with the same numbers, and its test split."""
    job = trial.job(row.cell)
    splits = job.task.load()
    _, model = train(job, splits, row.cell.updates, trial.every)
    return model, splits.test
