"""Inputs of a model by name, and other inputs like them: of another batch size and length, with rows hidden."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.errors import describe

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a model is called with: one tensor, several by position, or several by name."""
Dynamic = Mapping[str, Mapping[int, str]]
"""Name of an input -> axis -> the name of its size, as in ``{"x": {0: "batch", 1: "length"}}``."""


def by_name(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs by the names of the arguments of ``model.forward``, in its order.

    Raises:
        TypeError: something else than tensors, none at all, or arguments that ``forward`` does not take.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (_tuple(inputs), {})
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        received = ", ".join(kwargs) if kwargs else f"{len(args)} by position"
        raise TypeError(f"inputs do not fit {type(model).__name__}.forward: {error}; received {received}.") from None
    found: dict[str, Any] = {}
    for name, value in bound.items():
        if isinstance(value, tuple) or (isinstance(value, dict) and name not in kwargs):
            if isinstance(value, tuple):
                raise TypeError(
                    f"{type(model).__name__}.forward takes *{name}: wrap the model in a module whose arguments have "
                    "names."
                )
            found |= value
        else:
            found[name] = value
    wrong = [f"{name} is {describe(value)}" for name, value in found.items() if not isinstance(value, Tensor)]
    if wrong or not found:
        raise TypeError(f"inputs must be tensors: {'; '.join(wrong) or 'received none'}.")
    return found


def _tuple(inputs: object) -> tuple[Any, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    if isinstance(inputs, tuple | list):
        return tuple(inputs)
    raise TypeError(
        f"inputs must be a tensor, a tuple of tensors or a dictionary of them, received {describe(inputs)}."
    )


def guess_dynamic(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Axis 0 is the batch; axis 1 is the length where it has the size that it has in the first sequence.

    A sequence is (B, L, D), or (B, L) of integers or bool. Images (B, channels, height, width) and plain features
    (B, D) have no length.
    """
    sequences = [x for x in inputs.values() if x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())]
    length = sequences[0].shape[1] if sequences else None
    return {
        name: {0: "batch"} | ({1: "length"} if x.dim() in (2, 3) and x.shape[1] == length else {})
        for name, x in inputs.items()
        if x.dim() > 0
    }


def check_dynamic(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> None:
    """Refuse axes that are not there, and one name for two sizes.

    Raises:
        TypeError, ValueError: they do not describe the inputs.
    """
    sizes: dict[str, tuple[str, int]] = {}
    if not isinstance(dynamic, Mapping):
        raise TypeError(f"dynamic must be a dictionary such as {{'x': {{0: 'batch'}}}}, received {describe(dynamic)}.")
    for name, axes in dynamic.items():
        if name not in inputs:
            raise ValueError(f"dynamic names the input {name!r}; there are {', '.join(inputs)}.")
        for axis, size_name in axes.items():
            if not isinstance(axis, int) or not 0 <= axis < inputs[name].dim():
                raise ValueError(
                    f"dynamic[{name!r}] names axis {axis!r} of a tensor of shape {tuple(inputs[name].shape)}."
                )
            size = inputs[name].shape[axis]
            other, there = sizes.setdefault(size_name, (name, size))
            if there != size:
                raise ValueError(
                    f"dynamic calls {size_name!r} the size {there} of {other} and the size {size} of {name}."
                )


@dataclass(frozen=True, slots=True)
class Variation:
    """Inputs on which a model and its export are compared.

    Args:
        name: what is particular about them.
        inputs: by name.
    """

    name: str
    inputs: dict[str, Tensor]


def variations(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> Iterator[Variation]:
    """The inputs themselves, then others: shuffled values, other sizes, and samples whose mask is all one value."""
    sizes = {name: inputs[key].shape[axis] for key, axes in dynamic.items() for axis, name in axes.items()}
    yield Variation("as given", dict(inputs))
    wanted = [{name: 1} for name in sizes] + ([dict.fromkeys(sizes, 1)] if len(sizes) > 1 else [])
    wanted += [{name: size + 1} for name, size in sizes.items()]
    for number, change in enumerate(wanted, start=1):
        label = ", ".join(f"{name} {size}" for name, size in change.items())
        yield Variation(label, _resized(inputs, dynamic, change, seed=number))
    for name, x in inputs.items():
        for value in _mask_values(x):
            changed = x.clone()
            changed[0] = value
            yield Variation(f"{name} all {value} in one sample", {**inputs, name: changed})


def _mask_values(x: Tensor) -> tuple[int | bool, ...]:
    """What a mask can hold; nothing for a tensor that does not look like one."""
    if x.dim() < 2:
        return ()
    if x.dtype == torch.bool:
        return (True, False)
    looks_like_mask = not x.is_floating_point() and bool(((x == 0) | (x == 1)).all())
    return (0, 1) if looks_like_mask else ()


def _resized(inputs: Mapping[str, Tensor], dynamic: Dynamic, change: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Inputs of other sizes: values in another order, an axis cut off or continued from its beginning."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, x in inputs.items():
        order = torch.randperm(x.numel(), generator=generator).to(x.device)
        shuffled = x.flatten()[order].view_as(x)
        for axis, size_name in dynamic.get(name, {}).items():
            if size_name in change:
                places = torch.arange(change[size_name], device=x.device) % x.shape[axis]
                shuffled = shuffled.index_select(axis, places)
        result[name] = shuffled
    return result
