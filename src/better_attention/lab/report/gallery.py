"""The drawings of a report and the room they take: curves, results over heads, weights by angle, each in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from markupsafe import Markup

from better_attention.lab.analysis.estimates import Estimate, number
from better_attention.lab.analysis.study import Curve
from better_attention.lab.analysis.summary import MAIN, Row, columns_of
from better_attention.lab.report import heatmaps
from better_attention.lab.report.charts import (
    LENGTHS,
    Points,
    Series,
    learning_curves,
    over_heads,
    weight,
    weights_over_angle,
)
from better_attention.lab.runs.name import RunName
from better_attention.mechanism import MECHANISMS

PANELS = (
    ("validation_loss", "Validation loss"),
    ("validation_accuracy", "Validation accuracy, %"),
    ("train_loss", "Training loss"),
    ("train_accuracy", "Training accuracy, %"),
)


@dataclass(slots=True)
class Album:
    """The pictures of one page, up to ``room`` characters; ``left_out`` counts those that found no room."""

    room: int
    left_out: int = 0

    def add(self, *contents: bytes, kind: str = "image/png") -> list[Markup] | None:
        """The addresses of pictures that belong together, or None where there is no room for them all."""
        uris = [heatmaps.data_uri(content, kind) for content in contents]
        size = sum(map(len, uris))
        if size > self.room:
            # The room stays: a smaller picture that comes later may still fit.
            self.left_out += 1
            return None
        self.room -= size
        return uris


@dataclass(slots=True)
class Panel:
    """A drawing in two versions, for light and for dark pages."""

    title: str
    alt: str
    light: Markup
    dark: Markup


@dataclass(slots=True)
class CurveGroup:
    """The panels of one number of heads."""

    heads: int | None
    mechanisms: list[str]
    panels: list[Panel]


def curve_groups(curves: Mapping[str, Curve], album: Album) -> list[CurveGroup]:
    """The learning curves, one group of panels for each number of heads, one line per mechanism."""
    by_heads: dict[int | None, dict[str, list[Curve]]] = {}
    for name, curve in curves.items():
        run = RunName.of(name)
        by_heads.setdefault(run.heads, {}).setdefault(run.mechanism, []).append(curve)
    groups = []
    for heads, found in sorted(by_heads.items(), key=lambda item: item[0] or 0):
        # In the order of the tables, whatever order the folders were read in.
        runs = {name: found[name] for name in [*MECHANISMS, *found] if name in found}
        panels = [panel for key, title in PANELS if (panel := _panel(title, key, runs, album))]
        if panels:
            groups.append(CurveGroup(heads, list(runs), panels))
    return groups


def _panel(title: str, key: str, runs: Mapping[str, Sequence[Curve]], album: Album) -> Panel | None:
    series = {name: [drawn for curve in seeds if (drawn := _series(curve, key))] for name, seeds in runs.items()}
    series = {name: seeds for name, seeds in series.items() if seeds}
    if not any(len(x) > 1 for seeds in series.values() for x, _ in seeds):
        return None  # one epoch is a point, and the table has it
    falling = key.endswith("loss")
    both = (learning_curves(series, dark=dark, falling=falling) for dark in (False, True))
    uris = album.add(*both, kind="image/svg+xml")
    if uris is None:
        return None
    ends = ", ".join(f"{name} {np.mean([y[-1] for _, y in seeds]):.4g}" for name, seeds in series.items())
    return Panel(title, f"{title}, by epoch. Last values, mean over seeds: {ends}.", *uris)


def _series(curve: Curve, key: str) -> Series | None:
    points = [(float(entry["epoch"]), float(entry[key])) for entry in curve if entry.get(key) is not None]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def ablation(rows: Sequence[Row], album: Album) -> tuple[list[str], list[Panel]]:
    """Results of the test split over the number of heads: the mechanisms drawn, and a panel of each main figure.

    Empty where fewer than two numbers of heads were run.
    """
    if len({row.heads for row in rows}) < 2:
        return [], []
    panels = []
    for column in columns_of(rows):
        if column.key not in MAIN:
            continue
        runs: dict[str, dict[int, Estimate]] = {}
        for row in rows:
            if column.key in row.estimates:
                runs.setdefault(row.mechanism, {})[row.heads] = row.estimates[column.key]
        if uris := album.add(*(over_heads(runs, dark=dark) for dark in (False, True)), kind="image/svg+xml"):
            panels.append(Panel(column.title, f"{column.title} by number of heads. {_over_heads(runs)}.", *uris))
    return list(dict.fromkeys(row.mechanism for row in rows)) if panels else [], panels


def _over_heads(runs: Mapping[str, Points]) -> str:
    return "; ".join(
        f"{name}: {', '.join(f'{points[heads].format(2)} with {heads}' for heads in sorted(points))}"
        for name, points in runs.items()
    )


def angle_panels(album: Album) -> list[Panel]:
    """The weights of softmax and of expressive attention over the angle between query and key, from the formulas."""
    panels = []
    titles = {"standard": "softmax: exp z", "expressive": "expressive: z²/(1 + z²)"}
    for mechanism, title in titles.items():
        if uris := album.add(*_drawn_angles(mechanism), kind="image/svg+xml"):
            at = np.array([0.0, 90.0, 180.0])
            values = (
                f"{length:g}: {', '.join(number(float(w), 3) for w in weight(mechanism, at, length))}"
                for length in LENGTHS
            )
            alt = f"{title}. Weight at 0°, 90° and 180° for |q| |k| · scale of {'; '.join(values)}."
            panels.append(Panel(title, alt, *uris))
    return panels


@cache
def _drawn_angles(mechanism: str) -> tuple[bytes, bytes]:
    """For light and for dark pages; the same on every page."""
    return weights_over_angle(mechanism, dark=False), weights_over_angle(mechanism, dark=True)
