"""Calls of the layer's sub-modules, with messages where weights and inputs do not go together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from better_attention.call.torch_private import is_bare, is_unpatched, own_parameters
from better_attention.call.torch_state import autocast_dtype
from better_attention.tensors import FLOATING


def called(part: nn.Module, x: Tensor, name: str, *settings: int) -> Tensor:
    """``part(x, *settings)``, with an error that says so where its weights are of another dtype or on another device.

    Args:
        part: a sub-module of the layer that takes one tensor.
        x: its input.
        name: what messages call it.
        settings: further arguments of its forward.

    Raises:
        TypeError: its parameters are of another dtype, and it did not convert either side.
        ValueError: they are on another device, likewise.
    """
    weight = own_parameters(part).get("weight")
    # Hooks and wrappers may bring the weights only during the call: a part that has any is not judged before.
    if weight is not None and _goes_unnoticed(weight, x) and _is_untouched(part):
        raise _mismatch(name, weight, x)
    try:
        # The call, and not its forward: hooks, offloading and sharding act on calls.
        result: Tensor = part(x, *settings)
    except RuntimeError as error:
        if type(error) is RuntimeError:  # its subclasses are other problems: out of memory, for example
            for parameter in own_parameters(part).values():
                if parameter is not None and _differ(parameter, x):
                    raise _mismatch(name, parameter, x) from error
        raise
    return result


def _differ(parameter: Tensor, x: Tensor) -> bool:
    return parameter.device != x.device or (parameter.is_floating_point() and parameter.dtype != x.dtype)


def _goes_unnoticed(weight: Tensor, x: Tensor) -> bool:
    """Whether weight and input do not go together although torch would raise no error here that could be explained.

    torch mixes the meta device with others, and returns unwritten memory; a compiler tries operators on its own.
    """
    if torch.compiler.is_compiling() and autocast_dtype(x.device.type) is None:
        return _differ(weight, x)
    return weight.is_meta is not x.is_meta


def _mismatch(name: str, parameter: Tensor, x: Tensor) -> TypeError | ValueError:
    if parameter.device == x.device:
        inputs = f"the inputs with .to({parameter.dtype}), " if parameter.dtype in FLOATING else ""
        return TypeError(
            f"the parameters of {name} are {parameter.dtype}, its input is {x.dtype}. Convert {inputs}the layer with "
            f".to({x.dtype}), or use torch.autocast."
        )
    way_out = "Move the inputs or the layer with .to(device)"
    if parameter.is_meta:
        way_out = "Load weights with load_state_dict(..., assign=True), or call .to_empty(device=...), first"
    return ValueError(f"the parameters of {name} are on {parameter.device}, its input is on {x.device}. {way_out}.")


def _is_untouched(part: nn.Module) -> bool:
    """Whether nothing provides weights at the moment of the call: no hook, no replaced or patched forward."""
    overridden = isinstance(part, nn.Linear) and type(part).forward is not nn.Linear.forward
    return not overridden and is_bare(part) and is_unpatched()
