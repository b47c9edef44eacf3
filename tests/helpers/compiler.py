"""Counting what torch.compile compiles, and what is exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import CompileContext

import better_attention as ba


class Programs:
    """A backend for ``torch.compile`` that counts the programs it makes.

    torch may start over while it compiles one (after it has found which Python numbers it needs not keep symbolic),
    and then calls the backend twice: what counts is the program, which serves until a guard fails.

    Args:
        backend: the backend that does the work.
    """

    def __init__(self, backend: str) -> None:
        self.backend = lookup_backend(backend)
        self.seen: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.seen.add(str(CompileContext.current_compile_id()))
        return self.backend(graph, inputs)

    @property
    def count(self) -> int:
        """Number of programs."""
        return len(self.seen)


class CachedStep(nn.Module):
    """A step with its cache as plain inputs and outputs."""

    def __init__(self, attention: ba.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, held: list[Tensor], length: int) -> tuple[Tensor, list[Tensor]]:
        cache = ba.KVCache.of(self.attention, held, length=length)
        output, _ = self.attention(x, x, x, cache=cache, need_weights=False)
        return output, list(cache.tensors)
