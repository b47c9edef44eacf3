"""What inputs a layer takes: messages that say what came, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

if TYPE_CHECKING:
    from .layer import MultiHeadAttention


def check_inputs(query: Sequence[Any], value: Sequence[Any], key: Sequence[Any]) -> None:
    """Refuse shapes that do not go together.

    Raises:
        ValueError: another number of dimensions, other batch sizes, or a key without its value.
    """
    shapes = {"query": tuple(query), "value": tuple(value), "key": tuple(key)}
    given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if len({len(shape) for shape in shapes.values()}) > 1 or len(query) < 3:
        raise ValueError(
            f"query, value and key must have the same number of dimensions, at least (batch, length, features); "
            f"received {given}."
        )
    if not _agree(value[:-1], key[:-1]):
        raise ValueError(
            f"key and value must agree in all dimensions but the last, a key for each value; received {given}. "
            "The order of the arguments is Keras' (query, value, key)."
        )
    if not _agree(query[:1], value[:1]):
        raise ValueError(f"query and value must have one batch size; received {given}.")


def _agree(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return all(None in (a, b) or a == b for a, b in zip(left, right, strict=True))


def check_slices(layer: MultiHeadAttention, query: Sequence[Any], key: Sequence[Any], value: Sequence[Any]) -> None:
    """Where a map is not learned, heads read slices of the input itself, which has to be as wide as all of them.

    Raises:
        ValueError: it is not.
    """
    widths = {"q": layer.key_dim, "k": layer.key_dim, "v": layer.value_dim}
    inputs = {"q": ("query", query), "k": ("key", key), "v": ("value", value)}
    for letter, (name, shape) in inputs.items():
        D, width, N = shape[-1], widths[letter], layer.num_heads
        if letter in layer.mechanism.projections or N * width == D:
            continue
        argument = "value_dim" if letter == "v" else "key_dim"
        fits = f"{argument}={D // N}" if isinstance(D, int) and D % N == 0 else f"a width that {N} heads divide"
        raise ValueError(
            f"mechanism {layer.mechanism.name!r} has no W_{letter.upper()}: its heads read slices of the {name} "
            f"itself, whose width {D} must therefore be num_heads * {argument} = {N} * {width} = {N * width}. Build "
            f"the layer with {fits}, project the {name} first, or use a mechanism that learns {letter!r}."
        )


def refuse_leak(layer: MultiHeadAttention, mask: Any) -> None:
    """Refuse a causal mask together with a W_A that mixes later values into earlier ones, where its values are known.

    Raises:
        ValueError: there is one. Compiled functions see no values: there ``align_causal`` is the caller's affair.
    """
    if layer.align is None or getattr(layer.align, "causal", True):
        return
    keep = _values(mask)
    if keep is not None and _hides_the_future(keep):
        raise ValueError(
            f"mechanism {layer.mechanism.name!r} received a causal attention_mask, but its W_A mixes every value "
            "position, later ones included, into every other before any mask applies: the future would leak. Build "
            "the layer with align_causal=True, which keeps W_A lower triangular."
        )


def _values(mask: Any) -> np.ndarray[Any, Any] | None:
    try:
        return np.asarray(ops.convert_to_numpy(mask), dtype=bool)
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError):
        return None  # a placeholder, whatever the backend calls it


def _hides_the_future(keep: np.ndarray[Any, Any]) -> bool:
    """Whether no query sees a later key; as :func:`better_attention.call.masks.triangle_conditions` has it."""
    L, S = keep.shape[-2:]
    if L < 2 or S < 2 or np.triu(keep, 1).any() or not keep[..., 1:].any():
        return False
    # A small mask can hide its few later keys by chance: it counts only if it is the triangle itself.
    return min(L, S) >= 5 or bool((keep == np.tril(np.broadcast_to(keep.any(-2, keepdims=True), keep.shape))).all())
