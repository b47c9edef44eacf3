"""transformers' Llama and its relatives: rotary positions, grouped heads, a cache.

Without W_K and W_V, keys are the turned slices of the input and values the slices as they are. The cache then holds the
slices once, and in the place of the values the angles of their positions, one head's width for all heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from better_attention.adapters.adapter import Adapter, has, register, signature_refusals
from better_attention.adapters.host_attention import (
    HostAttention,
    transformers_mechanism,
    transformers_refusals,
    wants_weights,
)
from better_attention.adapters.host_cache import own_cache
from better_attention.adapters.source import LinearMap, Source
from better_attention.positions import rotate


class LlamaAttention(HostAttention):
    """transformers' ``LlamaAttention`` with another mechanism."""

    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the weights where the host's attention implementation is "eager"."""
        angles_B1LH = _packed(position_embeddings, len(hidden_states))
        update = own_cache(cache, self.layer_idx, kwargs)
        q_BNLH = _turned(self.heads(self.q_proj(hidden_states)), angles_B1LH)
        k_BGSH = self.heads(self.k_proj(hidden_states))
        # The slices are cached before they are turned, because they are the values too; the angles come back with them.
        if self.shares_slices:
            if update is not None:
                k_BGSH, angles_B1LH = update(k_BGSH, angles_B1LH)
            v_BGSH, k_BGSH = k_BGSH, _turned(k_BGSH, angles_B1LH)
        else:
            # Cached after turning, as the host does.
            k_BGSH, v_BGSH = _turned(k_BGSH, angles_B1LH), self.heads(self.v_proj(hidden_states))
            if update is not None:
                k_BGSH, v_BGSH = update(k_BGSH, v_BGSH)
        need_weights = wants_weights(self)
        return self.finish(q_BNLH, k_BGSH, v_BGSH, mask=attention_mask, causal=True, need_weights=need_weights)

    def angles(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, L, H/2) of each position in a call with these arguments."""
        cos_BLP, sin_BLP = _packed(position_embeddings, len(hidden_states))[:, 0].chunk(2, dim=-1)
        return cos_BLP, sin_BLP


def _packed(position_embeddings: tuple[Tensor, Tensor], batch: int) -> Tensor:
    """Cosine and sine of one half of the features, which is all that differs, side by side: (B, 1, L, H)."""
    cos_BLH, sin_BLH = position_embeddings
    # The host repeats the angles for both halves of the features.
    half = cos_BLH.shape[-1] // 2
    angles_BLH = torch.cat([cos_BLH[..., :half], sin_BLH[..., :half]], dim=-1)
    # Positions may come once for all samples, where the cache wants the batch size of the keys.
    return angles_BLH[:, None].expand(batch, -1, -1, -1)


def _turned(x_BNLH: Tensor, angles_B1LH: Tensor) -> Tensor:
    cos_B1LP, sin_B1LP = angles_B1LH.chunk(2, dim=-1)
    return rotate(x_BNLH, cos_B1LP, sin_B1LP)


def _matches(module: nn.Module) -> bool:
    return has(module, "q_proj", "k_proj", "v_proj", "o_proj", "num_key_value_groups", "layer_idx", "scaling", "config")


def _refusals(module: nn.Module) -> list[str]:
    reasons = transformers_refusals(module, "q_proj", "k_proj", "v_proj", "o_proj")
    reasons += signature_refusals(module, "hidden_states", "position_embeddings", "attention_mask", "cache")
    # Qwen3's attention, for example, has the same maps, and norms behind them.
    reasons += [f"it normalises queries or keys ({name})" for name in ("q_norm", "k_norm") if has(module, name)]
    return reasons


def _read(module: nn.Module) -> Source:
    host: Any = module
    heads = host.q_proj.out_features // host.head_dim
    return Source(
        transformers_mechanism(host),
        host.q_proj.in_features,
        heads,
        heads // host.num_key_value_groups,
        host.head_dim,
        host.scaling,
        host.attention_dropout,
        causal=True,
        rotary=True,
        q=LinearMap.of(host.q_proj),
        k=LinearMap.of(host.k_proj),
        v=LinearMap.of(host.v_proj),
        o=LinearMap.of(host.o_proj),
    )


LLAMA = register(Adapter("llama", "transformers", _matches, _read, LlamaAttention.take_over, _refusals))
