"""What a conversion did: to each tensor, to each layer, and to what the model costs. Printable, and as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from better_attention.text import plural

STATUSES = ("exact", "approximated", "new", "dropped")


@dataclass(frozen=True, slots=True)
class TensorChange:
    """What became of one linear map, or of W_A.

    Args:
        tensor: the name that our layers give it, such as ``"q_proj"``.
        status: "exact" (the new layer computes with it what the old one did), "approximated", "new" or "dropped".
        note: how.
    """

    tensor: str
    status: str
    note: str


@dataclass(frozen=True, slots=True)
class HeadFit:
    """How well one head was approximated.

    Args:
        rank: rank of the head's product W_Q W_K^T, which a slice of width d/h can reach only in its own columns.
        residual: share of the variance of the head's keys, under its weights, that the new head does not reproduce,
            0 to 1.
    """

    rank: int
    residual: float


@dataclass(frozen=True, slots=True)
class Size:
    """What one layer costs: numbers, operations of one forward pass, bytes of cache per generated token."""

    parameters: int
    flops: int
    cache_bytes: int


@dataclass(slots=True)
class LayerReport:
    """What became of one attention layer.

    Args:
        name: its place in the model.
        kind: the adapter that read it.
        before: name of the mechanism that it had.
        after: name of the mechanism that it has.
        exact: whether it computes the same function, to rounding.
        changes: one row for each linear map, and for W_A.
        reasons: why it is not exact.
        error_before: norm of the difference to the old layer's output on the calibration inputs, divided by the norm of
            that output, with the projection of the weights alone. None if not measured.
        error_after: the same, fitted.
        heads: one row for each head that lost its W_K; only with calibration.
        size_before: what it did cost.
        size_after: what it costs.
    """

    name: str
    kind: str
    before: str
    after: str
    exact: bool
    changes: list[TensorChange]
    reasons: list[str]
    size_before: Size
    size_after: Size
    error_before: float | None = None
    error_after: float | None = None
    heads: list[HeadFit] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Number of tensors with this status."""
        return sum(change.status == status for change in self.changes)


@dataclass(slots=True)
class ConversionReport:
    """What :func:`better_attention.convert` did.

    Args:
        mechanism: what the layers were converted to.
        length: tokens for which FLOPs are counted.
        layers: one row for each converted layer.
        left: (name, reason) of each attention module that was left as it was.
    """

    mechanism: str
    length: int
    layers: list[LayerReport]
    left: list[tuple[str, str]] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every converted layer computes the same function as before, to rounding."""
        return all(layer.exact for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Everything as lists, dictionaries, texts and numbers."""
        return {**asdict(self), "exact": self.exact}

    def to_json(self) -> str:
        """The same as a JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        kind = "exact" if self.exact else "approximated"
        lines = [f"{plural(len(self.layers), 'layer')} converted to {self.mechanism!r}: {kind}"]
        header = ("layer", *STATUSES, "error", "parameters", "FLOPs", "cache bytes")
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        for row in rows:
            lines.append(
                "  " + "  ".join(_padded(cell, w, i) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            )
        lines.append(f"  FLOPs of one forward pass over {plural(self.length, 'token')}; cache bytes per token.")
        # dict.fromkeys removes repeats and keeps the order: layers of one kind have the same reasons.
        lines += [f"  {reason}" for reason in dict.fromkeys(r for layer in self.layers for r in layer.reasons)]
        lines += [f"  left as it was: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def _row(layer: LayerReport) -> tuple[str, ...]:
    before, after = layer.size_before, layer.size_after
    return (
        layer.name or "(the model)",
        *(str(layer.count(status)) for status in STATUSES),
        _errors(layer),
        f"{before.parameters:,} -> {after.parameters:,}",
        f"{before.flops:.3g} -> {after.flops:.3g}",
        f"{before.cache_bytes:,} -> {after.cache_bytes:,}",
    )


def _errors(layer: LayerReport) -> str:
    if layer.error_before is None or layer.error_after is None:
        return "-"
    return f"{layer.error_before:.2g} -> {layer.error_after:.2g}"


def _padded(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
