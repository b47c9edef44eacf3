"""Scores in ``keras.ops``: weights (B, N, L, S) of products z = scale q.k, normaliser included.

The formulas are those of :mod:`better_attention.scores`. A row in which every key is hidden has weights 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from keras import backend, ops

HIDDEN = -1e30
"""In place of minus infinity: sums with it stay numbers, and its exponential is 0."""


def softmax(z_BNLS: Any, keep: Any | None) -> Any:
    """exp(z) / sum exp(z) over the keys (2403.01643, equation 3).

    Args:
        z_BNLS: scaled products, float32 or float64.
        keep: True where a query sees a key, broadcastable to them; None: everywhere.
    """
    if keep is None:
        return ops.softmax(z_BNLS, axis=-1)
    weights = ops.softmax(ops.where(keep, z_BNLS, HIDDEN), axis=-1)
    # In a row without a key to see, every key has the same share, which is taken away here.
    return ops.where(keep, weights, 0.0)


def expressive(z_BNLS: Any, keep: Any | None) -> Any:
    """z^2 / (1 + z^2) over its sum (2407.18601); arguments as in :func:`softmax`.

    Two constants, which the result does not depend on, keep every digit: per row a factor, where all scores are so
    small that 1 + z^2 is 1 to the last bit and the weight is z^2; and per score m = max(1, |z|), with which
    z^2 / (1 + z^2) = (z/m)^2 / (1/m^2 + (z/m)^2) neither overflows nor has an infinite derivative.
    """
    smallest, eps = _LIMITS[backend.standardize_dtype(z_BNLS.dtype)]
    if keep is not None:
        z_BNLS = ops.where(keep, z_BNLS, 0.0)  # z = 0 is weight 0
    largest_BNL1 = ops.max(ops.abs(ops.stop_gradient(z_BNLS)), axis=-1, keepdims=True)
    small_BNL1 = ops.logical_and(largest_BNL1 > smallest, largest_BNL1 < eps)
    z_BNLS = z_BNLS / ops.where(small_BNL1, largest_BNL1, 1.0)
    inverse_BNLS = 1.0 / ops.maximum(ops.abs(ops.stop_gradient(z_BNLS)), 1.0)
    square_BNLS = ops.square(z_BNLS * inverse_BNLS)
    share_BNL1 = ops.where(small_BNL1, 0.0, 1.0)  # of z^2 in 1 + z^2
    a_BNLS = square_BNLS / (ops.square(inverse_BNLS) + share_BNL1 * square_BNLS)
    # Divided by its total as a constant first: where one key has all the weight, the two terms of the derivative of
    # the quotient then cancel to the last bit.
    a_BNLS = a_BNLS / _total(ops.stop_gradient(a_BNLS))
    return a_BNLS / _total(a_BNLS)


def _total(a_BNLS: Any) -> Any:
    """The sum over keys, 1 in a row without weight."""
    total_BNL1 = ops.sum(a_BNLS, axis=-1, keepdims=True)
    return ops.where(total_BNL1 == 0.0, 1.0, total_BNL1)


_LIMITS = {"float32": (2.0**-126, 2.0**-23), "float64": (2.0**-1022, 2.0**-52)}
"""Of each dtype the smallest number with all digits, and the distance from 1 to the next number."""

SCORES: Mapping[str, Callable[[Any, Any | None], Any]] = MappingProxyType(
    {"softmax": softmax, "expressive": expressive}
)
"""The scores that this layer computes, by the names of :data:`better_attention.scores.SCORES`."""
