"""transformers' GPT-2: packed maps that are stored transposed, self- and cross-attention, a cache."""

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


class GPT2Attention(HostAttention):
    """transformers' ``GPT2Attention`` with another mechanism."""

    keeps = ("resid_dropout",)
    resid_dropout: nn.Module
    layer_idx: int | None
    is_cross_attention: bool

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the weights where the host's attention implementation is "eager"."""
        need_weights = wants_weights(self)
        if self.is_cross_attention:
            output, weights = attend_across(
                self,
                hidden_states,
                encoder_hidden_states,
                cache=cache,
                layer=self.layer_idx,
                mask=encoder_attention_mask,
                need_weights=need_weights,
            )
        else:
            update = own_cache(cache, self.layer_idx, kwargs)
            output, weights = self.attend(
                hidden_states, mask=attention_mask, causal=True, update=update, need_weights=need_weights
            )
        return self.resid_dropout(output), weights


def _matches(module: nn.Module) -> bool:
    # nf is what a Conv1D calls the number of its outputs.
    return has(module, "c_attn.nf", "c_proj.nf", "split_size", "attn_dropout", "resid_dropout", "scaling", "config")


def _refusals(module: nn.Module) -> list[str]:
    expected = (
        "hidden_states", "cache", "attention_mask", "encoder_hidden_states", "encoder_attention_mask",
        "output_attentions",
    )  # fmt: skip
    reasons = transformers_refusals(module) + signature_refusals(module, *expected)
    for name in ("c_attn", "c_proj"):
        # By the name of the class, because the host's library must not be imported here.
        kind = type(module.get_submodule(name)).__name__
        if kind != "Conv1D":
            reasons.append(f"{name} is a {kind}, not a Conv1D: merge or remove what wraps it")
    return reasons


def _maps(conv: Any, number: int) -> list[LinearMap]:
    """The maps in a ``Conv1D``, whose weight is (inputs, outputs)."""
    trains = conv.weight.requires_grad
    pairs = zip(conv.weight.chunk(number, dim=1), conv.bias.chunk(number), strict=True)
    # Views and no Parameters: the new layer copies them, so that nothing is tied to the packed matrix.
    return [LinearMap(weight.T, bias, trains) for weight, bias in pairs]


def _read(module: nn.Module) -> Source:
    host: Any = module
    cross = host.is_cross_attention
    # In cross-attention c_attn packs keys and values alone, and queries have a map of their own.
    q, k, v = _maps(host.q_attn, 1) + _maps(host.c_attn, 2) if cross else _maps(host.c_attn, 3)
    return Source(
        transformers_mechanism(host),
        host.embed_dim,
        host.num_heads,
        host.num_heads,
        host.head_dim,
        host.scaling,
        host.attn_dropout.p,
        causal=not cross,
        q=q,
        k=k,
        v=v,
        o=_maps(host.c_proj, 1)[0],
    )


GPT2 = register(Adapter("gpt2", "transformers", _matches, _read, GPT2Attention.take_over, _refusals))
