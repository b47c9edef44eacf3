"""What a language model refuses to read or to choose from, and the words for it. Shape letters: B batch, L tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from better_attention.cache.model_cache import ModelCache
from better_attention.errors import describe


def check_tokens(tokens_BL: Tensor) -> None:
    """Refuse what is no batch of texts, by shape and type alone, which a traced program knows too.

    Raises:
        TypeError: no tensor of whole numbers.
        ValueError: no batch, or one without a token.
    """
    if not isinstance(tokens_BL, Tensor):
        raise TypeError(f"tokens must be a tensor (batch, tokens) of whole numbers, received {describe(tokens_BL)}.")
    if tokens_BL.dim() != 2:
        raise ValueError(f"tokens must have the shape (batch, tokens), received {describe(tokens_BL)}.")
    if tokens_BL.shape[1] == 0:
        raise ValueError(
            f"there is no token to read: received shape {tuple(tokens_BL.shape)}, expected (batch, tokens) with at "
            "least one. Begin with one token, such as that of a line end."
        )
    if tokens_BL.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be whole numbers, int64 or int32; received {describe(tokens_BL)}.")


def check_known(tokens_BL: Tensor, V: int) -> None:
    """Refuse tokens that a vocabulary of ``V`` does not have; a GPU is waited for.

    Raises:
        ValueError: names the first of them.
    """
    # Traced and exported programs have no numbers to look at.
    if torch.compiler.is_compiling() or tokens_BL.is_meta:
        return
    unknown = tokens_BL[(tokens_BL < 0) | (tokens_BL >= V)]
    if unknown.numel():
        raise ValueError(
            f"token {int(unknown[0])} is unknown to this model, whose vocabulary is the {V:,} tokens from 0 to "
            f"{V - 1:,}. Encode the text with the tokeniser that it was trained with."
        )


def check_cache(cache: object) -> None:
    """Refuse a cache of another kind.

    Raises:
        TypeError: it is no ``better_attention.ModelCache``.
    """
    if cache is not None and not isinstance(cache, ModelCache):
        raise TypeError(
            f"cache must be a better_attention.ModelCache, received {describe(cache)}. Make one with "
            "better_attention.ModelCache(model, batch_size)."
        )


def without_choice(largest: float) -> str:
    """What is wrong with logits whose largest is NaN or infinite, and what to do."""
    return (
        f"the model's logits are {'NaN' if math.isnan(largest) else 'infinite'}, so that no token can be chosen. Its "
        "weights are damaged, its training diverged, or a number is too large for its dtype: look at the weights, or "
        "compute in float32."
    )
