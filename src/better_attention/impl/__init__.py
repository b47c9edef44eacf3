"""Who computes: every implementation answers ``unsupported(call)`` and ``compute(call)``; none imports another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from better_attention.call.call import Call

from . import chunked, native, reference, sdpa


class Implementation(NamedTuple):
    """One way of computing a call.

    Args:
        unsupported: why it would not compute a call; empty where it can.
        compute: head outputs, and weights where they are asked for.
        portable: whether it is made of torch's own operators alone, so that an exported program runs without us.
    """

    unsupported: Callable[[Call], list[str]]
    compute: Callable[[Call], tuple[Tensor, Tensor | None]]
    portable: bool


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "native": Implementation(native.unsupported, native.compute, portable=False),
        "sdpa": Implementation(sdpa.unsupported, sdpa.compute, portable=True),
        "chunked": Implementation(chunked.unsupported, chunked.compute, portable=False),
        "reference": Implementation(reference.unsupported, reference.compute, portable=True),
    }
)
"""By name; ``impl="auto"`` asks them in this order, after the small-call rule of :mod:`.dispatch`."""
