"""What a mechanism costs: parameters, floating-point operations, bytes; the paper's count beside the exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cache.streams import letter_of, streams
from .errors import check_bool, check_choice, check_int
from .layer.part import Sizes
from .layer.parts import parts_of
from .layer.projections import check_kv_heads
from .mechanism import Mechanism


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one attention layer in self-attention.

    Args:
        mechanism: its name.
        params: number of parameters, W_A and all biases included.
        flops_paper: C l d + 15 h l^2 times the batch, forward and backward (2403.01643 eq. 24), C = 15 standard, 12
            optimised and super, 9 efficient. It is linear in d, so it is not the count of a real layer, and it knows no
            window.
        flops: floating-point operations of the matrix products, a multiply-add counted as two.
        weight_bytes: memory of the parameters.
        cache_bytes_per_token: of a :class:`better_attention.KVCache`: one tensor where key and value are both the
            input itself (efficient, and super with a window), two for most, three where W_A mixes projected values.
        cache_bytes: of such a cache of all sequences: of ``length`` tokens, or of the last ``window``, beside which a
            cache allocates 256 rows to slide over.
    """

    mechanism: str
    params: int
    flops_paper: int
    flops: int
    weight_bytes: int
    cache_bytes_per_token: int
    cache_bytes: int


def cost(
    embed_dim: int,
    num_heads: int,
    length: int,
    *,
    mechanism: str | Mechanism = "standard",
    batch: int = 1,
    backward: bool = True,
    bias: bool = True,
    align_heads: str = "shared",
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    num_kv_heads: int | None = None,
) -> Cost:
    """Cost of one layer in self-attention over ``length`` tokens.

    Args:
        embed_dim: model width d.
        num_heads: number of heads h; divides d in a real layer, but eq. 24 is defined without that.
        length: number of tokens l, and without a window the size of W_A.
        mechanism: a name or a ``Mechanism``; for a free one C = 3 (number of linear maps, W_A included) + 3.
        batch: number of sequences.
        backward: count forward and backward (three times the forward products) in ``flops``, or forward alone.
            ``flops_paper`` is for both always.
        bias: whether the maps have biases.
        align_heads: "shared", or "per_head" for one W_A per head.
        dtype: of weights and cache.
        window: w: each token sees the last w alone, itself included, and W_A is w x w; None: every token sees all. A
            window implies causality, so that of l tokens min(t, w) keys are counted for the t-th, whereas without one
            all l are, causal or not: the products of hidden pairs are done by most implementations.
        num_kv_heads: heads of projected keys and values, see :class:`better_attention.MultiheadAttention`; None: h.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of the wrong kind.

    Source: arXiv 2403.01643, eq. 24 and the parameter columns of its tables.

    >>> cost(32, 4, 32, mechanism="super").params
    3168
    >>> cost(32, 4, 4096, window=256).cache_bytes == 2 * 256 * 32 * 4
    True
    >>> cost(32, 4, 4096, num_kv_heads=1).cache_bytes_per_token == 2 * 8 * 4
    True
    """
    row = Mechanism.of(mechanism)
    d, h, n, B = (
        check_int(x, name)
        for x, name in ((embed_dim, "embed_dim"), (num_heads, "num_heads"), (length, "length"), (batch, "batch"))
    )
    check_choice(align_heads, "align_heads", ("shared", "per_head"))
    for value, name in ((backward, "backward"), (bias, "bias")):
        check_bool(value, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"dtype must be a torch.dtype such as torch.float32, received {dtype!r} ({type(dtype).__name__})."
        )

    w = None if window is None else check_int(window, "window")
    sizes, parts = Sizes(d, h, n, bias, align_heads, w, *kv_heads_of(row, h, num_kv_heads)), parts_of(row)
    params = sum(part.params(sizes) for part in parts)
    # Two products of 2 d operations for each key that a query sees, over all heads: with keys, and with values.
    scores_and_mix = 4 * d * sum(sizes.seen)
    kept = sum(sizes.width(letter_of(name)) for name in streams(row, window=w is not None)) * dtype.itemsize
    forward = scores_and_mix + sum(part.flops(sizes) for part in parts)
    return Cost(
        mechanism=row.name,
        params=params,
        # Eq. 24 with C = 3 per linear map and 3 more, which gives the paper's 15, 12 and 9.
        flops_paper=B * ((3 * len(parts) + 3) * n * d + 15 * h * n * n),
        # Each product has two factors, whose gradients are a product of the same size each.
        flops=B * forward * (3 if backward else 1),
        weight_bytes=params * dtype.itemsize,
        cache_bytes_per_token=kept,
        cache_bytes=B * kept * (n if w is None else min(n, w)),
    )


def kv_heads_of(mechanism: Mechanism, num_heads: int, num_kv_heads: int | None) -> tuple[int, int]:
    """Number of heads of keys, and of values: what is not projected has one slice of the input for each query head.

    Raises:
        ValueError, TypeError: see :func:`.layer.projections.check_kv_heads`.

    >>> kv_heads_of(Mechanism.of("optimised"), 4, 2)
    (2, 4)
    """
    grouped = num_heads // check_kv_heads(num_kv_heads, num_heads, mechanism)
    keys, values = (grouped if letter in mechanism.projections else num_heads for letter in "kv")
    return keys, values
