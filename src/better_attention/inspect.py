"""Attention weights and alignment kernels of a model, read without changing what it computes."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from better_attention.layer.alignment import Alignment
from better_attention.layer.multihead import MultiheadAttention


def attention_maps(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The weights of every attention layer that ``model(*inputs, **kwargs)`` calls.

    The model runs once, in eval mode and without gradients; each layer computes its weights from the very arguments
    it received. Training flags, hooks, parameters and the state of the random generators are left as they were.

    Args:
        model: any module holding :class:`better_attention.MultiheadAttention` layers.
        inputs: what the model takes, a batch of B inputs.
        kwargs: likewise.

    Returns:
        Name of the layer -> weights on the CPU, (B, heads, L, S), before dropout; in the order of the calls. A layer
        called again gets ``"#2"``, ``"#3"``, ... behind its name. Unbatched input gives (heads, L, S).

    >>> from better_attention import MultiheadAttention
    >>> layer = MultiheadAttention(6, 3, mechanism="efficient")
    >>> x = torch.zeros(5, 1, 6)
    >>> {name: tuple(weights.shape) for name, weights in attention_maps(layer, x, x, x).items()}
    {'': (1, 3, 5, 5)}
    """
    collected: dict[str, Tensor] = {}

    def collect(name: str, layer: MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Now, not after the run: the model may change the layer's input in place (a residual sum, say).
        # forward, not a call: other people's hooks on the layer are not to fire twice.
        call = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        _, weights = layer.forward(**{**call, "need_weights": True, "average_attn_weights": False})
        times = 1 + sum(key == name or key.startswith(f"{name}#") for key in collected)
        collected[name if times == 1 else f"{name}#{times}"] = cast(Tensor, weights).detach().cpu()

    training = {module: module.training for module in model.modules()}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: collect(name, layer, args, kwargs), with_kwargs=True
        )
        for name, layer in model.named_modules()
        if isinstance(layer, MultiheadAttention)
    ]
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    return collected


def alignment_kernels(model: nn.Module) -> list[tuple[str, Tensor]]:
    """W_A of every layer that has one: (name of the layer, weight (l, l) or (heads, l, l) on the CPU).

    A kernel that is kept causal comes as it acts, lower triangular.

    >>> from better_attention import MultiheadAttention
    >>> layer = MultiheadAttention(6, 3, mechanism="super", max_len=5)
    >>> [(name, tuple(weight.shape)) for name, weight in alignment_kernels(layer)]
    [('', (5, 5))]
    """
    return [
        (name, (kernel.weight.tril() if kernel.causal else kernel.weight).detach().cpu().clone())
        for name, layer in model.named_modules()
        if isinstance(layer, MultiheadAttention) and isinstance(kernel := layer.align, Alignment)
    ]
