"""The backward pass: one kernel for the gradient of the queries, one for those of keys and values.

Both compute scores and weights again from what the forward pass wrote of each row. Two kernels, and not one that adds
to the gradient of the queries from many blocks at once, because such sums would run in another order each time: here
the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from better_attention.gpu.kernels.tiles import (
    ALL,
    FAR,
    FAR_SQUARE,
    FLOAT_MASK,
    NO_MASK,
    first_row,
    inside,
    key_numbers,
    meet,
    read_mask,
    reciprocal,
    row_numbers,
    tile,
)


@triton.jit
def share_kernel(
    out_x, grad_x, share_x, o_b, o_n, o_l, d_b, d_n, d_l, N, L, W: tl.constexpr, W_P: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The normaliser's share of each row, sum over keys of w dL/dw, which is output . upstream: (B, N, L)."""
    blocks = tl.cdiv(L, BM)
    index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, n = (index // N).to(tl.int64), (index % N).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    columns = tl.arange(0, W_P)
    there = (rows < L)[:, None] & (columns < W)[None, :]
    far = rows.to(tl.int64)[:, None]
    out = tl.load(out_x + b * o_b + n * o_n + far * o_l + columns[None, :], mask=there, other=0.0).to(tl.float32)
    grad = tl.load(grad_x + b * d_b + n * d_n + far * d_l + columns[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(share_x + index.to(tl.int64) * L + rows, tl.sum(out * grad, 1), mask=rows < L)


PLAIN = tl.constexpr(0)
CAREFUL = tl.constexpr(1)
ALL_ROWS = tl.constexpr(2)
"""Which rows of expressive weights a kernel computes: those of the forward pass, those of careful.py, or both."""


@triton.jit
def row_statistics(stats_x, share_x, index, rows, L, factor, EXPRESSIVE: tl.constexpr, WHICH: tl.constexpr):
    """Of each row: 1 / total or log2 of the sum of exponentials, the maximum, g, c, one, the share.

    Rows beyond the last, and those that are not asked for, have no weight: 0, or 2^-infinity.
    """
    there = rows < L
    share = tl.load(share_x + index * L + rows, mask=there, other=0.0)
    top = tl.zeros(rows.shape, tl.float32)
    unit = tl.zeros(rows.shape, tl.float32) + 1.0
    if EXPRESSIVE:
        stats = stats_x + index * 3 * (L + 1) + rows
        level = tl.load(stats, mask=there, other=0.0)
        top = tl.load(stats + (L + 1), mask=there, other=0.0)
        if WHICH != PLAIN:
            unit = tl.load(stats + 2 * (L + 1), mask=level < 0.0, other=1.0)
        if WHICH == PLAIN:
            level = tl.maximum(level, 0.0)
        elif WHICH == CAREFUL:
            level = tl.maximum(-level, 0.0)
        else:
            level = tl.abs(level)
    else:
        level = tl.load(stats_x + index * L + rows, mask=there, other=float("inf"))
    # A small row that careful.py computed is measured in units, where 1 + z^2 is 1.
    small = unit != 1.0
    return level, top, unit, tl.where(small, 1.0, factor), tl.where(small, 0.0, 1.0), share


@triton.jit
def slopes(
    x, dp, visible, bias, level, top, unit, c, one, share, factor, EXPRESSIVE: tl.constexpr, BIASED: tl.constexpr,
    RESTRICTED: tl.constexpr, FAST: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    """From scores x = q.k and dL/dw of a tile: its weights, and dL/dx over what is the same for a row.

    That is the scale for softmax, and 2 c g for the expressive score. What belongs to rows comes in a shape that
    broadcasts over the tile. Where each thread has many rows, as in the kernel for keys, what it has to keep of them
    decides over its registers: of PLAIN rows two numbers each.
    """
    if EXPRESSIVE:
        y = x
        if WHICH != PLAIN:
            y = x * unit
        if RESTRICTED:
            y = tl.where(visible, y, 0.0)
        square = y * y
        if WHICH == CAREFUL:
            # In the other kernels rows whose squares overflow have no weight, or their weights do not matter.
            square = tl.minimum(square, FAR_SQUARE)
            y = tl.minimum(tl.maximum(y, -FAR), FAR)
        r = reciprocal(factor + square if WHICH == PLAIN else c + one * square, FAST)
        f = tl.zeros(x.shape, tl.float32) + level
        if BIASED:
            f = f * tl.exp2(tl.minimum(bias - top, 126.0))
        # Where the square is infinite r is 0, and so must be all that follows: never the square times r.
        yr = y * r
        w = yr * (y * f)
        # d/dx of y^2 / (c + y^2) is 2 c g y / (c + y^2)^2; with one = 0 it is 2 g y / c.
        ds = tl.where(w >= ALL, 0.0, (yr * (r * f)) * (dp - share))
    else:
        exponent = x * factor - level
        if BIASED:
            exponent = x * factor + bias - level
        w = tl.exp2(exponent)
        if RESTRICTED:
            w = tl.where(visible, w, 0.0)
        ds = tl.where(w >= 1.0, 0.0, w * (dp - share))
    return w, ds


@triton.jit
def query_gradient(
    dq, q, grad, k_x, v_x, mask_rows, padding_x, m_s, p_s, b, g, places, low, high, level, top, unit, c, one, share,
    begin, end, S, k_s, v_s, window, factor, kept, seed, below, EDGE: tl.constexpr, EXPRESSIVE: tl.constexpr,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_LOWEST: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, from keys ``begin`` to ``end``."""
    BIASED: tl.constexpr = (MASK == FLOAT_MASK) or (PADDING == FLOAT_MASK)
    RESTRICTED: tl.constexpr = EDGE or MASK != NO_MASK or PADDING != NO_MASK
    for s0 in tl.range(begin, end, BN):
        s0 = tl.multiple_of(s0, BN)
        keys = s0 + tl.arange(0, BN)
        k = tile(k_x, b, g, s0, S, k_s, BN, H, H_P, EDGE, TMA, LONG)
        v = k
        if not SHARED:
            v = tile(v_x, b, g, s0, S, v_s, BN, W, W_P, EDGE, TMA, LONG)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
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
        if DROPOUT:
            dropped = meet(low[:, None], high[:, None], key_numbers(seed, keys)[None, :]) < below.to(tl.uint32)
            dp = tl.where(dropped, 0.0, dp * kept)
        _, ds = slopes(
            x, dp, visible, bias, level[:, None], top[:, None], unit[:, None], c[:, None], one[:, None], share[:, None],
            factor, EXPRESSIVE, BIASED, RESTRICTED, FAST, ALL_ROWS,
        )  # fmt: skip
        if WIDE:
            # float16 has no room for the slopes of small expressive scores; TF32 has, and holds float16 exactly.
            dq = tl.dot(ds, k.to(tl.float32), dq, input_precision="tf32")
        else:
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["seed", "below", "batch_first", "batch_step", "offset", "window"])
def query_gradient_kernel(
    q_x, k_x, v_x, mask_x, padding_x, grad_x, stats_x, share_x, dq_x,
    q_b, q_n, q_l, k_b, k_g, k_s, v_b, v_g, v_s, m_b, m_n, m_l, m_s, p_b, p_s, d_b, d_n, d_l, r_b, r_n, r_l,
    N, L, S, offset, window, factor, scale, kept, seed, below, batch_first,
    batch_step,
    EXPRESSIVE: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr, MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr,
    DROPOUT: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, (B, N, L, H)."""
    blocks = tl.cdiv(L, BM)
    index = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    b, n = index // N, index % N
    g = n // GROUP
    l0 = block * BM
    rows = l0 + tl.arange(0, BM)
    b_far, n_far, g_far, far = b.to(tl.int64), n.to(tl.int64), g.to(tl.int64), index.to(tl.int64)
    k_base, v_base = k_x, v_x
    if not TMA:
        k_base = k_x + b_far * k_b + g_far * k_g
        v_base = v_x + b_far * v_b + g_far * v_g
    q = tile(q_x + b_far * q_b + n_far * q_n, b, n, l0, L, q_l, BM, H, H_P, True, False, LONG)
    grad = tile(grad_x + b_far * d_b + n_far * d_n, b, n, l0, L, d_l, BM, W, W_P, True, False, LONG)
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
    level, top, unit, c, one, share = row_statistics(stats_x, share_x, far, rows, L, factor, EXPRESSIVE, ALL_ROWS)

    # As in the forward pass: [begin, first) and [last, end) are the edges of the band.
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
        first = tl.minimum(first, tl.maximum(begin, tl.cdiv(end, BN) * BN))
    last = tl.maximum(first, last)
    dq = tl.zeros((BM, H_P), tl.float32)
    if WINDOW:
        dq = query_gradient(
            dq, q, grad, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, low, high, level, top, unit,
            c, one, share, begin, tl.minimum(first, end), S, k_s, v_s, window, factor, kept, seed, below, True,
            EXPRESSIVE, SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST, MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H,
            W, H_P, W_P, BN, WIDE, PRECISION, FAST, TMA, LONG,
        )  # fmt: skip
    dq = query_gradient(
        dq, q, grad, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, low, high, level, top, unit, c,
        one, share, first, last, S, k_s, v_s, window, factor, kept, seed, below, False, EXPRESSIVE, SHARED, CAUSAL,
        WINDOW, MASK, MASK_LOWEST, MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H, W, H_P, W_P, BN, WIDE,
        PRECISION, FAST, TMA, LONG,
    )  # fmt: skip
    dq = query_gradient(
        dq, q, grad, k_base, v_base, mask_rows, padding_base, m_s, p_s, b, g, places, low, high, level, top, unit, c,
        one, share, last, end, S, k_s, v_s, window, factor, kept, seed, below, True, EXPRESSIVE, SHARED, CAUSAL, WINDOW,
        MASK, MASK_LOWEST, MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H, W, H_P, W_P, BN, WIDE,
        PRECISION, FAST, TMA, LONG,
    )  # fmt: skip
    dq = dq * ((2.0 * c * unit)[:, None] if EXPRESSIVE else scale)
    columns = tl.arange(0, H_P)
    pointers = dq_x + b_far * r_b + n_far * r_n + rows.to(tl.int64)[:, None] * r_l + columns[None, :]
    tl.store(pointers, dq.to(dq_x.dtype.element_ty), mask=(rows < L)[:, None] & (columns < H)[None, :])


@triton.jit
def key_gradient(
    dk, dv, k, v, q_x, grad_x, mask_base, padding_base, m_l, m_s, p_s, stats_x, share_x, b, n, index, drop_row, keys,
    begin, end, L, S, q_l, d_l, offset, window, factor, kept, seed, below, EDGE: tl.constexpr, EXPRESSIVE: tl.constexpr,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, MASK_LOWEST: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr, BM: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
    WHICH: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values from queries ``begin`` to ``end`` of one head; tiles are (BN, BM)."""
    BIASED: tl.constexpr = (MASK == FLOAT_MASK) or (PADDING == FLOAT_MASK)
    RESTRICTED: tl.constexpr = EDGE or MASK != NO_MASK or PADDING != NO_MASK
    for l0 in tl.range(begin, end, BM):
        l0 = tl.multiple_of(l0, BM)
        rows = l0 + tl.arange(0, BM)
        q = tile(q_x, b, n, l0, L, q_l, BM, H, H_P, True, TMA, LONG)
        grad = tile(grad_x, b, n, l0, L, d_l, BM, W, W_P, True, TMA, LONG)
        level, top, unit, c, one, share = row_statistics(stats_x, share_x, index, rows, L, factor, EXPRESSIVE, WHICH)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        # Keys beyond the last are never written, and queries beyond the last have no weight.
        visible = keys[:, None] < S
        bias = tl.zeros((keys.shape[0], 1), tl.float32)
        if EDGE:
            visible = inside((rows + offset)[None, :], keys[:, None], S, window, CAUSAL, WINDOW)
        if PADDING != NO_MASK:
            shown, added = read_mask(padding_base + keys * p_s, keys < S, PADDING, PADDING_LOWEST)
            visible = visible & shown[:, None]
            bias = bias + added[:, None]
        if MASK != NO_MASK:
            pointers = mask_base + (keys * m_s)[:, None]
            if MASK_PER_QUERY:
                pointers = pointers + (tl.minimum(rows, L - 1).to(tl.int64) * m_l)[None, :]
            shown, added = read_mask(pointers, (keys < S)[:, None], MASK, MASK_LOWEST)
            visible = visible & shown
            bias = bias + added
        dropped = visible
        if DROPOUT:
            low, high = row_numbers(seed, drop_row + rows)
            dropped = meet(low[None, :], high[None, :], key_numbers(seed, keys)[:, None]) < below.to(tl.uint32)
            dp = tl.where(dropped, 0.0, dp * kept)
        w, ds = slopes(
            x, dp, visible, bias, level[None, :], top[None, :], unit[None, :], c[None, :], one[None, :], share[None, :],
            factor, EXPRESSIVE, BIASED, RESTRICTED, FAST, WHICH,
        )  # fmt: skip
        if WHICH == CAREFUL:
            ds = ds * (2.0 * c * unit)[None, :]
        if DROPOUT:
            w = tl.where(dropped, 0.0, w * kept)
        dv = tl.dot(w.to(grad.dtype), grad, dv, input_precision=PRECISION)
        if WIDE:
            dk = tl.dot(ds, q.to(tl.float32), dk, input_precision="tf32")
        else:
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["seed", "below", "batch_first", "batch_step", "offset", "window"])
def key_gradient_kernel(
    q_x, k_x, v_x, mask_x, padding_x, grad_x, stats_x, share_x, dk_x, dv_x,
    q_b, q_n, q_l, k_b, k_g, k_s, v_b, v_g, v_s, m_b, m_n, m_l, m_s, p_b, p_s, d_b, d_n, d_l, r_b, r_g, r_s,
    t_b, t_g, t_s, N, G, L, S, offset, window, factor, scale, kept, seed, below, batch_first,
    batch_step,
    EXPRESSIVE: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr, MASK_PER_QUERY: tl.constexpr, PADDING: tl.constexpr, PADDING_LOWEST: tl.constexpr,
    DROPOUT: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, H_P: tl.constexpr, W_P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    """The gradients of keys (B, G, S, H) and values (B, G, S, W); where one tensor is both, their sum in the first.

    With WHICH = CAREFUL what careful.py's rows contribute is added to what is there. Nearly always there is no such
    row, and every program ends after a look at its heads.
    """
    blocks = tl.cdiv(S, BN)
    pair = tl.program_id(0) // blocks
    # The first keys are seen by most queries, and start first.
    s0 = tl.program_id(0) % blocks * BN
    b, g = pair // G, pair % G
    if WHICH == CAREFUL:
        careful_heads = 0.0
        for j in range(GROUP):
            careful_heads += tl.load(stats_x + (b.to(tl.int64) * N + g * GROUP + j) * 3 * (L + 1) + L)
        if careful_heads == 0.0:
            return
    keys = s0 + tl.arange(0, BN)
    b_far, g_far = b.to(tl.int64), g.to(tl.int64)
    k = tile(k_x + b_far * k_b + g_far * k_g, b, g, s0, S, k_s, BN, H, H_P, True, False, LONG)
    v = k
    if not SHARED:
        v = tile(v_x + b_far * v_b + g_far * v_g, b, g, s0, S, v_s, BN, W, W_P, True, False, LONG)
    padding_base = padding_x
    if PADDING != NO_MASK:
        padding_base = padding_x + b_far * p_b
    dk = tl.zeros((BN, H_P), tl.float32)
    dv = tl.zeros((BN, W_P), tl.float32)

    # Of the queries [begin, end) that see any of these keys, those of the whole tiles [first, last) see all of them.
    begin, first, last, end = 0, 0, L, L
    if CAUSAL:
        begin = tl.maximum(0, s0 - offset) // BM * BM
        first = tl.maximum(0, (tl.minimum(s0 + BN, S) - 1 - offset + BM - 1)) // BM * BM
    if WINDOW:
        end = tl.minimum(L, tl.maximum(0, tl.minimum(s0 + BN, S) - 1 - offset + window))
        last = tl.maximum(0, s0 - offset + window) // BM * BM
        last = tl.minimum(last, end // BM * BM)
    first = tl.minimum(first, tl.cdiv(end, BM) * BM)
    last = tl.maximum(first, last)
    for j in range(GROUP):
        n = g * GROUP + j
        n_far = n.to(tl.int64)
        index = b_far * N + n_far
        drop_row = first_row(b, n, N, L, batch_first, batch_step)
        q_base, grad_base = q_x, grad_x
        if not TMA:
            q_base = q_x + b_far * q_b + n_far * q_n
            grad_base = grad_x + b_far * d_b + n_far * d_n
        mask_base = mask_x
        if MASK != NO_MASK:
            mask_base = mask_x + b_far * m_b + n_far * m_n
        if CAUSAL:
            dk, dv = key_gradient(
                dk, dv, k, v, q_base, grad_base, mask_base, padding_base, m_l, m_s, p_s, stats_x, share_x, b, n, index,
                drop_row, keys, begin, tl.minimum(first, end), L, S, q_l, d_l, offset, window, factor, kept, seed,
                below, True, EXPRESSIVE, SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST, MASK_PER_QUERY, PADDING,
                PADDING_LOWEST, DROPOUT, H, W, H_P, W_P, BM, WIDE, PRECISION, FAST, TMA, LONG, WHICH,
            )  # fmt: skip
        dk, dv = key_gradient(
            dk, dv, k, v, q_base, grad_base, mask_base, padding_base, m_l, m_s, p_s, stats_x, share_x, b, n, index,
            drop_row, keys, first, last, L, S, q_l, d_l, offset, window, factor, kept, seed, below, False, EXPRESSIVE,
            SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST, MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H, W, H_P, W_P,
            BM, WIDE, PRECISION, FAST, TMA, LONG, WHICH,
        )  # fmt: skip
        if WINDOW:
            dk, dv = key_gradient(
                dk, dv, k, v, q_base, grad_base, mask_base, padding_base, m_l, m_s, p_s, stats_x, share_x, b, n, index,
                drop_row, keys, last, end, L, S, q_l, d_l, offset, window, factor, kept, seed, below, True, EXPRESSIVE,
                SHARED, CAUSAL, WINDOW, MASK, MASK_LOWEST, MASK_PER_QUERY, PADDING, PADDING_LOWEST, DROPOUT, H, W, H_P,
                W_P, BM, WIDE, PRECISION, FAST, TMA, LONG, WHICH,
            )  # fmt: skip
    # Of CAREFUL rows each has a factor of its own, which is in their scores already.
    if not EXPRESSIVE:
        dk = dk * scale
    elif WHICH == PLAIN:
        dk = dk * (2.0 * factor)
    if SHARED:
        dk = dk + dv
    there = keys < S
    columns = tl.arange(0, H_P)
    pointers = dk_x + b_far * r_b + g_far * r_g + keys.to(tl.int64)[:, None] * r_s + columns[None, :]
    if WHICH == CAREFUL:
        dk += tl.load(pointers, mask=there[:, None] & (columns < H)[None, :], other=0.0).to(tl.float32)
    tl.store(pointers, dk.to(dk_x.dtype.element_ty), mask=there[:, None] & (columns < H)[None, :])
    if not SHARED:
        columns = tl.arange(0, W_P)
        pointers = dv_x + b_far * t_b + g_far * t_g + keys.to(tl.int64)[:, None] * t_s + columns[None, :]
        if WHICH == CAREFUL:
            dv += tl.load(pointers, mask=there[:, None] & (columns < W)[None, :], other=0.0).to(tl.float32)
        tl.store(pointers, dv.to(dv_x.dtype.element_ty), mask=there[:, None] & (columns < W)[None, :])
