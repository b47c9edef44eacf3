"""Operators under vmap: one call with a batch of both dimensions, or one call for each slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .definition import Layout


def vmap_rule(packet: Any, layout: Layout) -> Callable[..., Any]:
    """The operator under vmap: one call with a batch of both dimensions."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        if layout.seed(args) is not None:
            return _one_by_one(info, in_dims, args, packet)
        # The first tensor is q, which always has the whole batch; masks may broadcast over it.
        batch = _batch(args[0], in_dims[0])
        folded = _fold(info, in_dims[: layout.tensors], args[: layout.tensors], batch)
        results = packet(*folded, *args[layout.tensors :])
        if layout.results == 1:
            return results.unflatten(0, (info.batch_size, batch)), 0
        return tuple(x.unflatten(0, (info.batch_size, batch)) for x in results), (0,) * layout.results

    return rule


def backward_vmap_rule(packet: Any, layout: Layout, differentiable: Sequence[str]) -> Callable[..., Any]:
    """The derivative under vmap. A tensor that broadcasts over its batch gets the sum over that batch."""
    tensors = 1 + layout.tensors + layout.saved_results
    inputs = [1 + layout.fields.index(field) for field in differentiable]

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        if layout.seed(args[1:]) is not None:
            return _one_by_one(info, in_dims, args, packet)
        batch = _batch(args[1], in_dims[1])
        folded = _fold(info, in_dims[:tensors], args[:tensors], batch)
        gradients = []
        for index, gradient in zip(inputs, packet(*folded, *args[tensors:]), strict=True):
            if gradient.dim() == 1:  # not wanted
                # A placeholder, but vmap wants its dimension on everything that is returned.
                gradients.append(gradient.expand(info.batch_size, 0))
                continue
            gradient = gradient.unflatten(0, (info.batch_size, batch))
            broadcasts = _batch(args[index], in_dims[index]) != batch
            # _fold() expanded it, and the gradient of an expansion is the sum.
            gradients.append(gradient.sum(1, keepdim=True) if broadcasts else gradient)
        return tuple(gradients), (0,) * len(gradients)

    return rule


def _batch(x: Tensor, in_dim: int | None) -> int:
    """The size of the first dimension below that of vmap."""
    return x.shape[0 if in_dim is None or in_dim > 0 else 1]


def _fold(info: Any, in_dims: Sequence[Any], tensors: Sequence[Any], batch: int) -> list[Tensor | None]:
    """Every tensor with a batch of ``info.batch_size * batch``; what is not vmapped is repeated."""
    folded: list[Tensor | None] = []
    for x, in_dim in zip(tensors, in_dims, strict=True):
        if x is not None:
            x = x.expand(info.batch_size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
            # A mask that broadcasts over the batch is expanded, a view.
            x = x.expand(info.batch_size, batch, *x.shape[2:]).flatten(0, 1)
        folded.append(x)
    return folded


def _one_by_one(info: Any, in_dims: Any, args: Any, packet: Any) -> tuple[Any, Any]:
    """An operator under vmap, called slice by slice."""
    slices = [
        packet(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
    return results, (0,) * len(results)
