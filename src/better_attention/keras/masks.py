"""Every mask of a call as one: True where a query sees a key, broadcastable to (B, N, L, S)."""

from __future__ import annotations

from typing import Any

from keras import ops

from .axes import Axes


def padding(mask: Any | None, x: Any, axes: Axes, name: str) -> Any | None:
    """A mask over the places of an input, True = a real token, as (B, length).

    Raises:
        ValueError: another shape than the input's without its features.
    """
    if mask is None:
        return None
    mask = ops.convert_to_tensor(mask)
    given, wanted = tuple(mask.shape), tuple(x.shape)[:-1]
    if len(given) != len(wanted) or any(None not in (a, b) and a != b for a, b in zip(given, wanted, strict=True)):
        raise ValueError(
            f"{name} must have the shape of {name.removesuffix('_mask')} without its features, {wanted}, True for real "
            f"tokens; received shape {given}. A mask of queries and keys is attention_mask."
        )
    return axes.flat(ops.cast(mask, "bool"), 0)


def both(left: Any | None, right: Any | None) -> Any | None:
    """Where both masks are True; None is a mask that is True everywhere."""
    if left is None or right is None:
        return left if right is None else right
    return ops.logical_and(left, right)


def band(length: Any, keys: Any, *, causal: bool, window: int | None) -> Any | None:
    """(1, 1, L, S): keys at or before the query, and at most ``window`` - 1 places away from it."""
    if not causal and window is None:
        return None
    distance_LS = ops.expand_dims(ops.arange(length, dtype="int32"), 1) - ops.arange(keys, dtype="int32")
    keep = distance_LS >= 0 if causal else None
    if window is not None:
        keep = both(keep, ops.abs(distance_LS) < window)
    return ops.reshape(keep, (1, 1, length, keys))


def of_weights(
    query_mask_BL: Any | None, present_BS: Any | None, mask_BNLS: Any | None, band_11LS: Any | None
) -> Any | None:
    """All of them as one mask, or None where nothing is hidden."""
    keep = both(mask_BNLS, band_11LS)
    if query_mask_BL is not None:
        keep = both(keep, query_mask_BL[:, None, :, None])
    if present_BS is not None:
        keep = both(keep, present_BS[:, None, None, :])
    return keep
