"""Who computes: every implementation answers ``unsupported(call)`` and ``compute(call)``; none imports another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from . import chunked, native, reference, sdpa
from .call import Call


class Implementation(NamedTuple):
    """One way of computing a call: why it would not, and how it does."""

    unsupported: Callable[[Call], list[str]]
    compute: Callable[[Call], tuple[Tensor, Tensor | None]]


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        m.__name__.rpartition(".")[2]: Implementation(m.unsupported, m.compute)
        for m in (native, sdpa, chunked, reference)
    }
)
"""By name; ``impl="auto"`` asks them in this order, after the small-call rule in :mod:`better_attention.choice`."""
