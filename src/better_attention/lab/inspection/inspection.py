"""What is known of one model's attention on a few samples: every head by every score, and W_A."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from better_attention.lab.analysis.study import AlignmentPicture, AttentionMap


@dataclass(frozen=True, slots=True)
class LayerMaps:
    """The weights of one layer on one sample.

    Args:
        name: of the layer in the model.
        own: the score with which the model computes.
        maps: score -> the weights that it makes of the same queries and keys; padding is left out.
    """

    name: str
    own: str
    maps: Mapping[str, AttentionMap]


@dataclass(frozen=True, slots=True)
class Sample:
    """One input and all layers on it.

    Args:
        title: what it is, for the reader.
        layers: in the order in which the model calls them.
        predicted: what the model says of it; "": not known.
        picture: uint8 (H, W) or (H, W, 3), or None.
    """

    title: str
    layers: Sequence[LayerMaps]
    predicted: str = ""
    picture: NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that the page shows. Text in it may come from anywhere; the page trusts none of it.

    Args:
        title: name of the run or of the model.
        facts: name -> value, about the model.
        samples: at least one.
        kernels: W_A of every layer that has one.
    """

    title: str
    facts: Mapping[str, str]
    samples: Sequence[Sample]
    kernels: Sequence[AlignmentPicture] = field(default_factory=tuple)


def entropy(weights_NLS: NDArray[np.floating]) -> NDArray[np.float64]:
    """Entropy of each head in bits, (N,): 0 where each query looks at one key, log2 S where all weights are equal.

    The mean over the queries that see a key at all.

    >>> entropy(np.array([[[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]]))
    array([0.5])
    """
    w = np.nan_to_num(np.asarray(weights_NLS, dtype=np.float64))
    bits = -(w * np.log2(w, where=w > 0, out=np.zeros_like(w))).sum(axis=-1)
    sees = w.sum(axis=-1) > 0
    total: NDArray[np.float64] = (bits * sees).sum(axis=-1) / np.maximum(sees.sum(axis=-1), 1)
    return total + 0.0  # no negative zero
