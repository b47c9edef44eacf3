"""Between our parameter names (q_proj.weight ...) and those of torch.nn.MultiheadAttention, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from better_attention.mechanism import MECHANISMS, Mechanism

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


class _Explained(str):
    """A key that says, in torch's error about unexpected keys, why it is one.

    Whether a load is strict is known to the outermost ``load_state_dict`` alone, which formats the keys it was handed.
    """

    why: str

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)}: {self.why}"


def explain_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let the first key that the layer's mechanism has no place for say so, and what to do.

    Args:
        module: the layer.
        state_dict: under our names; that one key is replaced by an equal one.
        prefix: of the layer's names.
    """
    mechanism: Mechanism = module.mechanism  # type: ignore[assignment]
    has = mechanism.projections | (frozenset("a") if mechanism.aligned else frozenset())
    named = {part: [n for n in state_dict if n.startswith(f"{prefix}{name}.")] for part, name in _MODULES.items()}
    came = frozenset(part for part, names in named.items() if names)
    if came <= has:
        return
    theirs = Mechanism(came - {"a"}, aligned="a" in came)
    alike = [n for n, m in MECHANISMS.items() if (m.projections, m.aligned) == (theirs.projections, theirs.aligned)]
    key = _Explained(next(name for part, names in named.items() if part not in has for name in names))
    key.why = (
        f"mechanism {mechanism.name!r} has {_listed(has)}, these weights have {_listed(came)}: build the layer with "
        f"their mechanism, {' or '.join(map(repr, alike or [theirs.name]))}; or load what fits with strict=False, "
        "which leaves the others out and makes it another function than the one that was trained"
    )
    state_dict[key] = state_dict.pop(key)


def other_size(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """What to do about a W_A of another size: one sentence, or none."""
    kernel = state_dict.get(f"{prefix}align.weight")
    expected = getattr(module.align, "weight", None)
    if kernel is None or expected is None or kernel.shape == expected.shape or kernel.dim() not in (2, 3):
        return []
    return [
        f"{prefix}align.weight in these weights is of a layer with max_len={kernel.shape[-1]} and "
        f"align_heads={'shared' if kernel.dim() == 2 else 'per_head'!r}: build this layer with the same."
    ]


_MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj", "a": "align"}


def _listed(parts: frozenset[str]) -> str:
    return ", ".join(f"W_{p.upper()}" for p in _MODULES if p in parts) or "no weights"


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
