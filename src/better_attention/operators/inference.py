"""Operators without a derivative: what torch.compile keeps as one node of a program for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_type_hints

import torch
from torch import Tensor

from .definition import A, schema, schema_types

_library: torch.library.Library | None = None


def register_inference(
    name: str, arguments: type[A], compute: Callable[[A], Tensor], fake: Callable[[A], Tensor]
) -> Callable[..., Tensor]:
    """Make an operator with one result known to torch, for tensors on the CPU.

    Args:
        name: below ``torch.ops.better_attention``.
        arguments: the ``NamedTuple`` A, as for :class:`.Definition`.
        compute: the result.
        fake: a tensor with its shape and strides, without values.

    Returns:
        The operator, which takes the fields of A.
    """
    global _library
    # Defined directly and not by torch.library.custom_op, whose checks of every call take longer than a small kernel.
    _library = _library or torch.library.Library("better_attention", "FRAGMENT")
    parameters = schema_types(get_type_hints(arguments))
    _library.define(name + schema(parameters, 1), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, lambda *flat: compute(arguments(*flat)), "CPU")
    torch.library.register_fake(f"better_attention::{name}", lambda *flat: fake(arguments(*flat)), lib=_library)
    operator: Callable[..., Tensor] = getattr(torch.ops.better_attention, name)
    return operator
