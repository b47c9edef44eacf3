"""Layers whose keys and values have fewer heads than their queries, and the ordinary layers that compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import better_attention as ba
from helpers.layers import tokens

MECHANISMS = ("standard", "optimised", "expressive", "optimised+expressive")
"""Those of the table that project keys, with both scores; two of them take their values as they come."""
ALIGNED = ("standard+align", "optimised+align", "standard+align+expressive", "optimised+align+expressive")

B, L, S, N, H = 2, 5, 7, 6, 4
D = N * H
MAX_LEN = 8

EVERY: dict[str, dict[str, Any]] = {
    **{name: {"mechanism": name} for name in MECHANISMS},
    **{f"{name} full": {"mechanism": name, "max_len": MAX_LEN} for name in ALIGNED[:2]},
    **{f"{name} causal": {"mechanism": name, "max_len": MAX_LEN, "align_causal": True} for name in ALIGNED[1:3]},
    "W_A per head": {"mechanism": "standard+align", "max_len": MAX_LEN, "align_heads": "per_head"},
    "W_A per head of slices": {
        "mechanism": "optimised+align+expressive", "max_len": MAX_LEN, "align_heads": "per_head", "align_causal": True,
    },
    "keys alone": {"mechanism": ba.Mechanism(frozenset("k"))},
    "keys and values alone": {"mechanism": ba.Mechanism(frozenset("kv"), score="expressive")},
}  # fmt: skip
"""Every way to have projected keys, with values projected or not, aligned or not, and both scores."""


def has_full_kernel(options: dict[str, Any]) -> bool:
    """Whether the layer has a full W_A, which no causal mask goes with."""
    aligned = ba.Mechanism.of(options["mechanism"]).aligned
    return aligned and not options.get("align_causal") and "window" not in options


def three(options: dict[str, Any], length: int = L, keys: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """A query, a key and a value of their own."""
    return tokens(B, length, D), tokens(B, keys, options.get("kdim", D)), tokens(B, keys, options.get("vdim", D))


def drawn(embed_dim: int, num_heads: int, groups: int, *, spread: float = 0.4, **options: Any) -> ba.MultiheadAttention:
    """A layer with ``groups`` heads of keys and values; every parameter is random."""
    module = ba.MultiheadAttention(embed_dim, num_heads, num_kv_heads=groups, batch_first=True, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, dtype=torch.float64))
    return module


def place_of_heads(name: str) -> int:
    """The dimension in which the parameter called ``name`` has its heads, one behind the other."""
    return 2 if name.startswith("extra_") else 0


def repeated(x: Tensor, dim: int, heads: int, groups: int) -> Tensor:
    """``groups`` heads along ``dim`` as ``heads``, of which head n is a copy of head n // (heads / groups)."""
    width = x.shape[dim] // groups
    parts = [x.narrow(dim, n // (heads // groups) * width, width) for n in range(heads)]
    return torch.cat(parts, dim)


def summed(x: Tensor, dim: int, heads: int, groups: int) -> Tensor:
    """The gradient of what :func:`repeated` was given, from that of its result."""
    return x.unflatten(dim, (groups, heads // groups, -1)).sum(dim + 1).flatten(dim, dim + 1)


def expanded(module: ba.MultiheadAttention, groups: int, **options: Any) -> ba.MultiheadAttention:
    """The ordinary layer, built with ``options``, in which each query head has a copy of the keys that it shares."""
    heads, dtype = module.num_heads, module.k_proj.weight.dtype
    full = ba.MultiheadAttention(module.embed_dim, heads, batch_first=True, dtype=dtype, **options)
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            given = own.pop(name)
            same = given.shape == parameter.shape
            parameter.copy_(given if same else repeated(given, place_of_heads(name), heads, groups))
    assert not own
    return full.train(module.training)


def gathered(full: nn.Module, name: str, like: Tensor, groups: int) -> Tensor:
    """The gradient of the parameter called ``name``, of which ``full`` has copies."""
    grad = full.get_parameter(name).grad
    assert grad is not None, name
    return grad if grad.shape == like.shape else summed(grad, place_of_heads(name), full.num_heads, groups)
