"""What a finished comparison hands to its report: records, curves, attention maps, alignment kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Record = Mapping[str, object]
"""One run as it stands in ``results.json``: task, scale, mechanism, heads, seed, metrics, versions, ...

A run that diverged has the reason as ``diverged`` and no metrics.
"""


Curve = Sequence[Mapping[str, float]]
"""One run's ``metrics.jsonl``: an entry an epoch, with losses and with accuracies in per cent."""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """The attention weights of one layer of one run on one input.

    Args:
        run: name of the run, such as ``"super-h4-s0"``.
        layer: name of the layer in the model, such as ``"blocks.0.attention"``.
        label: what the input is, for the reader (``"a handwritten 7"``).
        weights: (heads, L, S), each row a distribution over the S keys.
        tokens: the S tokens of a text input; padding is empty.
        queries: the L tokens that ask, where they are not the keys.
        predicted: what the run's model says of the input, for the reader (``"7 (98 %)"``); "": not known.
        picture: uint8, (H, W) grey or (H, W, 3) colour, of an image input.

    Raises:
        ValueError: arrays of another shape or kind.
    """

    run: str
    layer: str
    label: str
    weights: NDArray[np.floating]
    tokens: Sequence[str] | None = None
    picture: NDArray[np.uint8] | None = None
    queries: Sequence[str] | None = None
    predicted: str = ""

    def __post_init__(self) -> None:
        if self.weights.ndim != 3:
            raise ValueError(
                f"weights of an attention map are (heads, L, S), received shape {self.weights.shape}. "
                "Hand over one input of the batch: weights[0]."
            )
        if self.tokens is not None and len(self.tokens) != self.weights.shape[2]:
            raise ValueError(
                f"received {len(self.tokens)} tokens for {self.weights.shape[2]} keys: one a key is needed."
            )
        if self.queries is not None and len(self.queries) != self.weights.shape[1]:
            raise ValueError(
                f"received {len(self.queries)} query tokens for {self.weights.shape[1]} queries: one a query is needed."
            )
        if self.picture is not None and not (
            self.picture.dtype == np.uint8 and (self.picture.ndim == 2 or self.picture.shape[2:] == (3,))
        ):
            raise ValueError(
                f"a picture is uint8, (H, W) or (H, W, 3), received {self.picture.dtype}, shape {self.picture.shape}. "
                "Scale the values to 0 ... 255 first."
            )


@dataclass(frozen=True, slots=True)
class AlignmentPicture:
    """The alignment kernel W_A of one layer of one run.

    Args:
        run: name of the run.
        layer: name of the layer in the model.
        weight: (l, l), shared by the heads, or (heads, l, l).
        initial: the same before training; None: not known.

    Raises:
        ValueError: an array of another shape.
    """

    run: str
    layer: str
    weight: NDArray[np.floating]
    initial: NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim not in (2, 3) or self.weight.shape[-1] != self.weight.shape[-2]:
            raise ValueError(f"W_A is (l, l) or (heads, l, l), received shape {self.weight.shape}.")
        if self.initial is not None and self.initial.shape != self.weight.shape:
            raise ValueError(
                f"W_A before training has the shape of the trained one, {self.weight.shape}, received "
                f"{self.initial.shape}."
            )


@dataclass(frozen=True, slots=True)
class Threshold:
    """A validation accuracy that runs are to reach.

    Args:
        accuracy: in per cent.
        rule: how it was fixed, as the part of a sentence that follows its value.
    """

    accuracy: float
    rule: str


@dataclass(frozen=True, slots=True)
class Study:
    """Everything a report shows. Text in it may come from anywhere; the report trusts none of it.

    Args:
        task: name, title, source and the setting, as plain values.
        records: one mapping a run, see :data:`Record`.
        curves: name of the run -> its :data:`Curve`.
        maps: attention maps, in the order in which they are to appear.
        alignments: pictures of W_A, likewise.
        command: the command that made it.
        commit: the commit it was made at, or ``"unknown"``.
        notes: sentences for the reader: what differs from the paper, what went wrong.
        folders: name of a run -> its folder, seen from that of the report; without those that are not there.
        threshold: the validation accuracy that the records' ``epochs_to_threshold`` are about; None: they have none.
    """

    task: Mapping[str, object]
    records: Sequence[Record]
    curves: Mapping[str, Curve]
    maps: Sequence[AttentionMap]
    alignments: Sequence[AlignmentPicture]
    command: str
    commit: str
    notes: Sequence[str] = ()
    threshold: Threshold | None = None
    folders: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        """How many of the runs came to their end; the others diverged."""
        return sum("diverged" not in record for record in self.records)
