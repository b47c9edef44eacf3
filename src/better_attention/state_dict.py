"""Between our parameter names (q_proj.weight ...) and those of torch.nn.MultiheadAttention, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .mechanism import MECHANISMS, Mechanism

_EARLIER = {"bias_k": "extra_k.weight", "bias_v": "extra_v.weight", "log_scale": "scaling.log_scale"}
"""Names of torch and of earlier versions of this library, and where these parameters are now."""


def unpack(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Before loading: torch's packed (``in_proj_weight``) and separate (``q_proj_weight`` ...) names become ours.

    What the module has no place for, W_V for "optimised" say, is left under our name, so that a strict load
    reports it as unexpected rather than dropping it; so are the second of two layouts
    that come together, and a packed matrix of another height.
    """
    for kind in ("weight", "bias"):
        ours = [f"{prefix}{p}_proj.{kind}" for p in "qkv"]
        packed = state_dict.get(f"{prefix}in_proj_{kind}")
        fits = packed is not None and packed.shape[:1] == (3 * int(module.embed_dim),)  # type: ignore[arg-type]
        if packed is not None and fits and not any(name in state_dict for name in ours):
            del state_dict[f"{prefix}in_proj_{kind}"]
            state_dict.update(zip(ours, packed.chunk(3), strict=True))
    for p in "qkv":
        if f"{prefix}{p}_proj_weight" in state_dict and f"{prefix}{p}_proj.weight" not in state_dict:
            state_dict[f"{prefix}{p}_proj.weight"] = state_dict.pop(f"{prefix}{p}_proj_weight")
    for earlier, now in _EARLIER.items():
        has_place = getattr(module, now.split(".")[0]) is not None
        if has_place and f"{prefix}{earlier}" in state_dict and f"{prefix}{now}" not in state_dict:
            state_dict[f"{prefix}{now}"] = state_dict.pop(f"{prefix}{earlier}")


def separate(state_dict: dict[str, Any], prefix: str) -> None:
    """Give entries that are parts of one storage a storage of their own.

    With ``assign=True`` they become the parameters themselves, and parameters that share storage are dropped as
    duplicates, or refused, or written several times over when they are saved.
    """
    sharing: dict[int, list[str]] = {}
    for name, x in state_dict.items():
        if name.startswith(prefix) and type(x) in (Tensor, nn.Parameter) and not x.is_meta:
            sharing.setdefault(x.untyped_storage().data_ptr(), []).append(name)
    for names in sharing.values():
        places = {(state_dict[n].storage_offset(), state_dict[n].shape, state_dict[n].stride()) for n in names}
        if len(places) > 1:  # one place under several names is a tie, and stays one
            state_dict.update({name: state_dict[name].detach().clone() for name in names})


def differences(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *, strict: bool) -> list[str]:
    """What weights of another mechanism or another ``max_len`` lack or bring, and the way out, one sentence each.

    Args:
        module: the layer that loads them.
        state_dict: under our names.
        prefix: of the layer's names.
        strict: whether every part has to be there and to have a place.
    """
    names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    came = frozenset(p for p, part in _MODULES.items() if any(name.startswith(f"{part}.") for name in names))
    own: Mechanism = module.mechanism  # type: ignore[assignment]
    has = own.projections | (frozenset("a") if own.aligned else frozenset())
    messages = []
    if strict and came and came != has:
        row = Mechanism(came - {"a"}, aligned="a" in came)
        alike = [name for name, m in MECHANISMS.items() if (m.projections, m.aligned) == (row.projections, row.aligned)]
        messages.append(
            f"{_called(prefix)}mechanism {own.name!r} has {_listed(has)}, these weights have {_listed(came)}. Build "
            f"the layer with their mechanism ({' or '.join(map(repr, alike or [row.name]))}), or load what fits with "
            "strict=False; the parts that are missing then keep their initial values, those that have no place are "
            "left out, and the layer computes another function than the one the weights were trained for."
        )
    kernel = state_dict.get(f"{prefix}align.weight")
    expected = getattr(module.align, "weight", None)
    if kernel is not None and expected is not None and kernel.shape != expected.shape:
        heads = {2: "shared", 3: "per_head"}
        messages.append(
            f"{_called(prefix)}W_A in these weights is {tuple(kernel.shape)}, this layer's is {tuple(expected.shape)}. "
            f"Build the layer with max_len={kernel.shape[-1]} and align_heads={heads.get(kernel.dim())!r}."
        )
    return messages


_MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj", "a": "align"}


def _listed(parts: frozenset[str]) -> str:
    return ", ".join(f"W_{p.upper()}" for p in _MODULES if p in parts) or "no weights"


def _called(prefix: str) -> str:
    return f"{prefix.removesuffix('.')}: " if prefix else ""


def to_packed(state_dict: Mapping[str, Tensor], *, packed: bool) -> dict[str, Tensor]:
    """Our state dict of a standard layer under torch's names; ``packed`` as torch does for equal widths."""
    ours = dict(state_dict)
    for torchs, name in _EARLIER.items():
        if name in ours:
            ours[torchs] = ours.pop(name)
    weights = {p: ours.pop(f"{p}_proj.weight") for p in "qkv"}
    biases = [ours.pop(f"{p}_proj.bias") for p in "qkv" if f"{p}_proj.bias" in ours]
    renamed: dict[str, Tensor] = {}
    if packed:
        renamed["in_proj_weight"] = torch.cat([weights[p] for p in "qkv"])
    else:
        renamed.update({f"{p}_proj_weight": w for p, w in weights.items()})
    if biases:
        renamed["in_proj_bias"] = torch.cat(biases)
    return {**renamed, **ours}
