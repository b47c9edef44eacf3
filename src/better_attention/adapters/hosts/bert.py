"""transformers' BERT, RoBERTa and their relatives: self-attention with or without a cache, and cross-attention.

The host's output map lies beside the attention module (``output.dense``). The converted module contains it, and the
identity takes its place, so that a converted layer holds all of its maps in every host.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from better_attention.adapters.adapter import Adapter, has, linear_refusals, register
from better_attention.adapters.host_attention import (
    HostAttention,
    transformers_mechanism,
    transformers_refusals,
    wants_weights,
)
from better_attention.adapters.host_cache import attend_across, own_cache
from better_attention.adapters.source import LinearMap, Source


class BertAttention(HostAttention):
    """transformers' ``BertSelfAttention`` or ``BertCrossAttention`` with another mechanism, and its output map."""

    layer_idx: int | None
    is_causal: bool
    is_cross_attention: bool

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the weights where the host's attention implementation is "eager"."""
        weights = wants_weights(self)
        if self.is_cross_attention:
            return attend_across(
                self,
                hidden_states,
                encoder_hidden_states,
                cache=cache,
                layer=self.layer_idx,
                mask=attention_mask,
                need_weights=weights,
            )
        update = own_cache(cache, self.layer_idx, kwargs)
        return self.attend(
            hidden_states, mask=attention_mask, causal=self.is_causal, update=update, need_weights=weights
        )


def _matches(module: nn.Module) -> bool:
    # The outer module, because the output map that is taken over lies beside the attention proper.
    return has(module, "self.query", "self.key", "self.value", "self.scaling", "self.config", "output.dense")


def _refusals(module: nn.Module) -> list[str]:
    inner = module.get_submodule("self")
    reasons = transformers_refusals(inner, "query", "key", "value") + linear_refusals(module, "output.dense")
    if has(inner, "position_embedding_type") and inner.position_embedding_type != "absolute":
        reasons.append(f"its positions are {inner.position_embedding_type!r}")
    return reasons


def _read(module: nn.Module) -> Source:
    host: Any = module.get_submodule("self")
    output: Any = module.get_submodule("output")
    return Source(
        transformers_mechanism(host),
        host.query.in_features,
        host.num_attention_heads,
        host.num_attention_heads,
        host.attention_head_size,
        host.scaling,
        host.dropout.p,
        causal=host.is_causal,
        q=LinearMap.of(host.query),
        k=LinearMap.of(host.key),
        v=LinearMap.of(host.value),
        o=LinearMap.of(output.dense),
    )


def _build(old: nn.Module, target: Source) -> nn.Module:
    new = BertAttention.take_over(old.get_submodule("self"), target)
    # The host keeps this flag on the outer module, which ours cannot see from its place inside.
    new.is_cross_attention = bool(getattr(old, "is_cross_attention", False))
    return new


BERT = register(
    Adapter("bert", "transformers", _matches, _read, _build, _refusals, place="self", taken_over="output.dense")
)
