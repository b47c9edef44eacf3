"""From inputs of any rank to batch, length, heads, and back: the axes that are attended over become one length.

Shape suffixes: B batch (times the axes that are not attended over), L queries, S keys, N heads, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of an input (batch, ..., features) that are attended over.

    Args:
        rank: number of dimensions of the input.
        attended: their numbers, none of them the first or the last; weights list them in this order.
    """

    rank: int
    attended: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        """Those between batch and features that are not attended over: every place on them is a sequence of its own."""
        return tuple(axis for axis in range(1, self.rank - 1) if axis not in self.attended)

    @property
    def plain(self) -> bool:
        """Whether the input is (batch, length, features) already."""
        return self.rank == 3

    def flat(self, x: Any, trailing: int) -> Any:
        """(batch, ..., trailing dimensions) as (B, L, trailing dimensions).

        Args:
            x: of ``rank`` - 1 dimensions and the trailing ones.
            trailing: how many dimensions follow those of the input: heads and features for example.
        """
        if self.plain:
            return x
        order = (0, *self.others, *self.attended)
        sizes, rest = ops.shape(x), range(self.rank - 1, self.rank - 1 + trailing)
        x = ops.transpose(x, (*order, *rest))
        batch = _product([sizes[axis] for axis in (0, *self.others)])
        length = _product([sizes[axis] for axis in self.attended])
        return ops.reshape(x, (batch, length, *(sizes[axis] for axis in rest)))

    def unflat(self, x_BLD: Any, like: Any) -> Any:
        """(B, L, trailing dimensions) back in the order of the input ``like`` (batch, ..., features)."""
        if self.plain:
            return x_BLD
        sizes, order = ops.shape(like), (0, *self.others, *self.attended)
        trailing = ops.shape(x_BLD)[2:]
        x = ops.reshape(x_BLD, (*(sizes[axis] for axis in order), *trailing))
        back = [order.index(axis) for axis in range(self.rank - 1)]
        return ops.transpose(x, (*back, *range(self.rank - 1, self.rank - 1 + len(trailing))))

    def unflat_weights(self, weights_BNLS: Any, query: Any, value: Any) -> Any:
        """(B, N, L, S) as (batch, others, N, attended axes of the query, attended axes of the value)."""
        if self.plain:
            return weights_BNLS
        q, v = ops.shape(query), ops.shape(value)
        lead = [q[axis] for axis in (0, *self.others)]
        tail = [sizes[axis] for sizes in (q, v) for axis in self.attended]
        return ops.reshape(weights_BNLS, (*lead, ops.shape(weights_BNLS)[1], *tail))

    def flat_mask(self, mask: Any, query: Any, value: Any, heads: int) -> Any:
        """An attention mask as Keras takes it, as one that is broadcastable to (B, N, L, S).

        Missing dimensions are those before the attended axes, as in Keras.

        Raises:
            ValueError: more dimensions than the weights have, or sizes that are not theirs.
        """
        count = len(self.attended)
        full = 2 + len(self.others) + 2 * count
        given = tuple(mask.shape)
        if not 2 * count <= len(given) <= full:
            raise ValueError(
                f"attention_mask must have {2 * count} to {full} dimensions, (batch, heads, queries, keys) with or "
                f"without the first ones; received shape {given}."
            )
        for _ in range(full - len(given)):
            mask = ops.expand_dims(mask, axis=-2 * count - 1)
        wanted = self.weights_shape(query.shape, value.shape, heads)
        if any(size not in (None, 1, fits) and fits is not None for size, fits in zip(mask.shape, wanted, strict=True)):
            raise ValueError(
                f"attention_mask must broadcast to the shape of the weights, {wanted}: (batch, heads, queries, keys), "
                f"with or without the first ones, True where a query sees a key; received shape {given}. A mask of "
                "padding is value_mask."
            )
        if self.plain:
            return mask
        q, v = ops.shape(query), ops.shape(value)
        lead = [q[axis] for axis in (0, *self.others)]
        alike = ops.shape(mask)[1 + len(self.others)]  # heads of the mask: 1 where all have the same
        tail = [[sizes[axis] for axis in self.attended] for sizes in (q, v)]
        mask = ops.broadcast_to(mask, (*lead, alike, *tail[0], *tail[1]))
        return ops.reshape(mask, (_product(lead), alike, _product(tail[0]), _product(tail[1])))

    def weights_shape(self, query: Sequence[Any], value: Sequence[Any], heads: int) -> tuple[Any, ...]:
        """The shape of what :meth:`unflat_weights` returns, for inputs of these shapes."""
        lead = [query[axis] for axis in (0, *self.others)]
        return (*lead, heads, *(query[axis] for axis in self.attended), *(value[axis] for axis in self.attended))


def _product(sizes: Sequence[Any]) -> Any:
    """Of numbers, or of scalar tensors where a size is known at run time alone."""
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else ops.prod(ops.stack(list(sizes)))


def attended_axes(axes: Any, rank: int) -> Axes:
    """The layer's ``attention_axes`` for an input of that rank; None: all but batch and features.

    Raises:
        ValueError: an axis that the input does not have, or one twice.
        TypeError: no whole numbers.
    """
    if rank < 3:
        raise ValueError(
            f"query must have at least 3 dimensions, (batch, length, features), received {rank}: add a batch dimension "
            "with keras.ops.expand_dims(query, 0)."
        )
    given = tuple(range(1, rank - 1)) if axes is None else axes
    counted = tuple(axis + rank if axis < 0 else axis for axis in given)
    if not all(0 < axis < rank - 1 for axis in counted) or len(set(counted)) < len(counted) or not counted:
        raise ValueError(
            f"attention_axes={axes!r} must name axes between the first (batch) and the last (features) of an input "
            f"with {rank} dimensions, each once: {', '.join(map(str, range(1, rank - 1)))}."
        )
    return Axes(rank, counted)
