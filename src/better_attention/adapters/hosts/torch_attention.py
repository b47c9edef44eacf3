"""torch.nn.MultiheadAttention wherever it is used, in nn.Transformer and its parts too; and our own layer."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from better_attention.adapters.adapter import Adapter, linear_refusals, register
from better_attention.adapters.source import MAPS, LinearMap, Source, alignment, as_parameter, kernel_of
from better_attention.layer.imitation.state_dict import repeat_heads
from better_attention.layer.multihead import MultiheadAttention
from better_attention.mechanism import MECHANISMS


def _read_torch(module: nn.Module) -> Source:
    layer = cast(nn.MultiheadAttention, module)
    D = layer.embed_dim
    packed = cast("Tensor | None", layer.in_proj_weight)
    separate = cast("tuple[Tensor, ...]", (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight))
    # torch keeps one packed matrix, or three where kdim or vdim differ from embed_dim.
    weights = separate if packed is None else packed.chunk(3)
    trains = (weights[0] if packed is None else packed).requires_grad
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    q, k, v = (LinearMap(w, b, trains) for w, b in zip(weights, biases, strict=True))
    return Source(
        MECHANISMS["standard"],
        D,
        layer.num_heads,
        layer.num_heads,
        layer.head_dim,
        1.0 / math.sqrt(layer.head_dim),
        layer.dropout,
        q=q,
        k=k,
        v=v,
        o=LinearMap.of(layer.out_proj),
        obstacles=_extra_positions(layer.bias_k is not None, layer.add_zero_attn),
    )


def _read_ours(module: nn.Module) -> Source:
    layer = cast(MultiheadAttention, module)
    maps = {letter: LinearMap.of(getattr(layer, MAPS[letter])) for letter in layer.mechanism.projections}
    obstacles = _extra_positions(layer.extra_k is not None, layer.add_zero_attn)
    if layer.scaling is not None:
        obstacles += ("the scale of its scores is learned",)
    fixed = layer.scale if isinstance(layer.scale, float) else 1.0 / math.sqrt(layer.head_dim)
    return Source(
        layer.mechanism,
        layer.embed_dim,
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        fixed,
        layer.dropout,
        rotary=layer.rotary is not None,
        align=kernel_of(layer.align),
        obstacles=obstacles,
        **maps,  # type: ignore[arg-type]
    )


def _extra_positions(learned: bool, zero: bool) -> tuple[str, ...]:
    names = ["add_bias_kv"] * learned + ["add_zero_attn"] * zero
    return tuple(f"{name} adds a key and a value that no projection makes" for name in names)


def _build(old: nn.Module, target: Source) -> nn.Module:
    """Our layer with the weights of ``target`` and the settings of ``old``, torch's layer or ours."""
    # Ours has all attributes of torch's layer, so that one reading serves both.
    host = cast(MultiheadAttention, old)
    ours = isinstance(old, MultiheadAttention)
    kernel = target.align
    options = {} if kernel is None else {"max_len": kernel.max_len, "align_causal": kernel.causal}
    new = MultiheadAttention(
        target.width,
        target.num_heads,
        host.dropout,
        add_bias_kv=host.bias_k is not None,
        add_zero_attn=host.add_zero_attn,
        kdim=host.kdim,
        vdim=host.vdim,
        batch_first=host.batch_first,
        device="meta",  # nothing is drawn and nothing allocated: every parameter is replaced below
        dtype=target.sample.dtype,
        mechanism=target.mechanism,
        scale=host.scale if ours else None,
        rotary=host.rotary if ours else None,
        alibi=host.alibi if ours else None,
        # Where neither keys nor values are projected, every head reads a slice of its own.
        num_kv_heads=target.kv_heads if target.mechanism.projections & {"k", "v"} else None,
        impl=host.impl if ours else "auto",
        **options,  # type: ignore[arg-type]
    )
    for letter, found in target.maps():
        found.into(getattr(new, MAPS[letter]))
    if kernel is not None:
        new.align = alignment(kernel, new.value_heads, new.impl in ("auto", "native"))
    _take_extra_parameters(new, host)
    return new.train(old.training)


def _take_extra_parameters(new: MultiheadAttention, host: MultiheadAttention) -> None:
    """The learned extra position, and a learned scale, are the old layer's."""
    for part, weight in ((new.extra_k, host.bias_k), (new.extra_v, host.bias_v)):
        if part is not None:
            # The Parameter itself, so that an optimiser that holds it keeps training it.
            part.weight = _of_width(cast(nn.Parameter, weight), part.weight.shape[-1], new.head_dim)
    if new.scaling is not None:
        new.scaling = host.scaling


def _of_width(weight: nn.Parameter, width: int, head_dim: int) -> nn.Parameter:
    """An extra position of that width: itself, or its heads repeated where they were shared and no longer are."""
    if weight.shape[-1] == width:
        return weight
    return as_parameter(repeat_heads(weight.detach(), head_dim, width // weight.shape[-1], 2), weight.requires_grad)


def _is_torchs(module: nn.Module) -> bool:
    # Exactly this class, because a subclass may compute something else.
    return type(module) is nn.MultiheadAttention


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, MultiheadAttention)


def _torch_refusals(module: nn.Module) -> list[str]:
    layer = cast(nn.MultiheadAttention, module)
    given = (layer.in_proj_weight, layer.q_proj_weight)
    weight = next(w for w in given if w is not None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return [f"its weights are {getattr(weight, 'dtype', type(weight).__name__)}, not floating point"]
    # NonDynamicallyQuantizableLinear, a subclass, is what torch itself puts there.
    expected = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    if type(layer.out_proj) not in (expected, nn.Linear):
        return [f"out_proj is a {type(layer.out_proj).__name__}: merge or remove what wraps it"]
    return []


def _our_refusals(module: nn.Module) -> list[str]:
    layer = cast(MultiheadAttention, module)
    if layer.window is not None:
        return [
            f"it has a window of {layer.window} tokens, in which a mechanism is another function than over all tokens"
        ]
    return linear_refusals(layer, *(MAPS[letter] for letter in sorted(layer.mechanism.projections)))


TORCH = register(Adapter("torch", "torch", _is_torchs, _read_torch, _build, _torch_refusals))
OURS = register(Adapter("better-attention", "better-attention", _is_ours, _read_ours, _build, _our_refusals))
