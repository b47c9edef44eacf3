"""The caches of transformers, recognised by their attributes: for itself, and for an encoder's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .host_attention import HostAttention, Update


def own_cache(cache: Any, layer: int | None, kwargs: Any) -> Update | None:
    """How self-attention appends to ``cache``; None without one."""
    if cache is None:
        return None
    inner = getattr(cache, "self_attention_cache", cache)

    def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = inner.update(key, value, layer, kwargs=kwargs)
        return keys, values

    return update


def attend_across(
    module: HostAttention,
    x_BLD: Tensor,
    y_BSD: Tensor | None,
    *,
    cache: Any,
    layer: int | None,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention to an encoder's output, whose keys and values are computed once and then read from the cache."""
    if cache is None:
        return module.attend(x_BLD, y_BSD, mask=mask, need_weights=need_weights)
    across = cache.cross_attention_cache
    if cache.is_updated.get(layer):
        kept = across.layers[layer]
        values = kept.keys if module.shares_slices else kept.values
        query = module.heads(module.q_proj(x_BLD))
        return module.finish(query, kept.keys, values, mask, causal=False, need_weights=need_weights)
    cache.is_updated[layer] = True

    def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = across.update(key, value, layer)
        return keys, values

    return module.attend(x_BLD, y_BSD, mask=mask, update=update, need_weights=need_weights)
