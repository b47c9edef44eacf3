"""Heads apart, turned or biased by their positions, and joined.

Shape suffixes as in arguments.py; P pairs of features, H/2.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from better_attention.cache.streams import letter_of, streams
from better_attention.call.call import Call, compute_dtype
from better_attention.call.masks import together
from better_attention.errors import check_choice, check_float
from better_attention.mechanism import Mechanism
from better_attention.positions import (
    BASE,
    alibi_bias,
    alibi_features,
    alibi_slopes,
    check_even_width,
    rotary_angles,
    rotate,
)
from better_attention.scores import SCORES

from .share import HeadShare

ALIBI_PLACES = ("score", "weight")


class HeadCounts:
    """How many heads a layer has of queries, keys and values: all together, and in this process."""

    mechanism: Mechanism
    num_heads: int
    window: int | None
    share: HeadShare | None
    kv_group: int = 1
    """Query heads that share one of projected keys and values; the same where processes share the heads."""

    @property
    def num_kv_heads(self) -> int:
        """Number of heads of projected keys and values."""
        return self.num_heads // self.kv_group

    @property
    def key_heads(self) -> int:
        """Number of heads of keys: ``num_kv_heads``, or a slice of the input for each query head."""
        return self.num_kv_heads if "k" in self.mechanism.projections else self.num_heads

    @property
    def value_heads(self) -> int:
        """Number of heads of values: ``num_kv_heads``, or a slice of the input for each query head."""
        return self.num_kv_heads if "v" in self.mechanism.projections else self.num_heads

    def here(self, heads: int) -> int:
        """How many of all ``heads`` of a kind this process computes."""
        return heads if self.share is None else heads * self.share.count // self.num_heads

    @property
    def heads_here(self) -> int:
        """Number of heads that this process computes: all of them unless several share the layer."""
        return self.here(self.num_heads)

    @property
    def first_head(self) -> int:
        """Which of all heads is the first that this process computes."""
        return 0 if self.share is None else self.share.first

    @property
    def cache_streams(self) -> tuple[str, ...]:
        """What a cache of this layer holds: see :func:`better_attention.cache.streams.streams`."""
        return streams(self.mechanism, window=self.window is not None)

    @property
    def cache_heads(self) -> tuple[int, ...]:
        """How many heads each tensor of a cache has, of those that this process computes."""
        counts = {"k": self.here(self.key_heads), "v": self.here(self.value_heads)}
        return tuple(counts[letter_of(name)] for name in self.cache_streams)


def split(x_BLD: Tensor, num_heads: int, head_dim: int, name: str) -> Tensor:
    """Head i has columns i*H ... (i+1)*H: (B, L, D) -> (B, N, L, H), a view.

    Raises:
        ValueError: the projection called ``name`` returned another width, as in tensor-parallel training.
    """
    B, L, width = x_BLD.shape
    if width != num_heads * head_dim:
        raise ValueError(
            f"{name} returned width {width}, but {num_heads} heads of width {head_dim} need {num_heads * head_dim}. "
            "If its columns are divided among processes, set num_heads to the heads of one process "
            f"({num_heads} divided by their number); every projection has to be divided."
        )
    # Splitting the last dimension is a view in any memory layout, so that no layout of the inputs costs a copy.
    return x_BLD.view(B, L, num_heads, head_dim).transpose(1, 2)


def join(heads_BNLH: Tensor, batch_first: bool) -> Tensor:
    """Heads side by side, in the caller's order of dimensions, so that the output is contiguous there."""
    heads_BLNH = heads_BNLH.transpose(1, 2)
    return (heads_BLNH if batch_first else heads_BLNH.transpose(0, 1)).flatten(-2)


def check_rotary(rotary: bool | float | None, head_dim: int) -> float | None:
    """The base of rotary positions, or None without them.

    Raises:
        ValueError, TypeError: an odd head width, or a base that is no number of at least 1.
    """
    if rotary is None or rotary is False:
        return None
    check_even_width(head_dim)
    return BASE if rotary is True else check_float(rotary, "rotary", low=1.0)


def rotated(x_BLD: Tensor, num_heads: int, base: float | None, first: int = 0) -> Tensor:
    """Every head's pairs of features rotated by the position, from ``first`` on; as they are where ``base`` is None."""
    if base is None:
        return x_BLD
    B, L, D = x_BLD.shape
    # Before the heads are split off: the angles are the same for each head and broadcast over them.
    positions_L = torch.arange(L, device=x_BLD.device) + first
    cos_LP, sin_LP = rotary_angles(positions_L, D // num_heads, base=base, dtype=compute_dtype(x_BLD.dtype))
    heads_BLNH = x_BLD.view(B, L, num_heads, D // num_heads)
    return rotate(heads_BLNH, cos_LP[:, None], sin_LP[:, None]).flatten(2)


def check_alibi(alibi: str | None, added_keys: bool) -> str | None:
    """``alibi`` if it is None or a place.

    Args:
        alibi: the layer's argument.
        added_keys: whether the layer adds keys that have no position.

    Raises:
        ValueError: another name, or added keys.
    """
    if alibi is None:
        return None
    if added_keys:
        raise ValueError(
            f"alibi={alibi!r} biases every key by its distance, and the keys of add_bias_kv and add_zero_attn have "
            "none: leave one of the two out."
        )
    return check_choice(alibi, "alibi", ALIBI_PLACES)


def biased(alibi: str | None, call: Call, num_heads: int, first: int) -> Call:
    """``call`` with ALiBi where the layer has it.

    Args:
        alibi: the layer's argument.
        call: the call of some of its heads, or all.
        num_heads, first: number of the layer's heads, and which of them is the first of the call: slopes follow from
            both.

    With z = scale q.k, the head's slope m and the distance l - s of query and key, the un-normalised weight is

        "weight":  f(z) e^{-m |l - s|}        "score":  f(z - m (l - s))

    where f(z) is exp(z) for softmax and z^2 / (1 + z^2) for the expressive score. For softmax under the causal triangle
    both are one function. For the expressive score they are opposites: the first lets the weight of far keys fall, the
    second lets it grow. Source: arXiv 2108.12409, section 3; see :func:`better_attention.positions.alibi_features`.

    Raises:
        ValueError: inside the score without the causal triangle.
    """
    if alibi is None:
        return call
    slopes = alibi_slopes(num_heads)[first : first + call.q_BNLH.shape[1]]
    return _inside(call, slopes) if alibi == "score" else _on_the_weight(call, slopes)


def _on_the_weight(call: Call, slopes: list[float]) -> Call:
    q_BNLH, mask = call.q_BNLH, call.mask_BNLS
    sizes = q_BNLH.shape[1], q_BNLH.shape[2], call.k_BNSH.shape[2]
    bias_NLS = alibi_bias(
        *sizes, offset=call.offset, device=q_BNLH.device, dtype=compute_dtype(q_BNLH.dtype), slopes=slopes
    )
    if mask is not None and mask.dtype != torch.bool:
        # What hides by being the lowest number of its dtype would be an ordinary one in the sum's.
        mask = mask.masked_fill(SCORES[call.score].hides(mask), -math.inf)
    return replace(call, mask_BNLS=together(mask, bias_NLS[None]))


def _inside(call: Call, slopes: list[float]) -> Call:
    if not call.causal:
        raise ValueError(
            "alibi='score' counts distances with a sign, -m (l - s), which has a meaning for keys s <= l alone: call "
            "the layer with is_causal=True (masks apply as well), or build it with alibi='weight'."
        )
    q_BNLH, k_BNSH = alibi_features(call.q_BNLH, call.k_BNSH, scale=call.scale, offset=call.offset, slopes=slopes)
    return replace(call, q_BNLH=q_BNLH, k_BNSH=k_BNSH, scale=1.0)
