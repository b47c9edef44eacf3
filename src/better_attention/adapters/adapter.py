"""Adapters: one for each kind of attention module that other libraries have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from better_attention.call.torch_private import is_hooked
from better_attention.errors import choices

from .source import Source


@dataclass(frozen=True, slots=True)
class Adapter:
    """How one kind of attention module is recognised, read and replaced.

    Args:
        name: what the report and the recipe call it.
        library: the distribution that the module comes from, for the versions in a recipe.
        matches: whether a module is of this kind, by its attributes; it must not import the library.
        read: the module in neutral terms. Called only where ``refusals`` is empty.
        build: a new module from the old one and what it has to compute; it has the old one's forward signature and
            return values, and ``q_proj``, ``k_proj``, ``v_proj``, ``align`` and ``out_proj``.
        refusals: why this one cannot be converted, in words; empty for yes.
        place: where below the recognised module the new one goes; "" for in its place.
        taken_over: a linear map below the recognised module that the new one contains, and that becomes the identity.
    """

    name: str
    library: str
    matches: Callable[[nn.Module], bool]
    read: Callable[[nn.Module], Source]
    build: Callable[[nn.Module, Source], nn.Module]
    refusals: Callable[[nn.Module], list[str]] = lambda module: []
    place: str = ""
    taken_over: str | None = None


_ADAPTERS: dict[str, Adapter] = {}


def register(adapter: Adapter) -> Adapter:
    """Let :func:`better_attention.convert` know a kind of module.

    Args:
        adapter: how such modules are recognised, read and replaced.

    Returns:
        The same adapter.

    Raises:
        ValueError: the name is taken.
    """
    if adapter.name in _ADAPTERS:
        raise ValueError(f"an adapter {adapter.name!r} is registered already: choose another name.")
    _ADAPTERS[adapter.name] = adapter
    return adapter


def unregister(name: str) -> None:
    """Forget the adapter called ``name``.

    Raises:
        ValueError: an unknown name.
    """
    adapter(name)
    del _ADAPTERS[name]


def adapter(name: str) -> Adapter:
    """The registered adapter called ``name``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _ADAPTERS:
        raise ValueError(f"unknown adapter {name!r}: registered are {choices(_ADAPTERS)}.")
    return _ADAPTERS[name]


def names() -> list[str]:
    """The names of all registered adapters."""
    return list(_ADAPTERS)


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter that recognises ``module``, or None."""
    # The first that matches, in the order of registration.
    return next((a for a in _ADAPTERS.values() if a.matches(module)), None)


def takes(module: nn.Module, *names: str) -> bool:
    """Whether the forward method of ``module`` takes exactly these arguments, beside ``**kwargs``."""
    # Of the class, because accelerate and others replace the instance's forward by one that takes anything.
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return named == ["self", *names]


def signature_refusals(module: nn.Module, *names: str) -> list[str]:
    """Why the forward method of ``module`` cannot be imitated: it takes other arguments."""
    if takes(module, *names):
        return []
    found = inspect.signature(type(module).forward)
    return [f"its forward method is {found}, which another version of its library has: expected {', '.join(names)}"]


def has(module: nn.Module, *names: str) -> bool:
    """Whether ``module`` has these attributes; dotted names look further in."""
    for name in names:
        here: object = module
        for part in name.split("."):
            if not hasattr(here, part):
                return False
            here = getattr(here, part)
    return True


def linear_refusals(module: nn.Module, *names: str) -> list[str]:
    """Why the linear maps called ``names`` cannot be read: they are of another class, as adapters and quantisers leave
    them, or hold no numbers of a kind to compute with.
    """
    reasons = []
    for name in names:
        linear = module.get_submodule(name)
        weight = getattr(linear, "weight", None)
        # Exactly this class: a subclass may compute something else from the same weight (LoRA, quantisation).
        if type(linear) is not nn.Linear:
            reasons.append(f"{name} is a {type(linear).__name__}, not a plain nn.Linear: merge or remove what wraps it")
        # torch.nn.utils.parametrize makes `weight` a property whose value is computed, and then no Parameter.
        elif not isinstance(weight, nn.Parameter):
            reasons.append(f"{name}.weight is computed from other parameters: remove that first")
        elif not weight.is_floating_point():
            reasons.append(f"{name}.weight is {weight.dtype}, not floating point")
        elif is_hooked(linear):
            reasons.append(f"{name} has hooks, which would be lost: remove them first")
    return reasons
