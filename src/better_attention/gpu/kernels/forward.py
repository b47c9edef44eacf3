"""The forward pass: a block of queries against all keys that it sees, tile by tile.

``accumulate`` is the loop over tiles; the kernel below calls it for the keys at the edges of the band, where single
keys are hidden, and for those between, where none is; ``decode.py`` calls it for a share of the keys of a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from better_attention.gpu.kernels.tiles import (
    FLOAT_MASK,
    LIFT,
    NO_MASK,
    expressive_weight,
    first_row,
    inside,
    key_numbers,
    meet,
    read_mask,
    row_numbers,
    tile,
)


@triton.jit
def accumulate(
    acc, total, top, q, k_x, v_x, mask_rows, padding_x, m_s, p_s, b, g, places, low, high, begin, end, S, k_s, v_s,
    window, factor, seed, below, EDGE: tl.constexpr, EXPRESSIVE: tl.constexpr, SHARED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_LOWEST: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr, BN: tl.constexpr, LIFTED: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Add keys ``begin`` to ``end`` to the sums of weighted values, to the totals and to the maxima of exponents.

    Args:
        acc, total, top: (BM, W_P), (BM,), (BM,): what the keys before have come to.
        mask_rows: (BM,) pointers to the rows of the mask, or one to the row of a mask that all queries share.
        places: (BM,) positions of the queries among the keys.
        low, high: (BM,) what dropout knows of the rows.
        factor: scale log2(e) for softmax, 1 / scale^2 for the expressive score.
    """
    BIASED: tl.constexpr = (MASK == FLOAT_MASK) or (PADDING == FLOAT_MASK)
    RESTRICTED: tl.constexpr = EDGE or MASK != NO_MASK or PADDING != NO_MASK
    # Only an exponential needs a maximum. Expressive weights lie in [0, 1), and their sums need no rescaling.
    EXPONENT: tl.constexpr = BIASED or not EXPRESSIVE
    for s0 in tl.range(begin, end, BN):
        s0 = tl.multiple_of(s0, BN)
        keys = s0 + tl.arange(0, BN)
        k = tile(k_x, b, g, s0, S, k_s, BN, H, H_P, EDGE, TMA, LONG)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        visible = keys[None, :] < S
        bias = tl.zeros((1, BN), tl.float32)
        if EDGE:
            visible = inside(places[:, None], keys[None, :], S, window, CAUSAL, WINDOW)
        if PADDING != NO_MASK:
            shown, added = read_mask(padding_x + keys * p_s, keys < S, PADDING, PADDING_LOWEST)
            visible = visible & shown[None, :]
            bias = bias + added[None, :]
        if MASK != NO_MASK:
            pointers = (mask_rows[:, None] if MASK_PER_QUERY else mask_rows) + (keys * m_s)[None, :]
            shown, added = read_mask(pointers, (keys < S)[None, :], MASK, MASK_LOWEST)
            visible = visible & shown
            bias = bias + added
        if EXPONENT:
            if EXPRESSIVE:
                exponent = bias + tl.zeros(x.shape, tl.float32)
            elif BIASED:
                exponent = x * factor + bias
            else:
                exponent = x * factor
            if RESTRICTED:
                exponent = tl.where(visible, exponent, float("-inf"))
            higher = tl.maximum(top, tl.max(exponent, 1))
            # A row that has seen no key yet has the maximum -inf, and nothing to rescale.
            reached = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(top - reached)
            p = tl.exp2(exponent - reached[:, None])
            if EXPRESSIVE:
                p = p * expressive_weight(x, visible, factor, RESTRICTED, FAST)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            top = higher
        else:
            p = expressive_weight(x, visible, factor, RESTRICTED, FAST)
            total = total + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(
                meet(low[:, None], high[:, None], key_numbers(seed, keys)[None, :]) < below.to(tl.uint32), 0.0, p
            )
        v = k
        if not SHARED:
            v = tile(v_x, b, g, s0, S, v_s, BN, W, W_P, EDGE, TMA, LONG)
        if LIFTED:
            p = p * LIFT
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["seed", "below", "batch_first", "batch_step", "offset", "window"])
def forward_kernel(
    q_x, k_x, v_x, mask_x, padding_x, out_x, stats_x,
    q_b, q_n, q_l, k_b, k_g, k_s, v_b, v_g, v_s, m_b, m_n, m_l, m_s, p_b, p_s, o_b, o_n, o_l,
    N, L, S, offset, window, factor, kept, seed, below, batch_first,
    batch_step,
    EXPRESSIVE: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr, MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr,
    DROPOUT: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LIFTED: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Output (B, N, L, W), and statistics (B, N, 1 or 3, L): what ``finish`` writes."""
    blocks = tl.cdiv(L, BM)
    index = tl.program_id(0) // blocks
    # The last queries see most keys: they start first, so that the short blocks fill the gaps at the end.
    block = blocks - 1 - tl.program_id(0) % blocks
    b, n = index // N, index % N
    g = n // GROUP
    l0 = block * BM
    rows = l0 + tl.arange(0, BM)
    b_far, n_far, g_far = b.to(tl.int64), n.to(tl.int64), g.to(tl.int64)
    k_base, v_base = k_x, v_x
    if not TMA:
        k_base = k_x + b_far * k_b + g_far * k_g
        v_base = v_x + b_far * v_b + g_far * v_g
    q = tile(q_x + b_far * q_b + n_far * q_n, b, n, l0, L, q_l, BM, H, H_P, True, False, LONG)
    mask_rows, padding_base = mask_x, padding_x
    if MASK != NO_MASK:
        mask_rows = mask_x + b_far * m_b + n_far * m_n
        if MASK_PER_QUERY:
            mask_rows = mask_rows + tl.minimum(rows, L - 1).to(tl.int64) * m_l
    if PADDING != NO_MASK:
        padding_base = padding_x + b_far * p_b
    places = rows + offset
    low = tl.zeros((BM,), tl.uint32)
    high = tl.zeros((BM,), tl.uint32)
    if DROPOUT:
        low, high = row_numbers(seed, first_row(b, n, N, L, batch_first, batch_step) + rows)

    acc = tl.zeros((BM, W_P), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)

    # Of the keys [begin, end) that any of these queries sees, all see those of the whole tiles [first, last).
    end = S
    last = S // BN * BN
    if CAUSAL:
        end = tl.minimum(S, tl.minimum(l0 + BM, L) + offset)
        last = tl.minimum(last, (l0 + offset + 1) // BN * BN)
    begin = 0
    first = 0
    if WINDOW:
        begin = tl.maximum(0, l0 + offset - window + 1) // BN * BN
        first = tl.maximum(begin, (tl.minimum(l0 + BM, L) - 1 + offset - window + 1 + BN - 1) // BN * BN)
        # A window narrower than a block of queries leaves no tile whole.
        first = tl.minimum(first, tl.maximum(begin, tl.cdiv(end, BN) * BN))
    last = tl.maximum(first, last)
    if WINDOW:
        acc, total, top = accumulate(
            acc, total, top, q, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, low, high, begin,
            tl.minimum(first, end), S, k_s, v_s, window, factor, seed, below, True, EXPRESSIVE, SHARED, CAUSAL, WINDOW,
            MASK, MASK_LOWEST, MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H, W, H_P, W_P, BN, LIFTED,
            PRECISION, FAST, TMA, LONG,
        )  # fmt: skip
    acc, total, top = accumulate(
        acc, total, top, q, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, low, high, first, last, S,
        k_s, v_s, window, factor, seed, below, False, EXPRESSIVE, SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST,
        MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H, W, H_P, W_P, BN, LIFTED, PRECISION, FAST, TMA,
        LONG,
    )  # fmt: skip
    acc, total, top = accumulate(
        acc, total, top, q, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, low, high, last, end, S,
        k_s, v_s, window, factor, seed, below, True, EXPRESSIVE, SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST,
        MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H, W, H_P, W_P, BN, LIFTED, PRECISION, FAST, TMA,
        LONG,
    )  # fmt: skip

    finish(
        acc, total, top, out_x + b_far * o_b + n_far * o_n, o_l, stats_x, index.to(tl.int64), rows, L, kept, EXPRESSIVE,
        W, W_P, LIFTED,
    )  # fmt: skip


@triton.jit
def finish(
    acc, total, top, out, o_l, stats_x, index, rows, L, kept, EXPRESSIVE: tl.constexpr, W: tl.constexpr,
    W_P: tl.constexpr, LIFTED: tl.constexpr,
):  # fmt: skip
    """Divide by the totals, and write the output and what the backward pass needs to know of each row.

    That is for softmax log2 of the sum of exponentials, infinite in a row without a key; for the expressive score one
    over the total, 0 in a row without weight, the maximum of the exponents, and a place for the factor g. Behind the
    first of these of each head stands a 0, where careful.py writes 1 if it has computed any row of the head again.
    """
    columns = tl.arange(0, W_P)
    inside_rows = rows < L
    # 0 where no key has any weight: a zero query, every key hidden, or all keys orthogonal.
    something = tl.where(total == 0.0, 1.0, total)
    inverse = tl.where(total == 0.0, 0.0, kept / something)
    if LIFTED:
        inverse = inverse * (1.0 / LIFT)
    result = acc * inverse[:, None]
    there = inside_rows[:, None] & (columns < W)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * o_l + columns[None, :], result.to(out.dtype.element_ty), mask=there)
    if EXPRESSIVE:
        stats = stats_x + index * 3 * (L + 1) + rows
        tl.store(stats, tl.where(total == 0.0, 0.0, 1.0 / something), mask=inside_rows)
        tl.store(stats + (L + 1), tl.where(top == float("-inf"), 0.0, top), mask=inside_rows)
        tl.store(stats_x + index * 3 * (L + 1) + L, 0.0)
    else:
        # total == 0 has no logarithm: such a row's exponentials, all of -inf, stay 0 under any shift that is not -inf.
        level = tl.where(total == 0.0, float("inf"), top + tl.log2(something))
        tl.store(stats_x + index * L + rows, level, mask=inside_rows)
