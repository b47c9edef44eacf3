"""Layers whose keys and values have fewer heads than their queries, divided among processes by heads of keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import parallelize_module

import better_attention as ba
from helpers.tensor_parallel_cases import (
    LOSS,
    PADDING,
    B,
    L,
    close,
    cross,
    equal,
    mesh,
    raises,
    self_attention,
    weights_too,
    whole,
)

WIDTH = 6


def sizes(*, more: int = 1) -> tuple[int, int, int]:
    """Model width, query heads and key heads: two query heads for each of ``more`` key heads of each process."""
    groups = more * dist.get_world_size()
    return 2 * groups * WIDTH, 2 * groups, groups


def mask_per_head(layer: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return self_attention(layer, x, attn_mask=torch.randn(B * layer.num_heads, L, L, generator=generator))


def padded(layer: Any, x: Tensor) -> Tensor:
    return self_attention(layer, x, key_padding_mask=PADDING)


def all_weights(layer: Any, x: Tensor) -> Tensor:
    return weights_too(layer, x) if layer.num_heads == 4 else self_attention(layer, x)


def causal(layer: Any, x: Tensor) -> Tensor:
    return self_attention(layer, x, is_causal=True)


FEATURES: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "standard": ({}, self_attention),
    "standard, padding": ({}, padded),
    "expressive, causal, a learned scale": ({"mechanism": "expressive", "scale": "learned"}, causal),
    "optimised, rotary, a mask per head": ({"mechanism": "optimised", "rotary": True}, mask_per_head),
    "optimised+expressive, no biases": ({"mechanism": "optimised+expressive", "bias": False}, causal),
    "alibi in the score": ({"mechanism": "expressive", "alibi": "score"}, causal),
    "alibi on the weight": ({"mechanism": "optimised", "alibi": "weight"}, causal),
    "added keys": ({"add_bias_kv": True, "add_zero_attn": True}, causal),
    "added keys beside slices": ({"mechanism": "optimised", "add_bias_kv": True}, self_attention),
    "W_A": ({"mechanism": "standard+align", "max_len": L}, self_attention),
    "W_A per head": ({"mechanism": "standard+align", "max_len": L, "align_heads": "per_head"}, self_attention),
    "W_A per head of slices": (
        {"mechanism": "optimised+align", "max_len": L, "align_heads": "per_head", "align_causal": True},
        causal,
    ),
    "W_A of a window per head": (
        {"mechanism": "standard+align+expressive", "window": 3, "align_heads": "per_head"},
        self_attention,
    ),
    "other keys": ({"mechanism": "optimised"}, cross),
    "weights": ({"mechanism": "optimised+expressive"}, all_weights),
    "by the reference": ({"impl": "reference"}, self_attention),
    "no W_O": ({"mechanism": ba.Mechanism(frozenset("qkv"))}, self_attention),
}


def case(name: str) -> Callable[[], None]:
    settings, run_layer = FEATURES[name]

    def check() -> None:
        for more in (1, 2):
            embed_dim, heads, groups = sizes(more=more)
            equal(settings | {"num_kv_heads": groups}, run_layer, size=(embed_dim, heads))

    return check


def caches() -> None:
    """Steps of a divided layer, whose cache holds its own heads alone."""
    world = dist.get_world_size()
    embed_dim, heads, groups = sizes(more=2)
    for options in (
        {"rotary": True},
        {"mechanism": "optimised", "alibi": "weight"},
        {"mechanism": "standard+align", "max_len": L, "align_causal": True, "align_heads": "per_head"},
        {"mechanism": "expressive", "window": 3},
    ):
        torch.manual_seed(1)
        alone = ba.MultiheadAttention(embed_dim, heads, num_kv_heads=groups, batch_first=True, **options).eval()
        shared = parallelize_module(copy.deepcopy(alone), mesh(), ba.parallel_plan(alone))
        x = torch.randn(B, L, embed_dim)
        with torch.no_grad():
            expected = causal(alone, x)
            for dtype in (None, torch.int8):
                held = [ba.KVCache(layer, B, dtype=dtype) for layer in (alone, shared)]
                whole_out, out = (
                    torch.cat([layer(y, y, y, cache=c, need_weights=False)[0] for y in x.split([3, 1, 2, 1], 1)], 1)
                    for layer, c in zip((alone, shared), held, strict=True)
                )
                close(out, whole_out, LOSS if dtype is None else 1e-2, f"{options} {dtype}")
                if dtype is None:
                    close(out, expected, 1e-5, f"{options} at once")
                assert held[1].nbytes * world == held[0].nbytes, (held[1].nbytes, held[0].nbytes)


def state_dicts() -> None:
    """Whole weights load into a divided layer, its own into an ordinary one."""
    embed_dim, heads, groups = sizes()
    options = {"mechanism": "standard+align", "max_len": L, "align_heads": "per_head", "add_bias_kv": True}
    first, second, third = (
        ba.MultiheadAttention(embed_dim, heads, num_kv_heads=groups, batch_first=True, **options) for _ in range(3)
    )
    shared = parallelize_module(second, mesh(), ba.parallel_plan(second))
    assert (shared.num_kv_heads, shared.num_heads) == (groups, heads)
    x = torch.randn(B, L, embed_dim)
    shared.load_state_dict(first.state_dict())
    close(self_attention(shared, x), self_attention(first, x), LOSS, "after loading whole weights")
    third.load_state_dict(shared.state_dict())
    for name, p in first.state_dict().items():
        assert torch.equal(third.state_dict()[name], p), name
        assert torch.equal(whole(shared.state_dict()[name]), p), name


def refusals() -> None:
    """Every process says why, and the layer and its weights are as they were."""
    world = dist.get_world_size()
    for groups in (1, world + 1, max(1, world // 2)):
        for mechanism in ("standard", "optimised"):
            heads = 2 * world * groups
            layer = ba.MultiheadAttention(heads * WIDTH, heads, num_kv_heads=groups, mechanism=mechanism)
            before = copy.deepcopy(layer.state_dict())
            raises("num_kv_heads", lambda m=layer: parallelize_module(m, mesh(), ba.parallel_plan(m)))
            raises(f"{groups}", lambda m=layer: parallelize_module(m, mesh(), ba.parallel_plan(m)))
            for name, p in layer.state_dict().items():
                assert torch.equal(whole(p), before[name]), name
            x = torch.randn(L, B, heads * WIDTH)
            assert self_attention(layer, x).isfinite().all()


CASES: dict[str, Callable[[], None]] = {
    **{name: case(name) for name in FEATURES},
    "caches": caches,
    "state dicts": state_dicts,
    "refusals": refusals,
}
