"""transformers' Whisper: the encoder's attention, and the decoder's self- and cross-attention with its cache."""

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


class WhisperAttention(HostAttention):
    """transformers' ``WhisperAttention`` with another mechanism."""

    layer_idx: int | None
    is_causal: bool

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the weights where the host's attention implementation is "eager"."""
        need_weights = wants_weights(self)
        if key_value_states is not None:
            return attend_across(
                self,
                hidden_states,
                key_value_states,
                cache=cache,
                layer=self.layer_idx,
                mask=attention_mask,
                need_weights=need_weights,
            )
        update = own_cache(cache, self.layer_idx, kwargs)
        return self.attend(
            hidden_states, mask=attention_mask, causal=self.is_causal, update=update, need_weights=need_weights
        )


def _matches(module: nn.Module) -> bool:
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "embed_dim", "num_heads", "is_decoder", "scaling", "config")
    return has(module, *names)


def _refusals(module: nn.Module) -> list[str]:
    reasons = transformers_refusals(module, "q_proj", "k_proj", "v_proj", "out_proj")
    expected = ("hidden_states", "key_value_states", "cache", "attention_mask", "output_attentions")
    return reasons + signature_refusals(module, *expected)


def _read(module: nn.Module) -> Source:
    host: Any = module
    return Source(
        transformers_mechanism(host),
        host.embed_dim,
        host.num_heads,
        host.num_heads,
        host.head_dim,
        host.scaling,
        host.dropout,
        causal=host.is_causal,
        q=LinearMap.of(host.q_proj),
        k=LinearMap.of(host.k_proj),
        v=LinearMap.of(host.v_proj),
        o=LinearMap.of(host.out_proj),
    )


WHISPER = register(Adapter("whisper", "transformers", _matches, _read, WhisperAttention.take_over, _refusals))
