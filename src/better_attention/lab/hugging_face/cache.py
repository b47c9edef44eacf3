"""Our cache with the methods that transformers' generation calls."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from better_attention.cache.model_cache import ModelCache

try:
    from transformers.cache_utils import Cache
except ImportError as error:
    raise ImportError(
        "better_attention.lab.hugging_face needs transformers 5.24 or newer: "
        "pip install 'better-attention[transformers]'."
    ) from error


class GenerationCache(Cache):
    """A :class:`better_attention.ModelCache` that ``generate`` of transformers can hold, reorder, repeat and cut.

    It takes the place of ``DynamicCache``, which holds keys and values of every layer: this one holds as few tensors as
    the mechanism needs, one for efficient attention. It is made when the first tokens arrive, for as many sequences.

    Args:
        rewind_room: under a window, tokens that :meth:`crop` can take back.
    """

    def __init__(self, rewind_room: int = 0) -> None:
        # transformers asks each of its own layers; ours answer through `held`.
        super().__init__(layers=[])
        self.rewind_room = rewind_room
        self.held: ModelCache | None = None

    def of(self, model: nn.Module, batch_size: int) -> ModelCache:
        """The cache of ``model``, made for ``batch_size`` sequences at the first call."""
        if self.held is None:
            self.held = ModelCache(model, batch_size, rewind_room=self.rewind_room)
        return self.held

    def make_room(self, tokens: int) -> None:
        """Let :meth:`crop` take back that many tokens.

        Raises:
            ValueError: under a window, a cache that already holds tokens and keeps fewer.
        """
        if self.held is None:
            self.rewind_room = max(self.rewind_room, tokens)
        elif self.rewind_room < tokens and any(cache.window is not None for cache in self.held):
            raise ValueError(
                f"this cache can take back {self.rewind_room} tokens behind the window, and drafts of {tokens} tokens "
                f"need as many. Begin with GenerationCache(rewind_room={tokens}), or without a cache."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that have been seen, padding included."""
        return 0 if self.held is None else self.held.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys and position of the first one, for ``query_length`` new tokens."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence ``beam_idx[b]`` was, as beams are kept and dropped."""
        if self.held is not None:
            self.held.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times, side by side."""
        if self.held is not None:
            device = next(iter(self.held)).tensors[0].device
            self.held.reorder(torch.arange(self.held.batch_size, device=device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers passes their number as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is a negative number, as in transformers; received {tokens_to_remove}.")
        if self.held is not None and tokens_to_remove:
            self.held.rewind(-tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        if self.held is not None:
            self.held.reset()

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first token."""
        return -1 if self.held is None else self.held.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether it has seen a token."""
        return self.held is not None

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, whether it remembers a state instead of tokens: none does."""
        # Where every layer is linear, transformers believes the cache to have no length; of no layers, every one is.
        return [False] * max(1, 0 if self.held is None else len(self.held))

    @property
    def is_compileable(self) -> bool:
        """False: its tensors grow."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can take back the last token, whatever came before."""
        return self.held is None or self.rewind_room > 0 or all(cache.window is None for cache in self.held)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the layers of the model write into :attr:`held`."""
        raise TypeError("a GenerationCache is for better_attention's own layers; for others use DynamicCache.")

    def __repr__(self) -> str:
        return f"GenerationCache({self.held if self.held is not None else 'empty'})"
