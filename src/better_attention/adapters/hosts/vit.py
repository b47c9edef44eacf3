"""transformers' vision transformers with q_proj, k_proj, v_proj and o_proj: ViT and its relatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from better_attention.adapters.adapter import Adapter, has, register, takes
from better_attention.adapters.host_attention import (
    HostAttention,
    transformers_mechanism,
    transformers_refusals,
    wants_weights,
)
from better_attention.adapters.source import LinearMap, Source


class ViTAttention(HostAttention):
    """transformers' ``ViTAttention`` with another mechanism."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the weights where the host's attention implementation is "eager"."""
        return self.attend(hidden_states, mask=attention_mask, need_weights=wants_weights(self))


def _matches(module: nn.Module) -> bool:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", "scaling", "config")
    # Many modules have maps of these names; only one that is called like this can be imitated.
    return has(module, *names) and takes(module, "hidden_states", "attention_mask")


def _refusals(module: nn.Module) -> list[str]:
    return transformers_refusals(module, "q_proj", "k_proj", "v_proj", "o_proj")


def _read(module: nn.Module) -> Source:
    host: Any = module
    return Source(
        transformers_mechanism(host),
        host.q_proj.in_features,
        host.num_attention_heads,
        host.k_proj.out_features // host.head_dim,
        host.head_dim,
        host.scaling,
        host.attention_dropout,
        q=LinearMap.of(host.q_proj),
        k=LinearMap.of(host.k_proj),
        v=LinearMap.of(host.v_proj),
        o=LinearMap.of(host.o_proj),
    )


VIT = register(Adapter("vit", "transformers", _matches, _read, ViTAttention.take_over, _refusals))
