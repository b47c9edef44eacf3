"""Where a model has attention, and the replacement of modules that can be taken back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from better_attention.adapters import hosts
from better_attention.adapters.adapter import Adapter, adapter_for
from better_attention.call.torch_private import is_compiled
from better_attention.errors import choices, describe


@dataclass(slots=True)
class Site:
    """One attention module of a model; a module that is used in several places is one site.

    Args:
        names: its places in the model.
        module: the module.
        adapter: what recognised it.
    """

    names: list[str]
    module: nn.Module
    adapter: Adapter

    @property
    def name(self) -> str:
        """The first of its places."""
        return self.names[0]

    @property
    def core(self) -> nn.Module:
        """The module that is replaced."""
        return self.module.get_submodule(self.adapter.place)

    def refusals(self) -> list[str]:
        """Why this module cannot be converted as it stands."""
        if any(p.is_meta for p in self.module.parameters()):
            return ["its weights are on the meta device: load them first (for weights that accelerate keeps on disk or "
                    "in another memory, load the whole model)"]  # fmt: skip
        # Weights of such classes are not plain numbers that could be multiplied and written back.
        if any(type(p) is not nn.Parameter for p in self.module.parameters()):
            return ["its parameters are of a special class (quantised or distributed): convert before that"]
        if "forward" in vars(self.core):
            return ["its forward method was replaced, as accelerate's hooks do: take them off first"]
        return self.adapter.refusals(self.module)


def find_sites(model: nn.Module) -> tuple[list[Site], list[tuple[str, str]]]:
    """The attention modules that an adapter recognises, and (name, reason) of what looks like one and is not."""
    # Adapters register when their module is imported, which this makes sure of.
    hosts.load()
    sites: dict[int, Site] = {}
    unknown: dict[str, str] = {}
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        # What lies inside a recognised module belongs to it: BERT's inner attention would be reported as unknown.
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if id(module) in sites:
            sites[id(module)].names.append(name)
            inside.append(f"{name}.")
        elif (found := adapter_for(module)) is not None:
            sites[id(module)] = Site([name], module, found)
            inside.append(f"{name}." if name else "")
        elif _looks_like_attention(module):
            unknown[name] = f"no adapter knows the attention of a {type(module).__module__}.{type(module).__name__}"
    names = [n for site in sites.values() for n in site.names]
    # A container called attention whose inside is recognised is not reported.
    left = [(n, why) for n, why in unknown.items() if not any(m.startswith(f"{n}.") for m in names)]
    return list(sites.values()), left


def _looks_like_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() and any(True for _ in module.parameters())


def chosen(sites: list[Site], layers: object) -> list[Site]:
    """The sites that ``layers`` names: None for all, a pattern or number, or several of them.

    Raises:
        TypeError, ValueError: something else, or a pattern or number that fits no site.
    """
    if layers is None:
        return sites
    wanted = [layers] if isinstance(layers, str | int) else layers
    if not isinstance(wanted, Iterable):
        raise TypeError(f"layers must be None, a name, a number, or a list of them; received {describe(layers)}.")
    kept: dict[int, Site] = {}
    for one in wanted:
        found = list(_fitting(sites, one))
        if not found:
            names = choices(site.name for site in sites)
            raise ValueError(f"layers={one!r} fits no attention layer of the model. There are {len(sites)}: {names}.")
        kept |= {id(site): site for site in found}
    return [site for site in sites if id(site) in kept]


def _fitting(sites: list[Site], one: object) -> Iterator[Site]:
    if isinstance(one, bool) or not isinstance(one, str | int):
        raise TypeError(f"layers must hold names, patterns such as 'encoder.*' and numbers, received {describe(one)}.")
    if isinstance(one, int):
        # Negative numbers are refused: counting from the end is not promised.
        yield from sites[one : one + 1] if 0 <= one < len(sites) else ()
    else:
        yield from (site for site in sites if any(fnmatchcase(name, one) for name in site.names))


@dataclass(slots=True)
class Replacements:
    """Modules that were put in the place of others, in order, so that all of it can be taken back."""

    model: nn.Module
    done: list[tuple[str, nn.Module]] = field(default_factory=list)

    def put(self, name: str, new: nn.Module) -> None:
        """Make ``new`` the module called ``name``."""
        self.done.append((name, self.model.get_submodule(name)))
        put(self.model, name, new)

    def take_back(self) -> None:
        """Undo everything, the last first."""
        while self.done:
            put(self.model, *self.done.pop())


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Make ``new`` the module called ``name`` of ``model``."""
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = new


def joined(*names: str) -> str:
    """Names of modules, one inside the other."""
    return ".".join(name for name in names if name)


def check_model(model: object) -> nn.Module:
    """``model``, if its modules can be replaced.

    Raises:
        TypeError: it is no module, or one that has been compiled, scripted or wrapped for several processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, received {describe(model)}.")
    # All of these keep lists of the parameters, or programs made from them, that a replacement would leave behind.
    wrapped = (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrapped) or is_compiled(model):
        raise TypeError(
            f"model is a {type(model).__name__}, which has taken note of the parameters that it had. Convert the model "
            "inside first, then compile or wrap it."
        )
    return model
