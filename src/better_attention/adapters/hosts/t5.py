"""transformers' T5: an additive bias of relative positions, no scale, no biases, self- and cross-attention, a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from better_attention.adapters.adapter import Adapter, has, register, signature_refusals
from better_attention.adapters.host_attention import (
    HostAttention,
    transformers_mechanism,
    transformers_refusals,
    wants_weights,
)
from better_attention.adapters.host_cache import attend_across, own_cache
from better_attention.adapters.source import LinearMap, Source


class T5Attention(HostAttention):
    """transformers' ``T5Attention`` with another mechanism."""

    keeps = ("relative_attention_bias",)
    layer_idx: int | None
    is_causal: bool
    has_relative_attention_bias: bool
    compute_bias: Any  # the host's

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, L, D) to (B, L, D), the bias for the layers above, and the weights where the host wants them."""
        need_weights = wants_weights(self)
        # In cross-attention no position bias is added: it passes through to the layers above.
        if key_value_states is not None:
            output, weights = attend_across(
                self,
                hidden_states,
                key_value_states,
                cache=cache,
                layer=self.layer_idx,
                mask=mask,
                need_weights=need_weights,
            )
            return output, position_bias, weights
        # Only the first layer of a stack has the table; the others receive its bias from the model.
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self._bias(hidden_states, cache)
        update = own_cache(cache, self.layer_idx, kwargs)
        output, weights = self.attend(
            hidden_states,
            mask=mask,
            causal=self.is_causal,
            update=update,
            bias=position_bias,
            need_weights=need_weights,
        )
        return output, position_bias, weights

    def _bias(self, hidden_states: Tensor, cache: Any) -> Tensor:
        L = hidden_states.shape[1]
        inner = getattr(cache, "self_attention_cache", cache)
        # The bias depends on distances, so that it has to know how many tokens the cache holds already.
        past = inner.get_seq_length(self.layer_idx) if inner is not None else 0
        keys = past + L
        if inner is not None and (longest := inner.get_max_length()) > 0:
            keys = longest  # a cache of fixed length returns all of it
        bias: Tensor = self.compute_bias(L, keys, device=hidden_states.device, past_seen_tokens=past)
        return bias


def _matches(module: nn.Module) -> bool:
    return has(module, "q", "k", "v", "o", "n_heads", "key_value_proj_dim", "has_relative_attention_bias", "config")


def _refusals(module: nn.Module) -> list[str]:
    reasons = transformers_refusals(module, "q", "k", "v", "o")
    expected = ("hidden_states", "mask", "key_value_states", "position_bias", "cache")
    return reasons + signature_refusals(module, *expected)


def _read(module: nn.Module) -> Source:
    host: Any = module
    return Source(
        transformers_mechanism(host),
        host.q.in_features,
        host.n_heads,
        host.n_heads,
        host.key_value_proj_dim,
        host.scaling,
        host.dropout,
        causal=host.is_causal,
        q=LinearMap.of(host.q),
        k=LinearMap.of(host.k),
        v=LinearMap.of(host.v),
        o=LinearMap.of(host.o),
    )


T5 = register(Adapter("t5", "transformers", _matches, _read, T5Attention.take_over, _refusals))
