"""Where a token stands: rotary positions, which turn queries and keys, and ALiBi, on the log weights or in the score.

Both depend on distances alone, have no parameters, and take an offset for generation with a cache. Shape suffixes as in
call/call.py: B batch, L queries, S keys, N heads, H head width, G key heads; P pairs of features, H/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .call.call import compute_dtype
from .errors import check_float, check_int, describe
from .tensors import floating_tensor

BASE = 10_000.0
"""The usual base of rotary positions (arXiv 2104.09864, section 3.3)."""


def rotary(x_BNLH: Tensor, *, base: float = BASE, offset: int | Tensor = 0, positions: Tensor | None = None) -> Tensor:
    r"""Turn pairs of features of queries or keys by angles that grow with their position.

    Pair p of the vector at position m, as a complex number, is multiplied by
    :math:`e^{i m \, \mathrm{base}^{-2p/H}}`, so that :math:`q_m \cdot k_n` depends on m and n through m - n alone.
    Feature p is paired with feature p + H/2 (the half split of GPT-NeoX and Llama; weights trained with neighbours
    paired, as in GPT-J, have to be permuted).

    Args:
        x_BNLH: (..., L, H), such as (B, N, L, H), H even.
        base: the slowest pair turns almost ``base`` times slower than the fastest, which turns by 1 a position.
        offset: position of the first vector: the number of tokens in the cache while generating.
        positions: instead of offset, offset + 1, ...: the position of each vector, (L,), or (B, L) for x (B, N, L, H).

    Returns:
        The shape and dtype of ``x_BNLH``; 16-bit numbers are turned in float32.

    Raises:
        TypeError: positions of another kind.
        ValueError: an odd width, positions of another shape, or an offset beside positions.

    Source: arXiv 2104.09864, eqs. 14-16 and 34.

    >>> rotary(torch.ones(1, 1, 2, 2))
    tensor([[[[ 1.0000,  1.0000],
              [-0.3012,  1.3818]]]])
    """
    floating_tensor(x_BNLH, "x")
    if x_BNLH.dim() < 2:
        raise ValueError(f"x must be (..., L, H), received {describe(x_BNLH)}.")
    L, H = x_BNLH.shape[-2:]
    if positions is None:
        positions = torch.arange(L, device=x_BNLH.device) + offset
    elif isinstance(offset, Tensor) or offset != 0:
        raise ValueError(f"give positions or an offset, not both: received positions and offset={offset}.")
    elif not isinstance(positions, Tensor) or positions.dtype == torch.bool or positions.is_complex():
        raise TypeError(f"positions must be a tensor of numbers, received {describe(positions)}.")
    elif tuple(positions.shape) not in ((L,), (x_BNLH.shape[0], L)) or positions.dim() >= x_BNLH.dim():
        raise ValueError(
            f"positions must be (L,) = ({L},), or (B, L) for x (B, N, L, H); received {describe(positions)} for "
            f"{describe(x_BNLH)}."
        )
    cos, sin = rotary_angles(positions, H, base=base, dtype=compute_dtype(x_BNLH.dtype))
    if positions.dim() == 2:
        # (B, L, P) gets dimensions of size 1 for what lies between batch and length in x, such as the heads.
        cos, sin = (c.reshape(c.shape[0], *(1,) * (x_BNLH.dim() - 3), *c.shape[1:]) for c in (cos, sin))
    return rotate(x_BNLH, cos, sin)


def rotary_angles(
    positions: Tensor, width: int, *, base: float = BASE, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle at each position, (..., L, H/2) for positions (..., L).

    Args:
        positions: numbers of any kind; their device is that of the result.
        width: head width H.
        base: see :func:`rotary`.
        dtype: of the result. The angles themselves are float64, since float32 errs by 1e-7 of an angle, which at
            position 16,384 is 0.002; only on devices without float64 (MPS) are they float32.

    Raises:
        ValueError: an odd width, or a base below 1.
    """
    check_even_width(width)
    check_float(base, "base", low=1.0)
    exact = dtype if positions.device.type == "mps" else torch.float64
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=exact)
    # base^(-2p/H)
    speeds_P = torch.exp(pairs * (-math.log(base) / width))
    turns_LP = positions.to(exact)[..., None] * speeds_P
    return turns_LP.cos().to(dtype), turns_LP.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` (..., H) with its pairs (p, p + H/2) turned; ``cos`` and ``sin`` broadcast to (..., H/2)."""
    # The half split: feature p turns with feature p + H/2, as in Llama's weights.
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def check_even_width(width: int) -> int:
    """``width`` if pairs of features fill a head of it.

    Raises:
        ValueError: an odd number.
    """
    if width % 2:
        raise ValueError(
            f"rotary positions turn pairs of features: the head width must be even, received {width}. "
            "Choose embed_dim / num_heads even."
        )
    return width


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head: a geometric sequence from :math:`2^{-8/N}` with that ratio, for N a power of two.

    Other numbers of heads take the slopes of the power of two below, then every second one of the power above.

    Args:
        num_heads: number of heads N.

    Raises:
        TypeError: not a whole number.
        ValueError: less than 1.

    Source: arXiv 2108.12409, section 3, and its code for numbers of heads that are no power of two.

    >>> alibi_slopes(4), alibi_slopes(3)
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    num_heads = check_int(num_heads, "num_heads")
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (n + 1) / below) for n in range(below)]
    # Every second slope of 2 * below heads, 2^(-8 (2n + 1) / (2 below)), as the authors' code interpolates.
    return slopes + [2.0 ** (-4.0 * (2 * n + 1) / below) for n in range(num_heads - below)]


def alibi_bias(
    num_heads: int,
    L: int,
    S: int,
    *,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    slopes: Sequence[float] | None = None,
) -> Tensor:
    r"""The additive mask of ALiBi, (N, L, S): minus the head's slope times the distance of query and key.

    Added to the log weights, it multiplies the un-normalised weight of either score by
    :math:`e^{-\mathrm{slope} |l - s|}`. Later keys, which Press et al. hide, count by their distance too; hide them
    with ``is_causal=True``.

    Args:
        num_heads: number of heads N.
        L: number of queries.
        S: number of keys.
        offset: position of the first query among the keys: the number of tokens in the cache while generating.
        device: of the result.
        dtype: of the result.
        slopes: one for each head, where they are some of more heads; None: :func:`alibi_slopes`.

    Source: arXiv 2108.12409, section 3.

    >>> alibi_bias(1, 2, 3, offset=1) * 256
    tensor([[[-1.,  0., -1.],
             [-2., -1.,  0.]]])
    """
    slopes_N = torch.tensor(alibi_slopes(num_heads) if slopes is None else slopes, device=device, dtype=dtype)
    queries_L = torch.arange(L, device=device) + offset
    distance_LS = (queries_L[:, None] - torch.arange(S, device=device)).abs()
    # Distances stay integers until here, so that they are rounded once.
    return (-distance_LS).to(dtype) * slopes_N[:, None, None]


NARROW_DIGIT = 256
"""Whole numbers up to it are exact in float16 and bfloat16: longer positions are written in two digits of this base."""


def alibi_features(
    q_BNLH: Tensor,
    k_BGSH: Tensor,
    *,
    scale: float | None = None,
    offset: int | Tensor = 0,
    slopes: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Queries and keys with a few features more, whose product is the score with ALiBi inside. Attend with scale 1.

    .. math:: q'_l \cdot k'_s = \mathrm{scale} \, q_l \cdot k_s - m (l - s)

    .. math:: q'_l = [\mathrm{scale} \, q_l, -m l, m], \quad k'_s = [k_s, 1, s]

    with the head's slope m and positions counted from the first query. The bias has rank two in l and s, so that it
    passes through every implementation and kernel, at the cost of two features and without a mask. For softmax this is
    :func:`alibi_bias` under the causal triangle. Any other score treats what stands inside it as its own argument: the
    expressive one, :math:`z^2 / (1 + z^2)`, gives far keys *more* weight.

    Distances have a sign here: a key behind the query counts as a negative distance, so hide those with
    ``is_causal=True``.

    Args:
        q_BNLH: (..., N, L, H), floating point.
        k_BGSH: (..., G, S, H), dtype and device of the queries; N is a multiple of G.
        scale: factor on q.k, never on the bias; None means 1/sqrt(H).
        offset: position of the first query among the keys: the number of tokens in the cache while generating.
        slopes: one for each query head, where they are some of more heads; None: :func:`alibi_slopes`.

    Returns:
        Queries and keys of width H + 2. In float16 and bfloat16 a position is written in two digits and its product
        with the slope as two numbers: width H + 6, and the bias is exact for the slope as that dtype holds it.

    Raises:
        TypeError: no floating-point heads.
        ValueError: in 16 bits, more than 65,536 positions.

    Source: arXiv 2108.12409, section 3, for the bias; that it stands inside the square is how public code from the
    group behind arXiv 2407.18601 combines the two. The factors are our own derivation.

    >>> q, k = alibi_features(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), offset=1)
    >>> (q @ k.mT)[0, 0] * 256
    tensor([[-1.,  0.,  1.],
            [-2., -1.,  0.]])
    """
    for x, name in ((q_BNLH, "query"), (k_BGSH, "key")):
        floating_tensor(x, name)
        if x.dim() < 3:
            raise ValueError(f"{name} must be (..., heads, length, head width), received {describe(x)}.")
    N, L, H = q_BNLH.shape[-3:]
    S, dtype = k_BGSH.shape[-2], q_BNLH.dtype
    if dtype != compute_dtype(dtype) and max(L, S) > NARROW_DIGIT**2:
        raise ValueError(
            f"positions beyond {NARROW_DIGIT**2:,} are not exact in {str(dtype).removeprefix('torch.')}, received "
            f"{L:,} queries and {S:,} keys. Use float32, or pass alibi_bias() as a mask."
        )
    slopes_N = torch.tensor(alibi_slopes(N) if slopes is None else slopes, device=q_BNLH.device, dtype=dtype)
    # Counted from the first query, the large numbers are those of far keys, where a rounding matters least.
    query_LF, key_SF = [], []
    queries_L = _digits(torch.arange(L, device=q_BNLH.device), dtype)
    keys_S = _digits(torch.arange(S, device=q_BNLH.device) - offset, dtype)
    for (unit, queries), (_, keys) in zip(queries_L, keys_S, strict=True):
        slopes_N1 = (unit * slopes_N)[:, None]
        products = _exact_sum(-slopes_N1.to(queries.dtype) * queries, dtype)
        query_LF += [*products, slopes_N1.expand(N, L)]
        key_SF += [*[torch.ones_like(keys)] * len(products), keys]
    scaled = q_BNLH * (1.0 / math.sqrt(H) if scale is None else scale)
    return _widened(scaled, torch.stack(query_LF, dim=-1)), _widened(k_BGSH, torch.stack(key_SF, dim=-1).to(dtype))


def _digits(places: Tensor, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    """Whole numbers as a sum of unit times digit, each exact in ``dtype``: one digit for a wide dtype, else two."""
    wide = compute_dtype(dtype)
    if wide == dtype:
        return [(1, places.to(wide))]
    high = places.div(NARROW_DIGIT, rounding_mode="floor")
    return [(NARROW_DIGIT, high.to(wide)), (1, (places - NARROW_DIGIT * high).to(wide))]


def _exact_sum(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """``x`` as one tensor of ``dtype``, or as two where that is narrower: what the first one rounds away, and it."""
    first = x.to(dtype)
    return [first] if x.dtype == dtype else [first, (x - first.to(x.dtype)).to(dtype)]


def _widened(x: Tensor, features: Tensor) -> Tensor:
    """``x`` (..., H) with ``features`` (..., F), which broadcast over its other dimensions, behind its own."""
    return torch.cat([x, features.expand(*x.shape[:-1], features.shape[-1])], dim=-1)
