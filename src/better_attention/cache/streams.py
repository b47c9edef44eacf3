"""Which tensors a layer has to remember, by its mechanism."""

from __future__ import annotations

from better_attention.mechanism import Mechanism

KEY, VALUE, SOURCE = "key", "value", "source"

SHOWN = "shown"
"""The rows that say which tokens are none of padding, (B, S), bool; there only once some are padding."""


def streams(mechanism: Mechanism, *, window: bool = False) -> tuple[str, ...]:
    """The names of the tensors (B, S, width) that a cache of such a layer holds.

    ``"key"``: what queries are compared with: projected, or the layer's input. ``"value"``: what is mixed, where that
    is another tensor than the key: projected, or aligned by W_A, or the input beside a projected key. ``"source"``:
    the values before W_A, from which each new aligned value is made, where that is another tensor than the key.

    Args:
        mechanism: the mechanism.
        window: whether W_A belongs to a sliding window: it then acts on weights, and no aligned values exist.

    >>> [streams(Mechanism.of(name)) for name in ("standard", "efficient", "super", "standard+align")]
    [('key', 'value'), ('key',), ('key', 'value'), ('key', 'value', 'source')]
    """
    projected = mechanism.projections & {"k", "v"}
    aligned = mechanism.aligned and not window
    # Without W_K and W_V key and value are one tensor, the input; W_A alone makes another value of it.
    return (KEY,) + (VALUE,) * bool(projected or aligned) + (SOURCE,) * bool(projected and aligned)


def letter_of(stream: str) -> str:
    """Whether a stream is one of keys, ``"k"``, or of values, ``"v"``."""
    return "k" if stream == KEY else "v"
