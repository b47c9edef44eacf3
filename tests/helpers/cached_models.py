"""A model of several attention layers, and what its caches have to give."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import better_attention as ba


class Layers(nn.Module):
    """``x + attention(x)`` for one layer after the other."""

    def __init__(self, layers: Iterable[ba.MultiheadAttention]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, cache: ba.ModelCache | None = None) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        for attention in self.layers:
            held = None if cache is None else cache[attention]
            x = x + attention(x, x, x, is_causal=True, need_weights=False, cache=held)[0]
        return x


def continued(model: Layers, x: Tensor, new: Tensor) -> tuple[ba.ModelCache, ba.ModelCache]:
    """Read ``x`` (3, L, D) in two parts, ``new`` (3, 2, D) taken back between them, and in a branch reordered to 4.

    Returns:
        The cache and the branch, both after all of ``x``, whose outputs were those of one pass.
    """
    cache = ba.ModelCache(model, len(x), rewind_room=4)
    index = torch.tensor([1, 1, 2, 0])
    with torch.no_grad():
        expected = model(x)
        model(x[:, :9], cache)
        other = cache.branch()
        other.reorder(index)
        model(new, cache)
        cache.rewind(2)
        torch.testing.assert_close(model(x[:, 9:], cache), expected[:, 9:], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(model(x[index][:, 9:], other), expected[index][:, 9:], rtol=1e-9, atol=1e-11)
    assert cache.nbytes == sum(held.nbytes for held in cache)
    return cache, other
