"""transformers' DistilBERT."""

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


class DistilBertAttention(HostAttention):
    """transformers' ``DistilBertSelfAttention`` with another mechanism."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the weights where the host's attention implementation is "eager"."""
        return self.attend(hidden_states, mask=attention_mask, need_weights=wants_weights(self))


def _matches(module: nn.Module) -> bool:
    # The arguments too, because a relative with the same maps may be called differently.
    return has(module, "q_lin", "k_lin", "v_lin", "out_lin", "n_heads", "scaling", "config") and takes(
        module, "hidden_states", "attention_mask"
    )


def _refusals(module: nn.Module) -> list[str]:
    return transformers_refusals(module, "q_lin", "k_lin", "v_lin", "out_lin")


def _read(module: nn.Module) -> Source:
    host: Any = module
    return Source(
        transformers_mechanism(host),
        host.dim,
        host.n_heads,
        host.n_heads,
        host.attention_head_size,
        host.scaling,
        host.dropout.p,
        q=LinearMap.of(host.q_lin),
        k=LinearMap.of(host.k_lin),
        v=LinearMap.of(host.v_lin),
        o=LinearMap.of(host.out_lin),
    )


DISTILBERT = register(Adapter("distilbert", "transformers", _matches, _read, DistilBertAttention.take_over, _refusals))
