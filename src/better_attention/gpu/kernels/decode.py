"""A few queries over many keys: the keys are split among programs, and what these find is combined.

The queries of all heads that share a head of keys are the rows of one tile, so that each key is read once. Where one
tensor is key and value, that one read serves both products. Partial results of the expressive score are sums of
weighted values and of weights, which simply add; with an exponent they are rescaled by the common maximum first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from better_attention.gpu.kernels.forward import accumulate, finish
from better_attention.gpu.kernels.tiles import NO_MASK


@triton.jit(do_not_specialize=["S", "offset", "window", "share"])
def split_kernel(
    q_x, k_x, v_x, mask_x, padding_x, sums_x, totals_x,
    q_b, q_n, q_l, k_b, k_g, k_s, v_b, v_g, v_s, m_b, m_n, m_l, m_s, p_b, p_s,
    G, L, S, offset, window, factor, share,
    EXPRESSIVE: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr, MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr,
    GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, LIFTED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Sums (B G, splits, BM, W_P), totals and maxima (B G, splits, 2, BM) of ``share`` keys each, float32."""
    pair, part = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    b_far, g_far = b.to(tl.int64), g.to(tl.int64)
    # Row j L + l is query l of head j of the group.
    rows = tl.arange(0, BM)
    real = rows < GROUP * L
    query = tl.where(real, rows % L, 0)
    n = g_far * GROUP + tl.where(real, rows // L, 0)
    columns = tl.arange(0, H_P)
    pointers = q_x + b_far * q_b + (n * q_n + query.to(tl.int64) * q_l)[:, None] + columns[None, :]
    q = tl.load(pointers, mask=real[:, None] & (columns < H)[None, :], other=0.0)
    mask_rows, padding_base = mask_x, padding_x
    if MASK != NO_MASK:
        mask_rows = mask_x + b_far * m_b
        if MASK_PER_QUERY:
            mask_rows = mask_rows + n * m_n + query.to(tl.int64) * m_l
    if PADDING != NO_MASK:
        padding_base = padding_x + b_far * p_b
    places = query + offset
    nothing = tl.zeros((BM,), tl.uint32)
    begin = part * share
    end = tl.minimum(S, begin + share)
    # Whole tiles that every query sees; single queries need none, because nothing is hidden from them.
    last = end // BN * BN
    if CAUSAL:
        last = tl.minimum(last, (offset + 1) // BN * BN)
    last = tl.maximum(begin, last)
    if WINDOW:
        last = begin
    acc = tl.zeros((BM, W_P), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    k_base, v_base = k_x + b_far * k_b + g_far * k_g, v_x + b_far * v_b + g_far * v_g
    acc, total, top = accumulate(
        acc, total, top, q, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, nothing, nothing, begin,
        last, S, k_s, v_s, window, factor, 0, 0, False, EXPRESSIVE, SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST,
        MASK_PER_QUERY, PADDING, PADDING_LOWEST, False, H, W, H_P, W_P, BN, LIFTED, PRECISION, FAST, False,
        LONG,
    )  # fmt: skip
    acc, total, top = accumulate(
        acc, total, top, q, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, nothing, nothing, last,
        end, S, k_s, v_s, window, factor, 0, 0, True, EXPRESSIVE, SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST,
        MASK_PER_QUERY, PADDING, PADDING_LOWEST, False, H, W, H_P, W_P, BN, LIFTED, PRECISION, FAST, False,
        LONG,
    )  # fmt: skip
    slot = pair.to(tl.int64) * tl.num_programs(1) + part
    wide = tl.arange(0, W_P)
    tl.store(sums_x + (slot * BM + rows)[:, None] * W_P + wide[None, :], acc)
    tl.store(totals_x + slot * 2 * BM + rows, total)
    tl.store(totals_x + slot * 2 * BM + BM + rows, top)


@triton.jit
def combine_kernel(
    sums_x, totals_x, out_x, stats_x, o_b, o_n, o_l, G, N, L, parts, kept,
    EXPRESSIVE: tl.constexpr, EXPONENT: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, W_P: tl.constexpr,
    BM: tl.constexpr, LIFTED: tl.constexpr,
):  # fmt: skip
    """Output and statistics of one head of queries, from the parts."""
    head = tl.program_id(0)
    b, n = (head // N).to(tl.int64), head % N
    pair = b * G + n // GROUP
    # The rows of this head in the tile of its group; BM are enough for all L queries.
    queries = tl.arange(0, BM)
    rows = tl.minimum(n % GROUP * L + queries, BM - 1)
    wide = tl.arange(0, W_P)
    acc = tl.zeros((BM, W_P), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    for part in range(parts):
        slot = pair * parts + part
        there = tl.load(sums_x + (slot * BM + rows)[:, None] * W_P + wide[None, :])
        added = tl.load(totals_x + slot * 2 * BM + rows)
        if EXPONENT:
            highest = tl.load(totals_x + slot * 2 * BM + BM + rows)
            higher = tl.maximum(top, highest)
            reached = tl.where(higher == float("-inf"), 0.0, higher)
            ours, theirs = tl.exp2(top - reached), tl.exp2(highest - reached)
            acc = acc * ours[:, None] + there * theirs[:, None]
            total = total * ours + added * theirs
            top = higher
        else:
            acc += there
            total += added
    finish(
        acc, total, top, out_x + b * o_b + n.to(tl.int64) * o_n, o_l, stats_x, head.to(tl.int64), queries, L, kept,
        EXPRESSIVE, W, W_P, LIFTED,
    )  # fmt: skip
