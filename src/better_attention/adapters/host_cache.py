"""The caches of transformers, recognised by their attributes: for itself, and for an encoder's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .host_attention import HostAttention, Update


def own_cache(cache: Any, layer: int | None, kwargs: Any) -> Update | None:
    """How self-attention appends to ``cache``; None without one."""
    if cache is None:
        return None
    # An encoder-decoder cache holds two caches; any other one is itself that of self-attention.
    inner = getattr(cache, "self_attention_cache", cache)

    def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Caches of fixed length want keys and values of one number of heads; their widths may differ.
        heads = min(key.shape[1], value.shape[1])
        keys, values = inner.update(_joined(key, heads), _joined(value, heads), layer, kwargs=kwargs)
        return _apart(keys, key.shape[1]), _apart(values, value.shape[1])

    return update


def _joined(x_BNSH: Tensor, heads: int) -> Tensor:
    """Neighbouring heads side by side, so that there are ``heads``: (B, heads, S, N / heads * H)."""
    B, N, S, H = x_BNSH.shape
    if heads == N:
        return x_BNSH
    return x_BNSH.view(B, heads, N // heads, S, H).transpose(2, 3).reshape(B, heads, S, N // heads * H)


def _apart(x_BGSW: Tensor, heads: int) -> Tensor:
    """The reverse: (B, heads, S, H)."""
    B, G, S, W = x_BGSW.shape
    if heads == G:
        return x_BGSW
    return x_BGSW.view(B, G, S, heads // G, W * G // heads).transpose(2, 3).reshape(B, heads, S, W * G // heads)


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
    if not hasattr(cache, "cross_attention_cache"):
        return module.attend(x_BLD, y_BSD, mask=mask, need_weights=need_weights)
    across = cache.cross_attention_cache
    # The encoder's output is the same for every generated token, so its keys and values are not computed again.
    if cache.is_updated.get(layer):
        kept = across.layers[layer]
        # HostAttention._cached() stored values of no width, because the keys are the values.
        values = kept.keys if module.shares_slices else kept.values
        query = module.heads(module.q_proj(x_BLD))
        return module.finish(query, kept.keys, values, mask=mask, need_weights=need_weights)
    cache.is_updated[layer] = True

    def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = across.update(key, value, layer)
        return keys, values

    return module.attend(x_BLD, y_BSD, mask=mask, update=update, need_weights=need_weights)
