"""Between our parameter names (q_proj.weight ...) and those of torch.nn.MultiheadAttention, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def unpack(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: torch's packed (``in_proj_weight``) and separate (``q_proj_weight`` ...) names become ours.

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


def to_packed(state_dict: Mapping[str, Tensor], *, packed: bool) -> dict[str, Tensor]:
    """Our state dict of a standard layer under torch's names; ``packed`` as torch does for equal widths."""
    ours = dict(state_dict)
    weights = {p: ours.pop(f"{p}_proj.weight") for p in "qkv"}
    biases = [ours.pop(f"{p}_proj.bias") for p in "qkv" if f"{p}_proj.bias" in ours]
    torchs: dict[str, Tensor] = {}
    if packed:
        torchs["in_proj_weight"] = torch.cat([weights[p] for p in "qkv"])
    else:
        torchs.update({f"{p}_proj_weight": w for p, w in weights.items()})
    if biases:
        torchs["in_proj_bias"] = torch.cat(biases)
    return {**torchs, **ours}
