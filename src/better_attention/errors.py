"""How values appear in error messages: one place, so that names, values and expectations cannot drift."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable
from numbers import Real
from typing import SupportsIndex

LARGEST = 2**31 - 1
"""The largest size that is believed; a larger number is treated as a typing error."""


def describe(value: object) -> str:
    """What came, in one line: tensors and other libraries' arrays by dtype and shape, anything else by value and type.

    >>> describe([1, 2])
    '[1, 2] (list)'
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if _is_tensor(value) or (isinstance(shape, tuple) and shape and dtype is not None):
        kind = "tensor" if _is_tensor(value) else type(value).__name__
        return f"a {str(dtype).removeprefix('torch.')} {kind} of shape {tuple(shape or ())}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _is_tensor(value: object) -> bool:
    """Whether ``value`` is a tensor of torch, which a process without torch cannot have."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def choices(names: Iterable[str]) -> str:
    """A readable list of valid names."""
    return ", ".join(repr(name) for name in names)


def check_int(value: object, name: str, *, at_least: int = 1) -> int:
    """``value`` as an int, or an error naming the argument.

    Raises:
        TypeError: not a whole number (bool included: ``True`` heads is a slip, not a one).
        ValueError: below ``at_least``, or beyond any size a tensor could have.
    """
    # bool and Tensor can be indices in Python, but neither is meant as a size.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or _is_tensor(value):
        raise TypeError(f"{name} must be a whole number >= {at_least}, received {describe(value)}.")
    # Takes NumPy's integers too, and no float, not even a whole one.
    number = operator.index(value)
    if number < at_least:
        raise ValueError(f"{name} must be >= {at_least}, received {number}.")
    # A number of this size would fail in the allocator, with a message that does not name the argument.
    if number > LARGEST:
        raise ValueError(f"{name} must be <= {LARGEST:,}, received {number}.")
    return number


def check_float(value: object, name: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a finite float within ``[low, high]``, or an error naming the argument.

    Raises:
        TypeError: not a real number.
        ValueError: NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, received {describe(value)}.")
    number = float(value)
    # Comparisons only: torch.compile can trace them where the number is symbolic.
    if not -math.inf < number < math.inf or not low <= number <= high:
        span = "finite" if math.isinf(low) else f">= {low:g} and finite" if math.isinf(high) else ""
        span = span or f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {span}, received {number!r}.")
    return number


def check_choice(value: object, name: str, allowed: Iterable[str]) -> str:
    """``value`` if it is one of the ``allowed`` names, or an error listing them.

    Raises:
        TypeError: not a string.
        ValueError: an unknown name.
    """
    allowed = tuple(allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices(allowed)}, received {describe(value)}.")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {choices(allowed)}, received {value!r}.")
    return value


def check_bool(value: object, name: str) -> bool:
    """``value`` if it is a bool, or an error naming the argument.

    Raises:
        TypeError: not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, received {describe(value)}.")
    return value
