"""What the kernels share: reading a tile, what hides keys in it, what dropout drops, and both scores.

The formulas are those of ``native/cpp`` in tiles. A weight before normalisation is

* softmax: 2^(x s - m), with x = q.k, s = scale log2(e) and the running maximum m of the row;
* expressive: y^2 / (c + y^2) times 2^(bias - m). In an ordinary row y = x and c = 1 / scale^2, which is
  z^2 / (1 + z^2) without a multiplication by the scale. Without a bias there is no m, and no maximum.

Rows whose scores are so small that their squares lose digits are computed again by ``careful.py``, with y = g x in
units of the row; the backward pass reads g.

Sources: arXiv 2403.01643, equations 3-4 (softmax); arXiv 2407.18601 (expressive); arXiv 2205.14135 (tiles).
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(2.0**62)
FAR_SQUARE = tl.constexpr(2.0**124)
"""Beyond, a weight is 1 and its slope 0 to the last bit, and infinity over infinity must not arise."""
ALL = tl.constexpr(1.0 - 2.0**-21)
"""From here on a key has all the weight of its row but for rounding, and the gradient of its score is 0."""
LIFT = tl.constexpr(2.0**14)
"""What expressive weights are multiplied by before they become float16, whose smallest normal number is 2^-14."""

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
SPLIT_1 = tl.constexpr(0xBF58476D1CE4E5B9)
SPLIT_2 = tl.constexpr(0x94D049BB133111EB)
GOLDEN_32 = tl.constexpr(0x9E3779B9)
MIX_1 = tl.constexpr(0x7FEB352D)
MIX_2 = tl.constexpr(0x846CA68B)

NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(
    x, b, g, first, length, step, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BOUND: tl.constexpr,
    TMA: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` and the following of one head, (ROWS, PADDED), zeros beyond ``length`` and ``WIDTH``.

    With TMA ``x`` is a descriptor of (B, G, length, WIDTH), else a pointer to the first row of the head.
    """
    if TMA:
        loaded = x.load([b, g, first, 0]).reshape(ROWS, PADDED)
    else:
        rows = first + tl.arange(0, ROWS)
        columns = tl.arange(0, PADDED)
        # The offset of a row fits 32 bits unless a head spans 2^31 elements, which the host knows.
        offsets = (rows.to(tl.int64) if LONG else rows)[:, None] * step + columns[None, :]
        if BOUND and PADDED > WIDTH:
            loaded = tl.load(x + offsets, mask=(rows < length)[:, None] & (columns < WIDTH)[None, :], other=0.0)
        elif BOUND:
            loaded = tl.load(x + offsets, mask=(rows < length)[:, None], other=0.0)
        elif PADDED > WIDTH:
            loaded = tl.load(x + offsets, mask=(columns < WIDTH)[None, :], other=0.0)
        else:
            loaded = tl.load(x + offsets)
    return loaded


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x for a normal number x: one instruction of the special-function units, to 1 unit in the last place."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return 1.0 / x


# --- what hides keys --------------------------------------------------------------------------------------------------


@triton.jit
def inside(places, keys, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries at ``places`` see ``keys``, as far as the number of keys, the triangle and the window go."""
    seen = keys < S
    if CAUSAL:
        seen = seen & (keys <= places)
    if WINDOW:
        seen = seen & (keys > places - window)
    return seen


@triton.jit
def read_mask(pointers, there, KIND: tl.constexpr, LOWEST: tl.constexpr):
    """What a mask shows (bool), and what it adds to log weights in units of log 2 (0 where it hides)."""
    if KIND == BOOL_MASK:
        shown = tl.load(pointers, mask=there, other=0) != 0
        bias = tl.zeros(shown.shape, tl.float32)
    else:
        loaded = tl.load(pointers, mask=there, other=0.0)
        raw = loaded.to(tl.float32)
        shown = there & (raw > LOWEST)
        bias = tl.where(shown, raw, 0.0) * LOG2_E
    return shown, bias


# --- what dropout drops: native/cpp/dropout.hpp, number by number -----------------------------------------------------


@triton.jit
def splitmix(x):
    """Steele, Lea and Flood's finaliser of 64 bits."""
    x = (x ^ (x >> 30)) * SPLIT_1
    x = (x ^ (x >> 27)) * SPLIT_2
    return x ^ (x >> 31)


@triton.jit
def first_row(b, n, N, L, batch_first, batch_step):
    """Number of the first row of a head among those of the whole batch: i of row l is that and l."""
    return ((batch_first.to(tl.int64) + b.to(tl.int64) * batch_step) * N + n) * L


@triton.jit
def row_numbers(seed, rows):
    """The numbers of rows i: low and high half of splitmix64(seed + (2 i + 1) G)."""
    r = splitmix(seed.to(tl.uint64) + (rows.to(tl.uint64) * 2 + 1) * GOLDEN)
    return r.to(tl.uint32), (r >> 32).to(tl.uint32)


@triton.jit
def meet(low, high, key):
    """The number of a weight, from those of its row and its key."""
    x = low ^ key
    x = (x ^ (x >> 16)) * MIX_1 + high
    x = (x ^ (x >> 15)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def key_numbers(seed, keys):
    """The numbers of keys."""
    salt = splitmix(seed.to(tl.uint64)).to(tl.uint32)
    x = keys.to(tl.uint32) * GOLDEN_32 + salt
    return meet(x, tl.zeros(x.shape, tl.uint32), tl.zeros(x.shape, tl.uint32))


# --- from scores to weights and back ----------------------------------------------------------------------------------


@triton.jit
def expressive_weight(x, visible, c, RESTRICTED: tl.constexpr, FAST: tl.constexpr):
    """x^2 / (c + x^2), 0 where a key is hidden.

    Where x^2 overflows this is infinity times 0, and the row's total no number, which tells careful.py to compute the
    row again. A bound on x^2 would be a fifth of all instructions here, for scores beyond 10^19.
    """
    if RESTRICTED:
        x = tl.where(visible, x, 0.0)
    square = x * x
    return square * reciprocal(c + square, FAST)
