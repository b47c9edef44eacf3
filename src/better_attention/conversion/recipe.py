"""Converted models on disk: weights as safetensors, and a JSON recipe that says what was converted to what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.adapters.adapter import adapter
from better_attention.adapters.source import MAPS, Kernel, LinearMap, Source
from better_attention.errors import describe
from better_attention.mechanism import Mechanism
from better_attention.text import plural

from .revert import converted, install, original_of, outer_name
from .sites import Replacements, Site, check_model, find_sites, joined

FORMAT = 1
WEIGHTS, RECIPE = "model.safetensors", "recipe.json"


def save_converted(model: nn.Module, folder: str | Path) -> Path:
    """Write a converted model: ``model.safetensors``, and ``recipe.json`` with its digest.

    Args:
        model: a model with layers that :func:`better_attention.convert` replaced. Tied weights are written once.
        folder: created if need be; an earlier model in it is replaced.

    Returns:
        The path of the recipe.

    Raises:
        ValueError: nothing in the model is converted, or its weights are on the meta device.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    check_model(model)
    layers = _layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no converted layer: save it as its own library does.")
    tensors, aliases = _without_duplicates(model.state_dict())
    there = Path(folder)
    there.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a crash while writing leaves the earlier model whole.
    partial = there / f"{WEIGHTS}.partial"
    safetensors.save_file(tensors, partial, metadata={"format": "pt"})
    recipe = {
        "format": FORMAT,
        "versions": _versions(layers),
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "sha256": {WEIGHTS: _digest(partial)},
        "aliases": aliases,
        "layers": layers,
    }
    # The weights take their name before the recipe: in between, the old recipe's digest refuses the new weights.
    partial.replace(there / WEIGHTS)
    unfinished = there / f"{RECIPE}.partial"
    unfinished.write_text(json.dumps(recipe, indent=2) + "\n", "utf-8")
    return unfinished.replace(there / RECIPE)


def load_converted(model: nn.Module, folder: str | Path) -> nn.Module:
    """Convert ``model`` as the recipe in ``folder`` says, and load the weights that lie beside it.

    Args:
        model: a model of the class and size that was converted, not converted itself; its weights do not matter.
        folder: what :func:`save_converted` wrote.

    Returns:
        The same model, changed in place; on any error it is as it was.

    Raises:
        FileNotFoundError: no recipe or weights.
        ValueError: another format, files that were changed since, or a model that the recipe does not fit.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    check_model(model)
    there = Path(folder)
    recipe = _read(there)
    tensors: dict[str, Tensor] = safetensors.load_file(there / WEIGHTS)
    tensors |= {alias: tensors[name] for alias, name in recipe["aliases"].items()}
    # Under each of its names, of which the recipe has recorded one.
    sites = {name: site for site in find_sites(model)[0] for name in site.names}
    work = Replacements(model)
    try:
        for layer in recipe["layers"]:
            _rebuild(work, sites, layer, tensors)
        _load(model, tensors, recipe["model"])
    except BaseException:
        work.take_back()
        raise
    return model


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "converted models are saved with safetensors, which is missing: pip install 'better-attention[convert]'."
        ) from error
    module: ModuleType = safetensors.torch
    return module


def _layers(model: nn.Module) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for name, module in converted(model):
        original = original_of(module)
        found = adapter(original.adapter)
        mechanism: Mechanism = module.mechanism  # type: ignore[assignment]
        row = {
            "name": outer_name(name, original),
            "adapter": found.name,
            "library": found.library,
            "mechanism": {
                # Sorted, because the order of a set of texts differs from process to process.
                "projections": "".join(sorted(mechanism.projections)),
                "aligned": mechanism.aligned,
                "score": mechanism.score,
            },
            "align_causal": bool(getattr(module.align, "causal", False)),
        }
        # A module that is used in several places is one layer of the recipe.
        rows.setdefault(id(module), row)
    return list(rows.values())


def _versions(layers: list[dict[str, Any]]) -> dict[str, str]:
    names = {"better-attention", "torch", *(layer["library"] for layer in layers)}
    found = {}
    for name in sorted(names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the class of an adapter that the user registered
            continue
    return found


def _without_duplicates(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a storage of their own, and which names stand for which others."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, x in state.items():
        if x.is_meta:
            raise ValueError(f"{name} is on the meta device: load the weights before saving them.")
        # safetensors refuses tensors that share memory, so that ties are written once and listed by name.
        place = (x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride())
        # Empty tensors have no address of their own and would look tied.
        if x.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        # safetensors takes contiguous tensors only, and refuses several parts of one storage.
        whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.itemsize
        tensors[name] = x.detach() if whole else x.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    for needed in (path, folder / WEIGHTS):
        if not needed.is_file():
            raise FileNotFoundError(f"{folder} holds no converted model: {needed.name} is missing.")
    recipe = json.loads(path.read_text("utf-8"))
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        came = recipe.get("format") if isinstance(recipe, dict) else describe(recipe)
        raise ValueError(
            f"{path} is a recipe of format {came!r}, this version of better-attention reads format {FORMAT}: "
            "use the version that wrote it, or convert the model again."
        )
    expected, found = recipe["sha256"][WEIGHTS], _digest(folder / WEIGHTS)
    if expected != found:
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that the recipe was written with (sha256 {found[:12]}..., expected "
            f"{expected[:12]}...): it was damaged or exchanged. Copy the folder again."
        )
    return recipe


def _rebuild(
    work: Replacements, sites: Mapping[str, Site], layer: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Put a converted layer with the weights of ``tensors`` where the recipe says."""
    name, site = layer["name"], sites.get(layer["name"])
    if site is None or site.adapter.name != layer["adapter"]:
        found = "no attention" if site is None else f"attention that the adapter {site.adapter.name!r} reads"
        raise ValueError(
            f"the recipe converts {name!r} by the adapter {layer['adapter']!r}, but this model has {found} there: pass "
            "a model of the class and size that was converted, not yet converted itself."
        )
    source = site.adapter.read(site.module)
    target = _target(source, layer, joined(name, site.adapter.place), tensors)
    install(work, site, site.adapter.build(site.module, target), keep_original=False)


def _target(source: Source, layer: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Source:
    row = layer["mechanism"]
    mechanism = Mechanism(frozenset(row["projections"]), row["aligned"], row["score"])
    trains = any(m.trains for _, m in source.maps())

    def tensor(part: str) -> Tensor | None:
        found = tensors.get(f"{prefix}.{part}")
        return None if found is None else found.to(source.sample.device)

    maps: dict[str, Any] = dict.fromkeys(MAPS)
    for letter in mechanism.projections:
        weight = tensor(f"{MAPS[letter]}.weight")
        if weight is None:
            raise ValueError(f"{WEIGHTS} lacks {prefix}.{MAPS[letter]}.weight: the recipe belongs to other weights.")
        maps[letter] = LinearMap(weight, tensor(f"{MAPS[letter]}.bias"), trains)
    kernel = tensor("align.weight")
    align = None if kernel is None else Kernel(kernel, tensor("align.bias"), layer["align_causal"], trains)
    # A conversion may have repeated heads that were shared.
    shared = next((maps[letter].weight for letter in "kv" if maps[letter] is not None), None)
    kv_heads = source.kv_heads if shared is None else len(shared) // source.head_dim
    return replace(source, mechanism=mechanism, kv_heads=kv_heads, align=align, **maps)


def _load(model: nn.Module, tensors: Mapping[str, Tensor], saved: str) -> None:
    """Load all tensors, after making sure that nothing can fail half way."""
    own = model.state_dict()
    faults = [f"{name} is missing there" for name in own if name not in tensors]
    faults += [f"{name} is missing here" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        here, there = own[name], tensors[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            faults.append(f"{name} is {describe(here)} here and {describe(there)} there")
    if faults:
        shown = "; ".join(sorted(faults)[:5])
        raise ValueError(
            f"the saved weights are of a {saved} of another size, kind or dtype than this {type(model).__name__}, "
            f"{plural(len(faults), 'difference')}: {shown}."
        )
    # load_state_dict copies one tensor after another, so that a fault in the middle would leave a mixture.
    model.load_state_dict(tensors)
