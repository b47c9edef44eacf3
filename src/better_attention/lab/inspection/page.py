"""The page of an inspection: one HTML file without scripts, fonts or anything else from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from better_attention.lab.analysis.study import AttentionMap
from better_attention.lab.files import write_atomic
from better_attention.lab.inspection.inspection import Inspection, LayerMaps, Sample, entropy
from better_attention.lab.report import heatmaps, map_gallery
from better_attention.lab.report.gallery import Album
from better_attention.lab.report.map_gallery import layer_name
from better_attention.lab.report.page import template
from better_attention.scores import SCORES

PICTURE_ROOM = 6_000_000
"""Characters of pictures on a page: more than a report has, since every head is shown by every score."""
QUERIES_LISTED = 24
"""Queries whose strongest key is listed in words."""
GENERATOR = "better-attention inspect"
"""What the page says it was made by: the mark by which a file of ours is known."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The weights of one head by one score."""

    score: str
    own: bool
    matrix: Markup
    ratio: str
    over: Markup | None
    over_ratio: str
    entropy: str
    most: str
    greatest: str
    alt: str
    shades: list[tuple[str, str]]
    strongest: list[str]


@dataclass(frozen=True, slots=True)
class Cell:
    """One head of one layer: its number, and its pictures, the model's own score first."""

    head: int
    queries: list[str]
    pictures: list[Picture]


@dataclass(frozen=True, slots=True)
class Row:
    """One layer on one sample."""

    name: str
    size: str
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class View:
    """One sample."""

    title: str
    predicted: str
    picture: Markup | None
    rows: list[Row]

    @property
    def heads(self) -> int:
        """The greatest number of heads of a layer."""
        return max((len(row.cells) for row in self.rows), default=0)


@dataclass(frozen=True, slots=True)
class Spread:
    """How evenly a head spreads its attention, on average over the samples: score -> share of the maximum, 0 ... 1."""

    shares: Mapping[str, float]


def write_page(inspection: Inspection, path: str | Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_atomic(path, render(inspection))


def is_ours(content: bytes) -> bool:
    """Whether a file is a page of this kind, which may be replaced."""
    return f'<meta name="generator" content="{GENERATOR}">'.encode() in content[:2000]


def render(inspection: Inspection, room: int = PICTURE_ROOM) -> str:
    """The inspection as HTML text, with pictures of up to ``room`` characters."""
    album = Album(room)
    kernels = map_gallery.kernels(inspection.kernels, album)  # the smaller part first
    views = [_view(sample, album) for sample in inspection.samples]
    return _template().render(
        inspection=inspection,
        generator=GENERATOR,
        views=views,
        spreads=(spreads := _spreads(inspection.samples)),
        most_heads=max((len(heads) for _, heads in spreads), default=0),
        scores=list(SCORES),
        own=_own(inspection.samples),
        kernels=kernels,
        left_out=album.left_out,
        bars={name: heatmaps.data_uri(heatmaps.scale_bar(name), "image/png") for name in _SCALES},
    )


_SCALES = (heatmaps.SEQUENTIAL, heatmaps.DIVERGING)


@cache
def _template() -> jinja2.Template:
    return template("inspection.html")


def _own(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(layer.own for sample in samples for layer in sample.layers))


def _view(sample: Sample, album: Album) -> View:
    photograph = None if sample.picture is None else album.add(heatmaps.photograph(sample.picture))
    rows = [row for layer in sample.layers if (row := _row(layer, album)).cells]
    return View(sample.title, sample.predicted, photograph[0] if photograph else None, rows)


def _row(layer: LayerMaps, album: Album) -> Row:
    own = layer.maps[layer.own]
    heads, L, S = own.weights.shape
    size = f"{S} positions" if L == S else f"{L} queries, {S} keys"
    cells = [Cell(head + 1, _queries(own), drawn) for head in range(heads) if (drawn := _pictures(layer, head, album))]
    return Row(layer_name(layer.name), size, cells)


def _queries(one: AttentionMap) -> list[str]:
    """The words of the queries that are listed; none for pictures."""
    return list(_words(one))[:QUERIES_LISTED]


def _words(one: AttentionMap) -> Sequence[str]:
    if one.queries is not None:
        return one.queries
    return one.tokens if one.tokens is not None and one.weights.shape[1] == one.weights.shape[2] else ()


def _pictures(layer: LayerMaps, head: int, album: Album) -> list[Picture]:
    """The head by every score, or nothing where there is no room for all of it."""
    order = [layer.own, *(score for score in layer.maps if score != layer.own)]
    received = {score: np.nan_to_num(layer.maps[score].weights[head]).mean(axis=0) for score in order}
    contents, overs = [], {}
    for score in order:
        one = layer.maps[score]
        over = None if one.picture is None else heatmaps.over_picture(received[score], one.picture)
        overs[score] = over is not None
        contents += [heatmaps.heat(one.weights[head]), *([over] if over else [])]
    uris = iter(album.add(*contents) or ())
    return list(_drawn(layer, head, order, received, overs, uris))


def _drawn(
    layer: LayerMaps,
    head: int,
    order: Sequence[str],
    received: Mapping[str, NDArray[np.floating]],
    overs: Mapping[str, bool],
    uris: Iterator[Markup],
) -> Iterator[Picture]:
    for score in order:
        one = layer.maps[score]
        weights = np.nan_to_num(one.weights[head])
        matrix = next(uris, None)
        if matrix is None:
            return
        L, S = weights.shape
        bits, most = float(entropy(weights[None])[0]), math.log2(S)
        greatest = float(weights.max(initial=0.0))
        yield Picture(
            score,
            score == layer.own,
            matrix,
            f"{S}/{L}",
            next(uris) if overs[score] else None,
            "1" if one.picture is None else f"{one.picture.shape[1]}/{one.picture.shape[0]}",
            f"{bits:.1f}",
            f"{most:.1f}",
            f"{greatest:.2g}",
            f"{layer_name(layer.name)}, head {head + 1}, {score}: weights of {L} queries (rows) and {S} keys "
            f"(columns), the greatest {greatest:.2g}; entropy {bits:.1f} of at most {most:.1f} bits; key "
            f"{int(received[score].argmax()) + 1} receives most",
            map_gallery.shades(one.tokens, received[score]),
            _strongest(one, weights),
        )


def _strongest(one: AttentionMap, weights_LS: NDArray[np.floating]) -> list[str]:
    """For each query that is listed, the key with the greatest weight, and the weight; "" where it sees none."""
    if one.tokens is None:
        return []
    rows = weights_LS[: len(_queries(one))]
    return [f"{one.tokens[int(row.argmax())]} {row.max():.2f}" if row.max() > 0 else "" for row in rows]


def _spreads(samples: Sequence[Sample]) -> list[tuple[str, list[Spread]]]:
    """For each layer the spread of each head: its entropy over the greatest possible one, averaged over the samples."""
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for layer in (layer for sample in samples for layer in sample.layers):
        for score, one in layer.maps.items():
            most = math.log2(max(2, one.weights.shape[2]))
            found.setdefault(layer.name, {}).setdefault(score, []).append(entropy(one.weights) / most)
    means = {name: {s: np.mean(v, axis=0) for s, v in scores.items()} for name, scores in found.items()}
    return [
        (layer_name(name), [Spread({s: float(v[head]) for s, v in scores.items()}) for head in range(_heads(scores))])
        for name, scores in means.items()
    ]


def _heads(scores: Mapping[str, NDArray[np.float64]]) -> int:
    return len(next(iter(scores.values())))
