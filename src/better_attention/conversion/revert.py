"""What a conversion leaves behind so that it can be taken back, and revert()."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from better_attention.call.torch_private import share_hooks

from .sites import Replacements, Site, check_model, joined, put

MARK = "_before_conversion"
"""Attribute of a converted module: its :class:`Original`."""


@dataclass(frozen=True, slots=True)
class Original:
    """What stood in the place of a converted module, for :func:`revert`.

    Args:
        adapter: the name of what read it.
        place: where below the recognised module the converted one went.
        modules: the old modules, by their names below the recognised module; empty where they were not kept.
    """

    adapter: str
    place: str
    modules: dict[str, nn.Module]


def install(work: Replacements, site: Site, new: nn.Module, keep_original: bool) -> None:
    """Put ``new`` in the place of the site's module, wherever the model uses it."""
    adapter = site.adapter
    # The map that the new layer contains must not act twice, so that the identity takes its place.
    places = {adapter.place: new} | ({adapter.taken_over: nn.Identity()} if adapter.taken_over else {})
    earlier = vars(site.core).get(MARK)
    old = {place: site.module.get_submodule(place) for place in places}
    share_hooks(site.core, new)
    if earlier is None:
        original = Original(adapter.name, adapter.place, old if keep_original else {})
    else:  # converted before: what stood there first is what matters
        original = earlier if keep_original else replace(earlier, modules={})
    object.__setattr__(new, MARK, original)
    # With a place below it, the recognised module is itself shared, and replacing inside it once is enough.
    for name in site.names if not adapter.place else site.names[:1]:
        for place, module in places.items():
            work.put(joined(name, place), module)


def converted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every converted module; one that is used in several places comes once for each."""
    # vars() and not hasattr(), because a wrapper may pass attributes of what it wraps through.
    return [(n, m) for n, m in model.named_modules(remove_duplicate=False) if MARK in vars(m)]


def original_of(module: nn.Module) -> Original:
    """What stood in the place of a converted module."""
    found: Original = vars(module)[MARK]
    return found


def outer_name(name: str, original: Original) -> str:
    """The name of the module that the adapter recognised, from that of the converted one."""
    return name.removesuffix(original.place).removesuffix(".") if original.place else name


def converted_layers(model: nn.Module) -> list[str]:
    """The names of the host's attention layers that were converted, each once, in the order of the model.

    They are the same in the model before its conversion.
    """
    first: dict[int, str] = {}
    for name, module in converted(model):
        first.setdefault(id(module), outer_name(name, original_of(module)))
    return list(first.values())


def revert(model: nn.Module) -> list[str]:
    """Put back the modules that :func:`convert` replaced, with the weights that they had.

    They come to the device and dtype of the converted ones, and into their training mode. What was trained since is
    lost, except in parameters that the conversion had taken over unchanged.

    Args:
        model: a converted model.

    Returns:
        The names of the layers that were put back.

    Raises:
        ValueError: nothing in the model is converted, or a layer was converted with ``keep_original=False``.
    """
    check_model(model)
    found = converted(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no converted layer: convert() marks what it replaces.")
    lost = [n for n, m in found if not original_of(m).modules]
    if lost:
        raise ValueError(
            f"converted with keep_original=False, so that nothing is there to put back: {', '.join(lost)}."
        )
    for name, module in found:
        _put_back(model, name, module, original_of(module))
    return [name for name, _ in found]


def _put_back(model: nn.Module, name: str, module: nn.Module, original: Original) -> None:
    base = outer_name(name, original)
    # Any parameter: the model may have been moved or converted to another dtype since.
    like: Tensor = next(module.parameters())
    for place, old in original.modules.items():
        put(model, joined(base, place), old.to(device=like.device, dtype=like.dtype).train(module.training))
