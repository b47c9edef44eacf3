"""The implementations: each has ``unsupported(call)`` and ``compute(call)``, and none imports another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from better_attention.call.call import Call

from . import chunked, flex, native, reference, sdpa, triton


class Implementation(NamedTuple):
    """One way of computing a call.

    Args:
        unsupported: the reasons why it cannot compute a call; empty where it can.
        compute: returns head outputs, and weights if the call wants them.
        portable: whether it consists of torch's own operators, so that an exported program runs without this package.
    """

    unsupported: Callable[[Call], list[str]]
    compute: Callable[[Call], tuple[Tensor, Tensor | None]]
    portable: bool


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "native": Implementation(native.unsupported, native.compute, portable=False),
        "sdpa": Implementation(sdpa.unsupported, sdpa.compute, portable=True),
        "triton": Implementation(triton.unsupported, triton.compute, portable=False),
        "flex": Implementation(flex.unsupported, flex.compute, portable=False),
        "chunked": Implementation(chunked.unsupported, chunked.compute, portable=False),
        "reference": Implementation(reference.unsupported, reference.compute, portable=True),
    }
)
"""By name, in the order in which ``impl="auto"`` considers them; :mod:`.dispatch` says which are slow for a call."""
