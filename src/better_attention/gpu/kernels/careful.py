"""Expressive rows whose squares lose digits or overflow, or whose weights float16 cannot hold: computed once more.

The forward pass leaves a total for each row. Where that is below a bound, this kernel measures the scores of the row in
units of the largest of them, which the normaliser cancels, and writes output and statistics again. Blocks without such
a row end after reading their totals. Products are taken in float32, so that no format's range matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from better_attention.gpu.kernels.tiles import (
    FAR_SQUARE,
    FLOAT_MASK,
    NO_MASK,
    first_row,
    inside,
    key_numbers,
    meet,
    read_mask,
    row_numbers,
    tile,
)

SMALL = tl.constexpr(2.0**-13)
"""A row whose scores are all smaller has 1 + z^2 = 1 to the last bit of float32."""

NORMAL = tl.constexpr(2.0**-126)
"""The smallest normal number of float32."""


@triton.jit
def careful_tile(
    q, k_base, mask_rows, padding_base, m_s, p_s, places, s0, S, k_s, window, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_LOWEST: tl.constexpr, MASK_PER_QUERY: tl.constexpr,
    PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr, H: tl.constexpr, H_P: tl.constexpr, BN: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Scores of a tile (0 where hidden), what is visible, and the biases."""
    keys = s0 + tl.arange(0, BN)
    k = tile(k_base, 0, 0, s0, S, k_s, BN, H, H_P, True, False, LONG).to(tl.float32)
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    visible = inside(places[:, None], keys[None, :], S, window, CAUSAL, WINDOW)
    bias = tl.zeros((1, BN), tl.float32)
    if PADDING != NO_MASK:
        shown, added = read_mask(padding_base + keys * p_s, keys < S, PADDING, PADDING_LOWEST)
        visible = visible & shown[None, :]
        bias = bias + added[None, :]
    if MASK != NO_MASK:
        pointers = (mask_rows[:, None] if MASK_PER_QUERY else mask_rows) + (keys * m_s)[None, :]
        shown, added = read_mask(pointers, (keys < S)[None, :], MASK, MASK_LOWEST)
        visible = visible & shown
        bias = bias + added
    return tl.where(visible, x, 0.0), visible, bias


@triton.jit(do_not_specialize=["seed", "below", "batch_first", "batch_step", "offset", "window"])
def careful_kernel(
    q_x, k_x, v_x, mask_x, padding_x, out_x, stats_x,
    q_b, q_n, q_l, k_b, k_g, k_s, v_b, v_g, v_s, m_b, m_n, m_l, m_s, p_b, p_s, o_b, o_n, o_l,
    N, L, S, offset, window, factor, scale, steep, kept, seed, below, batch_first,
    batch_step,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_LOWEST: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr, DROPOUT: tl.constexpr,
    GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Output and statistics of rows for which one over the total is above ``steep``; a row of zeros stays as it is."""
    BIASED: tl.constexpr = (MASK == FLOAT_MASK) or (PADDING == FLOAT_MASK)
    blocks = tl.cdiv(L, BM)
    index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, n = (index // N).to(tl.int64), (index % N).to(tl.int64)
    g = n // GROUP
    rows = block * BM + tl.arange(0, BM)
    head = stats_x + index.to(tl.int64) * 3 * (L + 1)
    stats = head + rows
    inverse = tl.load(stats, mask=rows < L, other=1.0)
    # 0 marks a row without weight, which may be one whose squares have all underflowed; what is no number, a row whose
    # squares have overflowed, unless it comes from the inputs.
    again = (rows < L) & ((inverse > steep) | (inverse == 0.0) | (inverse != inverse))
    if tl.max(again.to(tl.int32), 0) == 0:
        return
    q = tile(q_x + b * q_b + n * q_n, 0, 0, block * BM, L, q_l, BM, H, H_P, True, False, LONG).to(tl.float32)
    k_base, v_base = k_x + b * k_b + g * k_g, v_x + b * v_b + g * v_g
    mask_rows, padding_base = mask_x, padding_x
    if MASK != NO_MASK:
        mask_rows = mask_x + b * m_b + n * m_n
        if MASK_PER_QUERY:
            mask_rows = mask_rows + tl.minimum(rows, L - 1).to(tl.int64) * m_l
    if PADDING != NO_MASK:
        padding_base = padding_x + b * p_b
    places = rows + offset
    begin, end = 0, S
    if CAUSAL:
        end = tl.minimum(S, tl.minimum(block * BM + BM, L) + offset)
    if WINDOW:
        begin = tl.maximum(0, block * BM + offset - window + 1) // BN * BN

    largest = tl.zeros((BM,), tl.float32)
    for s0 in tl.range(begin, end, BN):
        x, visible, bias = careful_tile(
            q, k_base, mask_rows, padding_base, m_s, p_s, places, s0, S, k_s, window, CAUSAL, WINDOW, MASK, MASK_LOWEST,
            MASK_PER_QUERY, PADDING, PADDING_LOWEST, H, H_P, BN, LONG,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    small = largest * tl.abs(scale) < SMALL
    # The largest score of a small row becomes 1, and y^2 / (c + one y^2) is y^2 there.
    unit = tl.where(small & (largest > 0.0), 1.0 / tl.maximum(largest, NORMAL), 1.0)
    c, one = tl.where(small, 1.0, factor), tl.where(small, 0.0, 1.0)
    top = tl.zeros((BM,), tl.float32)
    if BIASED:
        top = tl.full((BM,), float("-inf"), tl.float32)
        for s0 in tl.range(begin, end, BN):
            x, visible, bias = careful_tile(
                q, k_base, mask_rows, padding_base, m_s, p_s, places, s0, S, k_s, window, CAUSAL, WINDOW, MASK,
                MASK_LOWEST, MASK_PER_QUERY, PADDING, PADDING_LOWEST, H, H_P, BN, LONG,
            )  # fmt: skip
            y = x * unit[:, None]
            square = tl.minimum(y * y, FAR_SQUARE)
            a = square / (c[:, None] + one[:, None] * square)
            # Weights below the smallest normal number would need factors beyond the format.
            seen = visible & (a >= NORMAL)
            top = tl.maximum(top, tl.max(tl.where(seen, tl.log2(tl.where(seen, a, 1.0)) + bias, float("-inf")), 1))
        top = tl.where(top == float("-inf"), 0.0, top)
    low = tl.zeros((BM,), tl.uint32)
    high = tl.zeros((BM,), tl.uint32)
    if DROPOUT:
        low, high = row_numbers(seed, first_row(b, n, N, L, batch_first, batch_step) + rows)
    acc = tl.zeros((BM, W_P), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for s0 in tl.range(begin, end, BN):
        x, visible, bias = careful_tile(
            q, k_base, mask_rows, padding_base, m_s, p_s, places, s0, S, k_s, window, CAUSAL, WINDOW, MASK, MASK_LOWEST,
            MASK_PER_QUERY, PADDING, PADDING_LOWEST, H, H_P, BN, LONG,
        )  # fmt: skip
        y = x * unit[:, None]
        square = tl.minimum(y * y, FAR_SQUARE)
        p = square / (c[:, None] + one[:, None] * square)
        if BIASED:
            p = tl.where(
                p >= NORMAL,
                p * tl.exp2(tl.minimum(tl.where(visible, bias, 0.0) - top[:, None], 126.0)),
                0.0,
            )
        total = total + tl.sum(p, 1)
        if DROPOUT:
            keys = s0 + tl.arange(0, BN)
            p = tl.where(
                meet(low[:, None], high[:, None], key_numbers(seed, keys)[None, :]) < below.to(tl.uint32), 0.0, p
            )
        v = tile(v_base, 0, 0, s0, S, v_s, BN, W, W_P, True, False, LONG).to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision="ieee")
    inverse = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    result = acc * (inverse * kept)[:, None]
    columns = tl.arange(0, W_P)
    out = out_x + b * o_b + n * o_n + rows.to(tl.int64)[:, None] * o_l + columns[None, :]
    # A row without a score other than 0 is 0 already, and one with a score that is no number stays as it is.
    again = again & (total > 0.0)
    tl.store(out, result.to(out_x.dtype.element_ty), mask=again[:, None] & (columns < W)[None, :])
    # The sign says to the backward pass that the row is one of these.
    tl.store(stats, -inverse, mask=again)
    tl.store(stats + (L + 1), top, mask=again)
    tl.store(stats + 2 * (L + 1), unit, mask=again)
    if tl.max(again.to(tl.int32), 0) > 0:
        tl.store(head + L, 1.0)
