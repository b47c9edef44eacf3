"""How far two lists of outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves


def tensors_of(result: Any) -> list[Tensor]:
    """Every tensor in what a model returned, in the order in which exporters number them."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, over the largest expected number or 1, whichever is larger; infinite where shapes, NaNs
    or the number of outputs differ.
    """
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        a, b = ours.double(), theirs.double()
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
        scale = max(1.0, float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 1.0)
        worst = max(worst, float(difference.max()) / scale)
    return worst


def cosine(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean cosine similarity of the last axis of all floating outputs; 0 where a number is not finite."""
    values = []
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.is_floating_point() and theirs.numel():
            a, b = (x.double().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (ours, theirs))
            if not bool(a.isfinite().all()):
                return 0.0
            similar = F.cosine_similarity(a, b, dim=-1)
            values.append(similar.where(b.norm(dim=-1) > 0, 1.0).mean())
    return float(torch.stack(values).mean()) if values else 1.0


def same_choice(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Share of positions in the first output with the same largest entry on the last axis."""
    if not expected or not expected[0].dim() or not expected[0].numel():
        return 1.0
    return float((found[0].argmax(-1) == expected[0].argmax(-1)).double().mean())
