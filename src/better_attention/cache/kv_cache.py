"""The memory of one attention layer while a sequence is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from better_attention.errors import check_int, describe
from better_attention.tensors import floating_dtype

from .given import checked_length, named
from .int8 import Int8Rows
from .rows import Rows, ordinary
from .streams import SHOWN


class CachedLayer(Protocol):
    """What a cache has to know of its layer."""

    window: int | None
    head_dim: int
    cache_identity: set[None]

    @property
    def cache_streams(self) -> tuple[str, ...]:
        """The names of the tensors to remember."""

    @property
    def cache_heads(self) -> tuple[int, ...]:
        """How many heads each of them has, of those that this process computes."""


class KVCache:
    """Keys and values of the tokens that a layer has seen: ``layer(x, x, x, cache=cache)`` attends to them too.

    It holds as few tensors (B, S, width) as the mechanism allows: one where key and value are both the layer's input
    (efficient), the projected key and the input (optimised), the input and its aligned values (super), key and value
    (standard). Each is as wide as its heads together: with ``num_kv_heads`` projected keys and values are narrower than
    the model, by as much as they have fewer heads. Projected keys of a rotary layer are stored rotated; an input that
    serves as key is stored as it is and rotated when it is read. A layer with a window remembers that many tokens and
    forgets older ones.

    Args:
        layer: the :class:`better_attention.MultiheadAttention` whose tokens it holds; no other layer takes it.
        batch_size: number of sequences.
        max_len: most tokens; the memory is allocated at once. None: it grows, by doubling.
        dtype: of the tensors; None: that of the first keys. ``torch.int8`` stores one byte a number and a scale for
            each token and head. Numbers then err by up to 1/254 of their head's largest; on processors with AVX-512
            VNNI a step rounds queries and weights to 16 bits besides, which adds a hundredth of that.
        device: where they are; None: where the first keys are.
        rewind_room: with a window, how many tokens more to keep, so that :meth:`rewind` can go back as far.

    Attributes:
        length: number of tokens seen, padding included; the position of the next one.

    Raises:
        TypeError: no layer that can be cached.
        ValueError: a number out of range.

    >>> import torch, better_attention as ba
    >>> layer = ba.MultiheadAttention(32, 4, batch_first=True, mechanism="efficient").eval()
    >>> cache = ba.KVCache(layer, batch_size=2, max_len=64)
    >>> with torch.no_grad():
    ...     for x in torch.randn(2, 7, 32).split([5, 1, 1], dim=1):
    ...         _ = layer(x, x, x, cache=cache, need_weights=False)
    >>> cache.length, cache.nbytes == 2 * 64 * 32 * 4
    (7, True)
    """

    def __init__(
        self,
        layer: CachedLayer,
        batch_size: int,
        *,
        max_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rewind_room: int = 0,
    ) -> None:
        heads = _heads(layer)
        self.batch_size = check_int(batch_size, "batch_size")
        self.max_len = None if max_len is None else check_int(max_len, "max_len")
        self.dtype = dtype if dtype in (None, torch.int8) else floating_dtype(dtype, "dtype")
        self.device = None if device is None else _device(device)
        room = check_int(rewind_room, "rewind_room", at_least=0)
        self.streams, self.window = tuple(heads), layer.window
        self._widths = {name: count * layer.head_dim for name, count in heads.items()}
        self._layer_identity = layer.cache_identity
        self._rows = Rows(self.max_len, self.window, room)
        if dtype == torch.int8:
            self._rows = Int8Rows(self.max_len, self.window, room, heads)
        self.length = 0

    @classmethod
    def of(cls, layer: CachedLayer, tensors: Sequence[Tensor], *, length: int | None = None) -> KVCache:
        """A cache that holds ``tensors``, as :attr:`tensors` gave them: the way to files and through ``torch.export``.

        Codes of int8 and padding come along with the tensors. They are never written to: the first new token copies
        them into new memory, which then grows as with ``max_len=None``. Until then they are read where they
        are: nobody else should write to them, and the cache that they are views of should take no token.

        A program takes tensors and returns tensors; inside, a cache is made of them, used, and taken apart again:

        >>> import torch, better_attention as ba
        >>> class Step(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention = ba.MultiheadAttention(8, 2, batch_first=True)
        ...     def forward(self, x, key, value):
        ...         cache = ba.KVCache.of(self.attention, (key, value))
        ...         output, _ = self.attention(x, x, x, cache=cache, need_weights=False)
        ...         return output, *cache.tensors
        >>> x = torch.randn(1, 1, 8)
        >>> output, key, value = Step().eval().requires_grad_(False)(x, torch.zeros(1, 0, 8), torch.zeros(1, 0, 8))
        >>> key.shape
        torch.Size([1, 1, 8])

        Args:
            layer: the layer.
            tensors: as :attr:`tensors` gives them.
            length: number of tokens seen. It is needed where the layer has a window, of which ``tensors`` hold the last
                tokens alone; without a window it is S. A program that is compiled or exported takes it as an
                argument of its own, a whole number of dynamic size, and does not compare it with S.

        Raises:
            TypeError: no layer that can be cached, no tensors, or a dtype that no cache has.
            ValueError: another number of tensors, or another width, than the layer's; tensors of different batch
                sizes, lengths, dtypes or devices; a length that is missing or does not go with them.
        """
        stored = named(_heads(layer), layer.head_dim, tensors)
        B, S = tensors[0].shape[:2]
        cache = cls(layer, int(B), dtype=torch.int8 if tensors[0].dtype == torch.int8 else None)
        cache._rows.borrow(stored, S)
        cache.length = checked_length(length, S, layer.window)
        return cache

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is remembered, as it is stored; views.

        One (B, S, width) for each stream, in their order. Of an int8 cache these are codes, and behind them comes a
        (B, S, N) for each, the scales of its N heads in float32. Last, where tokens are padding, a (B, S) in bool, True
        for those that are not. Together with :attr:`length` it is all that :meth:`of` needs.
        """
        names = (*self._rows.names(self.streams), SHOWN)
        return tuple(self._rows.used(name) for name in names if name in self._rows.tensors)

    @property
    def kept(self) -> int:
        """Number of tokens that are still remembered: ``length`` without a window."""
        return self._rows.count

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated; 0 before the first token."""
        return self._rows.nbytes

    # --- what a decoder does with it ---------------------------------------------------------------------------------

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens, as if they had never come.

        Args:
            tokens: how many.

        Raises:
            ValueError: more than there are; or, with a window, more than can go while the tokens that
                later ones look at are still there (see ``rewind_room``).
        """
        self.check_rewind(tokens)
        self._rows.drop_last(tokens)
        self.length -= tokens

    def check_rewind(self, tokens: int) -> None:
        """Check whether :meth:`rewind` can take tokens back, without doing it.

        Args:
            tokens: how many.

        Raises:
            ValueError: as :meth:`rewind`.
        """
        most = self.kept if self.window is None else self._rewindable()
        if check_int(tokens, "tokens", at_least=0) > most:
            hint = "" if self.window is None else " Build the cache with rewind_room=... to go back further."
            raise ValueError(f"this cache can take back {most} of its {self.length} tokens, received {tokens}.{hint}")

    def _rewindable(self) -> int:
        """How many tokens can go so that what is left holds the window before the next token, or everything."""
        assert self.window is not None  # noqa: S101 - for the type checker
        return self.kept if self.kept == self.length else max(0, self.kept - (self.window - 1))

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A branch; of the layer's copy where that was made before, as in ``copy.deepcopy((model, cache))``."""
        other = self.branch()
        other._layer_identity = memo.get(id(self._layer_identity), self._layer_identity)
        return other

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a KVCache belongs to its layer and cannot be saved by itself. Save cache.tensors and cache.length, and "
            "make a cache of them again by better_attention.KVCache.of(layer, tensors, length=length). In memory "
            "cache.branch() copies it."
        )

    def branch(self) -> KVCache:
        """A copy with memory of its own, to continue the same beginning in another way.

        Returns:
            The copy; this cache is unchanged.
        """
        other: KVCache = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._rows = self._rows.branch()
        return other

    def reorder(self, index: Tensor) -> None:
        """Sample b becomes what sample ``index[b]`` was, as beams are kept and dropped; the batch size may change.

        Args:
            index: (new batch size,), whole numbers below the batch size.

        Raises:
            TypeError: not a tensor of whole numbers with one dimension.
            ValueError: no number, or one that is not below the batch size.
        """
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index must be a tensor (batch,) of int64 or int32, received {describe(index)}.")
        if len(index) == 0 or bool((index < 0).any()) or bool((index >= self.batch_size).any()):
            samples = "sample 0, the only one" if self.batch_size == 1 else f"samples 0 ... {self.batch_size - 1}"
            raise ValueError(f"index must name {samples} of the batch, received {index.tolist()}.")
        self._rows.select(index)
        self.batch_size = len(index)

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        self._rows.first = self._rows.last = self.length = 0
        self._rows.tensors = {name: x for name, x in self._rows.tensors.items() if name != SHOWN}

    # --- what the layer does with it -------------------------------------------------------------------------------

    def check(self, layer: CachedLayer, new: Tensor) -> None:
        """Whether ``layer`` may append tokens like ``new`` (B, L, D).

        Raises:
            ValueError: a cache of another layer, another batch size, too many tokens.
        """
        # Of two objects a compiler guards that they are one: no number that would be another for each layer.
        if self._layer_identity is not layer.cache_identity:
            raise ValueError(
                "this cache belongs to another layer. Make one for each layer, or better_attention.ModelCache(model, "
                "batch_size) for all of them, and pass cache[layer]."
            )
        B, L = new.shape[:2]
        if self.batch_size != B:
            raise ValueError(
                f"this cache holds {self.batch_size} sequences, received {B} (shape {tuple(new.shape)}). Use "
                "cache.reorder(index) to keep or repeat samples, or make a new cache."
            )
        if self.max_len is not None and self.length + L > self.max_len:
            raise ValueError(
                f"this cache was built for max_len={self.max_len} and holds {self.length} tokens, received {L} more. "
                "Build it with a larger max_len, or with max_len=None, which grows."
            )

    def write(self, name: str, new: Tensor) -> None:
        """``new`` (B, L, D) behind what is remembered; :meth:`commit` makes it last.

        Raises:
            ValueError: another device or width; or a tensor that requires a gradient, which memory does not carry.
            TypeError: another dtype.
        """
        refuse_gradients(new)
        held = self._rows.tensors.get(name)
        dtype = self.dtype if held is None else held.dtype
        device = self.device if held is None else held.device
        if device is not None and new.device != device and new.device != _resolved(device):
            raise ValueError(f"this cache is on {device}, its layer's {name} is on {new.device}. Make a new cache.")
        if torch.int8 not in (dtype, self.dtype) and dtype is not None and new.dtype != dtype:
            lost = f", which begins without the {self.length} tokens of this one" if self.length else ""
            raise TypeError(
                f"this cache is {dtype}, its layer's {name} is {new.dtype}. Make a cache with dtype={new.dtype}{lost}, "
                "or call the layer as it was called before (under autocast, or not)."
            )
        if held is not None and held.shape[2] != new.shape[2]:
            raise ValueError(
                f"this cache's rows are {held.shape[2]} wide, its layer's {name} is {new.shape[2]} wide. Make a new "
                "cache."
            )
        self._rows.write(name, new)

    def read(self, name: str, L: int) -> Tensor:
        """What is remembered and the ``L`` new tokens that were written, (B, S + L, D); a view, but for int8."""
        return self._rows.read(name, L)

    def stored(self, name: str, L: int) -> tuple[Tensor, Tensor | None]:
        """The same as it is stored: the numbers and None, or codes in int8 and scales (B, S + L, N); views."""
        return self._rows.stored(name, L)

    def reserve(self, L: int, dtype: torch.dtype) -> bool:
        """Room behind what is remembered for ``L`` tokens, which the caller writes where :meth:`stored` shows them.

        Returns:
            Whether there are already rows of the layer's widths that stand for numbers of type ``dtype``; else nothing
            was done, and :meth:`write` is the way.
        """
        if not self._rows.holds(self._widths, dtype):
            return False
        self._rows.reserve(L)
        return True

    def held(self, L: int) -> int:
        """Number of tokens that are remembered, and the ``L`` new ones that were written."""
        return self._rows.used(self.streams[0], L).shape[1]

    def show(self, shown_BL: Tensor | None, L: int) -> Tensor | None:
        """Which tokens are no padding, (B, S + L), with ``shown_BL`` for the new ones; None if none ever was."""
        if shown_BL is None and SHOWN not in self._rows.tensors:
            return None
        stored = self._rows.tensors[self.streams[0]]
        if shown_BL is None:
            shown_BL = torch.ones(self.batch_size, L, dtype=torch.bool, device=stored.device)
        if SHOWN not in self._rows.tensors:
            # From now on, for as many rows as the streams have: what came before was no padding.
            with ordinary():
                shown_BS = torch.ones(stored.shape[:2], dtype=torch.bool, device=stored.device)
            self._rows.hold(SHOWN, shown_BS)
        self._rows.write(SHOWN, shown_BL)
        return self._rows.used(SHOWN, L)

    @property
    def is_allocated(self) -> bool:
        """Whether it has memory yet, and with it a dtype and a device."""
        return bool(self._rows.tensors)

    def release(self) -> None:
        """Forget everything, the memory and its dtype too."""
        self.reset()
        self._rows.tensors = {}

    def commit(self, L: int) -> None:
        """The ``L`` tokens that were written are remembered from now on."""
        self._rows.commit(L)
        self.length += L

    def __repr__(self) -> str:
        return (
            f"KVCache({', '.join(self.streams)}: {self.batch_size} sequences, {self.length} tokens"
            f"{'' if self.max_len is None else f' of {self.max_len}'}, {self.nbytes / 2**20:.1f} MiB)"
        )


def _heads(layer: CachedLayer) -> dict[str, int]:
    """What a cache of the layer holds, and how many heads of each.

    Raises:
        TypeError: no layer that can be cached.
    """
    names = getattr(layer, "cache_streams", None)
    if not isinstance(names, tuple):
        raise TypeError(
            f"layer must be a better_attention.MultiheadAttention, received {type(layer).__name__}. For all layers "
            "of a model use better_attention.ModelCache(model, batch_size)."
        )
    return dict(zip(names, layer.cache_heads, strict=True))


def _device(value: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        TypeError, ValueError: nothing that names one.
    """
    try:
        return torch.device(value)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device must be a device such as 'cpu' or 'cuda:0', received {describe(value)}.") from None


def refuse_gradients(*tensors: Tensor) -> None:
    """Refuse tensors that require a gradient where gradients are recorded: memory is written over.

    Raises:
        ValueError: one of them.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "a cache is for inference: it does not carry gradients. Call the layer under torch.no_grad() or "
            "torch.inference_mode()."
        )


def _resolved(device: torch.device) -> torch.device:
    """The device as tensors name it: cpu for cpu:0, and an accelerator's current one where it has no number."""
    return torch.empty(0, device=device).device
