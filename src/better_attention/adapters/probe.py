"""The inside of one converted layer in one call: inputs, keys, weights, mixed values, output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from better_attention.layer.multihead import MultiheadAttention
from better_attention.positions import BASE, rotary_angles

from .host_attention import HostAttention, Score


@dataclass(frozen=True, slots=True)
class CoreCall:
    """The arguments of one call of an attention module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Probe:
    """The inside of one call, in batch-first layout.

    Args:
        query_BLD: what W_Q receives.
        key_BSK: what W_K returns, heads side by side; the key input itself without W_K.
        weights_BNLS: the weights; None if they were not asked for.
        value_BSV: what W_A receives, heads side by side, padding set to zero; the values where there is no W_A.
        mixed_BLM: the mixed values, heads side by side: what W_O receives.
        output_BLD: what W_O returns.
    """

    query_BLD: Tensor
    key_BSK: Tensor
    weights_BNLS: Tensor | None
    value_BSV: Tensor
    mixed_BLM: Tensor
    output_BLD: Tensor


def tokens(weights_BNLS: Tensor) -> Tensor:
    """Which queries are tokens, (B, L): in self-attention those that any query sees as a key, otherwise all."""
    B, _, L, S = weights_BNLS.shape
    if L != S:
        return torch.ones(B, L, dtype=torch.bool, device=weights_BNLS.device)
    return weights_BNLS.sum(dim=(1, 2)) > 0


def probe(core: nn.Module, call: CoreCall, *, need_weights: bool) -> Probe:
    """Run one of our layers, and note what happens inside."""
    seen: dict[str, Tensor] = {}
    with _watched(core, seen, need_weights):
        if isinstance(core, MultiheadAttention):
            bound = inspect.signature(core.forward).bind(*call.args, **call.kwargs)
            bound.arguments |= {"need_weights": need_weights, "average_attn_weights": False}
            weights = cast("Tensor | None", core(*bound.args, **bound.kwargs)[1])
            if weights is not None:
                seen["weights"] = weights if weights.dim() == 4 else weights[None]
        else:
            core(*call.args, **call.kwargs)
    batch_first = core.batch_first if isinstance(core, MultiheadAttention) else True
    joined = (_batch_first(seen[name], batch_first) for name in ("mixed", "output"))
    # Where keys and values are the same slices, a host's layer takes them once.
    value = seen.get("aligned", seen.get("value", seen["key"]))
    return Probe(seen["query"], seen["key"], seen.get("weights"), value, *joined)


def angles(core: nn.Module, call: CoreCall) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, S, H/2) of the positions in a call of a layer that turns queries and keys."""
    if isinstance(core, MultiheadAttention):
        bound = inspect.signature(core.forward).bind(*call.args, **call.kwargs)
        x = _batch_first(bound.arguments["key"], core.batch_first)
        base = core.rotary if core.rotary is not None else BASE
        cos_SP, sin_SP = rotary_angles(torch.arange(x.shape[1], device=x.device), core.head_dim, base=base)
        return cos_SP.expand(len(x), -1, -1), sin_SP.expand(len(x), -1, -1)
    found: tuple[Tensor, Tensor] = core.angles(*call.args, **call.kwargs)  # type: ignore[operator]
    return found


def _batch_first(x: Tensor, already: bool) -> Tensor:
    if x.dim() == 2:
        return x[None]
    return x if already else x.transpose(0, 1)


@contextmanager
def _watched(core: nn.Module, seen: dict[str, Tensor], need_weights: bool) -> Iterator[None]:
    """Hooks on the parts of ``core`` that write down what they see."""

    def enters(name: str) -> Any:
        return lambda module, args: seen.__setitem__(name, args[0].detach())

    def leaves(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output.detach())

    def weights(module: Score, args: Any, output: Any) -> None:
        q_BNLH, k_BGSH, v_BGSH, mask, causal, _ = args
        found = module.forward(q_BNLH, k_BGSH, v_BGSH, mask, causal, need_weights=True)[1]
        assert found is not None  # noqa: S101 - for the type checker
        seen["weights"] = found.detach()

    parts = {name: core.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", "align", "out_proj")}
    handles = [
        parts["q_proj"].register_forward_pre_hook(enters("query")),
        parts["k_proj"].register_forward_hook(leaves("key")),
        parts["v_proj"].register_forward_hook(leaves("value")),
        parts["align"].register_forward_pre_hook(enters("aligned")),
        parts["out_proj"].register_forward_pre_hook(enters("mixed")),
        parts["out_proj"].register_forward_hook(leaves("output")),
    ]
    if isinstance(core, HostAttention) and need_weights:
        handles.append(core.score.register_forward_hook(weights))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
