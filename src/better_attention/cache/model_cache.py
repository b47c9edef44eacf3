"""The caches of all attention layers of a model as one thing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from better_attention.errors import describe

from .kv_cache import KVCache


class ModelCache:
    """One :class:`KVCache` for each :class:`better_attention.MultiheadAttention` in a model: ``cache[layer]``.

    Args:
        model: a module that contains such layers, or is one.
        batch_size: number of sequences.
        max_len: most tokens; the memory is allocated at once. None: it grows, by doubling.
        dtype: of the tensors; None: that of the first keys. ``torch.int8`` stores one byte per number.
        device: where they are; None: where the first keys are.
        rewind_room: with a window, how many more tokens to keep for :meth:`rewind`.

    Raises:
        ValueError: a model without such layers.
        TypeError: no module.

    >>> import torch, better_attention as ba
    >>> model = torch.nn.ModuleList(ba.MultiheadAttention(8, 2, batch_first=True) for _ in range(3))
    >>> cache = ba.ModelCache(model, batch_size=1)
    >>> x = torch.randn(1, 4, 8)
    >>> with torch.no_grad():
    ...     for layer in model:
    ...         x, _ = layer(x, x, x, cache=cache[layer], need_weights=False)
    >>> len(cache), cache.length
    (3, 4)
    """

    _step = -1
    """Number of tokens at which the last step began."""

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        *,
        max_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rewind_room: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, received {describe(model)}.")
        # By identity, because modules are compared so; in the order in which the model holds them.
        self._caches: dict[nn.Module, KVCache] = {
            module: KVCache(
                cast(Any, module), batch_size, max_len=max_len, dtype=dtype, device=device, rewind_room=rewind_room
            )
            for module in model.modules()
            if isinstance(getattr(module, "cache_streams", None), tuple)
        }
        if not self._caches:
            raise ValueError(
                f"{type(model).__name__} contains no better_attention.MultiheadAttention, so there is nothing to cache."
            )

    def __getitem__(self, layer: nn.Module) -> KVCache:
        """The cache of a layer.

        Args:
            layer: an attention layer of the model.

        Raises:
            KeyError: a layer of another model.
            ValueError: the last step came to an end between two layers; see :meth:`settle`.
        """
        try:
            cache = self._caches[layer]
        except KeyError:
            raise KeyError(
                f"this cache was made for a model that does not contain the given {type(layer).__name__}; make it with "
                "better_attention.ModelCache(model, batch_size)."
            ) from None
        if cache.length != self._step:  # a new step, or no step at all: the others of a step are not looked at
            self._check_even(cache)
            self._step = cache.length
        return cache

    def _check_even(self, cache: KVCache) -> None:
        # In a step that goes through all layers, those that are still to come hold the fewest tokens.
        if cache.length > (shortest := self.length):
            raise ValueError(
                f"this layer has seen {cache.length} tokens and another one of the model {shortest}: a step was "
                "interrupted between them. Call cache.settle(), which takes back what it left, or cache.reset(). (To "
                "leave layers out on purpose, make a better_attention.KVCache for each.)"
            )

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self._caches.values())

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return next(iter(self)).batch_size

    @property
    def length(self) -> int:
        """Number of tokens that every layer has seen; the position of the next one."""
        return min(cache.length for cache in self)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, over all layers."""
        return sum(cache.nbytes for cache in self)

    def settle(self) -> int:
        """Take back what a step left that was interrupted between two layers, by Ctrl-C or for want of memory.

        A model that calls this before its first layer continues after such a step as if it had never begun.

        Returns:
            :attr:`length`, which every layer has then.

        Raises:
            ValueError: a layer with a window cannot go back as far; no layer is changed then.

        >>> import torch, better_attention as ba
        >>> model = torch.nn.ModuleList(ba.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        >>> cache, x = ba.ModelCache(model, batch_size=1), torch.randn(1, 4, 8)
        >>> with torch.no_grad():
        ...     _ = model[0](x, x, x, cache=cache[model[0]], need_weights=False)
        >>> [held.length for held in cache], cache.settle(), [held.length for held in cache]
        ([4, 0], 0, [0, 0])
        """
        length = self.length
        longer = [cache for cache in self if cache.length != length]
        for cache in longer:
            cache.check_rewind(cache.length - length)
        for cache in longer:
            cache.rewind(cache.length - length)
        return length

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens in every layer; see :meth:`KVCache.rewind`.

        Args:
            tokens: how many.

        Raises:
            ValueError: a layer cannot take back that many; no layer is changed then.
        """
        for cache in self:
            cache.check_rewind(tokens)  # all of them first, so that an error leaves every layer as it was
        for cache in self:
            cache.rewind(tokens)
        self._step = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCache:
        """A branch; where the model was copied before, in ``copy.deepcopy((model, cache))``, for the copy's layers."""
        other: ModelCache = object.__new__(type(self))
        other._caches = {memo.get(id(x), x): copy.deepcopy(cache, memo) for x, cache in self._caches.items()}
        return other

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a ModelCache belongs to its model and cannot be saved by itself. Save tensors and length of the KVCache "
            "of each layer, and make caches of them again by KVCache.of(layer, tensors, length=length); "
            "in memory cache.branch() copies it."
        )

    def branch(self) -> ModelCache:
        """A copy with memory of its own."""
        other: ModelCache = object.__new__(type(self))
        other._caches = {layer: cache.branch() for layer, cache in self._caches.items()}
        return other

    def reorder(self, index: Tensor) -> None:
        """Sample b becomes what sample ``index[b]`` was, in every layer; see :meth:`KVCache.reorder`.

        Args:
            index: (new batch size,), whole numbers below the batch size.

        Raises:
            TypeError: not a tensor of whole numbers with one dimension.
            ValueError: no number, or one that is not below the batch size.
        """
        for cache in self:
            cache.reorder(index)

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        for cache in self:
            cache.reset()

    def __repr__(self) -> str:
        size = f"{self.batch_size} sequences, {self.length} tokens, {self.nbytes / 2**20:.1f} MiB"
        return f"ModelCache({len(self)} layers: {size})"
