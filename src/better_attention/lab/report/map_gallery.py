"""Attention maps and alignment kernels of a report, gathered by run, each with its text alternative."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap
from better_attention.lab.report import heatmaps
from better_attention.lab.report.gallery import Album
from better_attention.lab.runs.name import RunName
from better_attention.text import plural

HEADS_SHOWN = 8
"""Of a layer with more heads only the first ones, this number of them, are drawn, and the page says so."""


@dataclass(slots=True)
class Head:
    """The weights of one head on one input, and the attention that each patch or token receives."""

    matrix: Markup
    over: Markup | None
    shades: list[tuple[str, str]]
    caption: str
    alt: str


@dataclass(slots=True)
class Layer:
    """The heads of one layer on one input, ``total`` in number, of which the first are drawn."""

    name: str
    total: int
    heads: list[Head] = field(default_factory=list)


@dataclass(slots=True)
class Sample:
    """One input, what the model says of it, and what its layers look at."""

    label: str
    predicted: str
    size: str
    picture: Markup | None
    layers: list[Layer] = field(default_factory=list)


@dataclass(slots=True)
class Fold:
    """All maps of one run."""

    run: RunName
    samples: list[Sample] = field(default_factory=list)


@dataclass(slots=True)
class Drawn:
    """One matrix: its address, its caption and its words."""

    matrix: Markup
    caption: str
    alt: str


@dataclass(slots=True)
class Kernel:
    """W_A of one layer, a group of pictures a kernel; ``total`` kernels, of which the first are drawn."""

    run: RunName
    layer: str
    total: int
    heads: list[list[Drawn]] = field(default_factory=list)


def folds(maps: Sequence[AttentionMap], album: Album) -> list[Fold]:
    """The attention maps, gathered by run and input, without the rows and columns of padding."""
    found: dict[str, Fold] = {}
    samples: dict[tuple[str, str], Sample] = {}
    photographs: dict[str, Markup | None] = {}
    for one in map(without_padding, maps):
        heads = range(min(len(one.weights), HEADS_SHOWN))
        layer = Layer(layer_name(one.layer), len(one.weights), [h for k in heads if (h := _head(one, k, album))])
        if not layer.heads:
            continue
        if one.label not in photographs:  # the same for every run
            photograph = None if one.picture is None else album.add(heatmaps.photograph(one.picture))
            photographs[one.label] = photograph[0] if photograph else None
        fold = found.setdefault(one.run, Fold(RunName.of(one.run)))
        if (one.run, one.label) not in samples:
            samples[one.run, one.label] = Sample(one.label, one.predicted, _size(one), photographs[one.label])
            fold.samples.append(samples[one.run, one.label])
        samples[one.run, one.label].layers.append(layer)
    return list(found.values())


def without_padding(one: AttentionMap) -> AttentionMap:
    """The map without the rows and columns of padding, which is never looked at; all of it where there is no token."""
    if one.tokens is None:
        return one
    queries = one.queries
    # Square weights are those of self-attention, whose queries are the same tokens as its keys.
    if queries is None and one.weights.shape[1] == one.weights.shape[2]:
        queries = one.tokens
    columns = [place for place, token in enumerate(one.tokens) if token]
    rows = [place for place, token in enumerate(queries or ()) if token] or list(range(one.weights.shape[1]))
    if not columns:
        return one
    return replace(
        one,
        weights=one.weights[:, rows][:, :, columns],
        tokens=[one.tokens[place] for place in columns],
        queries=None if queries is None else [queries[place] for place in rows],
    )


def _size(one: AttentionMap) -> str:
    """How many tokens or patches a map is of."""
    _, rows, columns = one.weights.shape
    what = "token" if one.picture is None else "position"
    return plural(columns, what) if rows == columns else f"{plural(columns, what)}, asked by {rows}"


_LAYER = re.compile(r"(?:(encoder|decoder)|blocks)\.(\d{1,4})\.(attention|cross)(?:#(\d{1,4}))?")


def layer_name(name: str) -> str:
    """The name of a layer in a model, for the reader.

    >>> layer_name("blocks.0.attention"), layer_name("decoder.1.cross"), layer_name("decoder.1.attention#2")
    ('layer 1', 'decoder layer 2, to the encoder', 'decoder layer 2, call 2')
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return name
    side, number, kind, call = found.groups()
    told = f"{side} layer {int(number) + 1}" if side else f"layer {int(number) + 1}"
    return told + ", to the encoder" * (kind == "cross") + (f", call {call}" if call else "")


def _head(one: AttentionMap, place: int, album: Album) -> Head | None:
    weights = one.weights[place]
    received = np.nan_to_num(weights).mean(axis=0)  # over the queries
    over = None if one.picture is None else heatmaps.over_picture(received, one.picture)
    uris = album.add(heatmaps.heat(weights), *([over] if over else []))
    if uris is None:
        return None
    # A query that sees no key has NaN for weights in torch's own layers.
    greatest = float(np.nan_to_num(weights).max(initial=0.0))
    alt = (
        f"Attention weights of head {place + 1}, {weights.shape[0]} queries (rows) by {weights.shape[1]} keys "
        f"(columns); greatest weight {greatest:.2g}, key {int(received.argmax()) + 1} receives most"
    )
    caption = f"head {place + 1}, up to {greatest:.2g}"
    return Head(uris[0], uris[1] if over else None, shades(one.tokens, received), caption, alt)


def shades(tokens: Sequence[str] | None, received: NDArray[np.floating]) -> list[tuple[str, str]]:
    """Each token with its share of the greatest attention received, "0.00" to "1.00"; empty for no tokens."""
    greatest = received.max(initial=0.0)
    shares = received / greatest if greatest > 0 else received
    return [(token, f"{share:.2f}") for token, share in zip(tokens or (), shares, strict=False)]


def kernels(alignments: Sequence[AlignmentPicture], album: Album) -> list[Kernel]:
    """W_A of every layer after training and, where its initial value is known, what training added to it."""
    found = []
    for one in alignments:
        stack = one.weight if one.weight.ndim == 3 else one.weight[None]
        changes = None if one.initial is None else (one.weight - one.initial).reshape(stack.shape)
        kernel = Kernel(RunName.of(one.run), layer_name(one.layer), total=len(stack))
        for place, matrix in enumerate(stack[:HEADS_SHOWN]):
            which = f"head {place + 1}" if one.weight.ndim == 3 else "all heads"
            parts = [("after training", matrix), *([] if changes is None else [("change", changes[place])])]
            if group := _drawn(which, parts, album):
                kernel.heads.append(group)
        if kernel.heads:
            found.append(kernel)
    return found


def _drawn(which: str, parts: Iterable[tuple[str, NDArray[np.floating]]], album: Album) -> list[Drawn]:
    """The matrices of one kernel, all of them or none; blue below zero, white at zero, red above."""
    contents, words = [], []
    for what, matrix in parts:
        content, reach = heatmaps.diverging(matrix)
        contents.append(content)
        size = f"{matrix.shape[0]} by {matrix.shape[0]}, values from -{reach:.2g} to {reach:.2g}"
        words.append((f"{which}, {what}, ±{reach:.2g}", f"Alignment kernel of {which}, {what}, {size}"))
    uris = album.add(*contents) or []
    return [Drawn(uri, caption, alt) for uri, (caption, alt) in zip(uris, words, strict=False)]
